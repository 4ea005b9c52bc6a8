"""One model that was merged out of a bundle: what `consensus` and `stitch` write, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tallstore

if TYPE_CHECKING:
    from torch import Tensor

MergedOutput = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Where to write the model.", show_default=False)
]


def write_merged(
    bundle: str,
    merge: Callable[[tallstore.Bundle], Mapping[str, Tensor]],
    out: Path,
    *,
    name: str,
    base: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge what *merge* takes of the bundle, write it to *out*, and print how it went.

    Args:
        bundle: its directory, or its id on the Hub.
        merge: makes the state dict.
        out: the model's directory.
        name: of the model, in what is printed.
        base: where it was given.
        overwrite: replace an earlier one.
        as_json: print JSON.
    """
    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich

    with progress_bar.show("merging"):
        from tallstore import exporting  # noqa: PLC0415 - torch

        inputs = () if base is None else (base,)
        with tallstore.open_bundle(bundle, base=base) as opened:
            exported = exporting.export_merged(
                opened, lambda: merge(opened), out, name=name, overwrite=overwrite, inputs=inputs
            )
    if as_json:
        terminal.print_json(exported.to_dict())
        return

    from tallstore.cli.views.exported import print_exported  # noqa: PLC0415 - torch

    print_exported(exported)
