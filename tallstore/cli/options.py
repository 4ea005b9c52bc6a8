"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from tallstore.cli.completion import task_names

BundleArgument = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        help="The bundle's directory; or, where no such path exists, its id on the Hub: org/name[@revision].",
        show_default=False,
    ),
]
LocalBundleArgument = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="The bundle's directory.", show_default=False)
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="The base that the bundle was packed from, where the bundle neither has it nor names it: a path, or a Hub"
        " id.",
        show_default=False,
    ),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="One of the tasks to take; can be given again. All unless given.",
        show_default=False,
        autocompletion=task_names,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]
