"""`tallstore stitch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

import tallstore
from tallstore.cli.options import BaseOption, BundleArgument, JsonOption, OverwriteOption, TasksOption

USAGE: Final = "BUNDLE --out DIR [OPTIONS]"
EXAMPLES: Final = """\
# one model out of experts that were packed with --method localize
tallstore stitch bundle --base bert --out stitched
# out of two of them
tallstore stitch bundle --base bert --out stitched --task spam --task mood"""


def stitch(
    bundle: BundleArgument,
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the model.", show_default=False)],
    task: TasksOption = None,
    base: BaseOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """One merged model of sparse experts: at every weight, the mean over the tasks that claim it.

    It is written as a Hugging Face directory, with the base's own config and tokenizer.
    """
    from tallstore import exporting  # noqa: PLC0415 - torch
    from tallstore.cli import terminal  # noqa: PLC0415 - rich

    inputs = () if base is None else (base,)
    with tallstore.open_bundle(bundle, base=base) as opened:
        weights = opened.stitch(task or None)
        exported = exporting.export_merged(
            opened, weights, out, name="the stitched model", overwrite=overwrite, inputs=inputs
        )

    from tallstore.cli.views.exported import print_exported  # noqa: PLC0415 - torch

    terminal.print_json(exported.to_dict()) if as_json else print_exported(exported)
