"""`tallstore consensus`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

import tallstore
from tallstore.cli.options import BaseOption, BundleArgument, JsonOption, OverwriteOption, TasksOption

USAGE: Final = "BUNDLE --out DIR [OPTIONS]"
EXAMPLES: Final = """\
# one model for all tasks of a TALL-mask bundle
tallstore consensus bundle --base bert --out merged
# only what three tasks agree on, at a third
tallstore consensus bundle --base bert --out merged --k 3 --scale 0.33"""


def consensus(
    bundle: BundleArgument,
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the model.", show_default=False)],
    k: Annotated[int, typer.Option("--k", metavar="K", help="How many masks must claim a weight.")] = 2,
    scale: Annotated[float, typer.Option(metavar="X", help="Of the merged vector.")] = 1.0,
    task: TasksOption = None,
    base: BaseOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """One merged model: what at least K masks claim of the merged vector (Consensus Merging).

    It is written as a Hugging Face directory, with the base's own config and tokenizer.
    """
    from tallstore import exporting  # noqa: PLC0415 - torch
    from tallstore.cli import terminal  # noqa: PLC0415 - rich

    inputs = () if base is None else (base,)
    with tallstore.open_bundle(bundle, base=base) as opened:
        weights = opened.consensus(k, scale, task or None)
        exported = exporting.export_merged(
            opened, weights, out, name="the consensus", overwrite=overwrite, inputs=inputs
        )

    from tallstore.cli.views.exported import print_exported  # noqa: PLC0415 - torch

    terminal.print_json(exported.to_dict()) if as_json else print_exported(exported)
