"""`tallstore export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

import tallstore
from tallstore.cli.completion import task_names
from tallstore.cli.options import BaseOption, BundleArgument, JsonOption, OverwriteOption

USAGE: Final = "BUNDLE (TASK | --all) --out DIR [OPTIONS]"
EXAMPLES: Final = """\
# one expert; a bundle that embeds its base needs no --base
tallstore export bundle spam --base bert --out bert-spam
# every expert, each in a directory of its own
tallstore export bundle --all --base bert --out experts"""


def export(
    bundle: BundleArgument,
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK",
            help="The expert's name; or give --all.",
            show_default=False,
            autocompletion=task_names,
        ),
    ] = None,
    *,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Every expert, each into a directory of its own in DIR. Nothing is written unless all tasks are here.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.", show_default=False)],
    base: BaseOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write experts as Hugging Face directories that from_pretrained loads.

    A directory appears in one step, complete. Where --all is stopped, those that were finished stay.
    """
    if task is None and not every:
        raise typer.BadParameter("give a TASK of the bundle, or --all", param_hint="TASK")
    if task is not None and every:
        raise typer.BadParameter(f"stands for every task; leave out {task!r}, or --all", param_hint="--all")

    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich

    inputs = () if base is None else (base,)
    with progress_bar.show("exporting") as progress:
        from tallstore import exporting  # noqa: PLC0415 - torch

        with tallstore.open_bundle(bundle, base=base) as opened:
            if task is None:
                exported = exporting.export_all(opened, out, overwrite=overwrite, inputs=inputs, progress=progress)
            else:
                one = exporting.export(opened, task, out, overwrite=overwrite, inputs=inputs, progress=progress)
                exported = (one,)

    from tallstore.cli.views.exported import print_all_exported, print_exported  # noqa: PLC0415 - torch

    if as_json:
        described = [each.to_dict() for each in exported]
        terminal.print_json(described if every else described[0])
    elif every:
        print_all_exported(out, exported)
    else:
        print_exported(exported[0])
