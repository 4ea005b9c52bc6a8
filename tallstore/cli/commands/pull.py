"""`tallstore pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

import tallstore
from tallstore.cli.completion import task_names
from tallstore.cli.options import JsonOption

USAGE: Final = "REPO [--task TASK]… [--out DIR] [OPTIONS]"
EXAMPLES: Final = """\
# all of a bundle, into the Hub's cache
tallstore pull org/name
# two of its tasks, into a directory; a later pull adds others
tallstore pull org/name --task spam --task mood --out bundle"""


def pull(
    bundle: Annotated[
        str, typer.Argument(metavar="REPO", help="The bundle's id on the Hub: org/name[@revision].", show_default=False)
    ],
    *,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="One of the tasks to download; can be given again. All unless given.",
            show_default=False,
            autocompletion=task_names,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to write the bundle; the Hub's cache unless given.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="A branch, a tag or a commit; main unless given.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a bundle from the Hub, or some tasks of it, with what they need and nothing else.

    Every file is checked as it comes in; what is there already, and right, is not downloaded again. The token is the
    one of `hf auth login`, or that in HF_TOKEN.
    """
    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich

    with progress_bar.show("downloading") as progress:
        path = tallstore.pull(bundle, tasks=task or None, revision=revision, local_dir=out, progress=progress)

    from tallstore.cli.views.pulled import print_pulled  # noqa: PLC0415
    from tallstore.inspecting.summary import presence  # noqa: PLC0415

    present = presence(path)
    if as_json:
        terminal.print_json({"path": str(path), **present.to_dict()})
    else:
        print_pulled(path, present)
