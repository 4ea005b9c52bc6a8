"""`tallstore inspect`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from tallstore.cli.completion import task_names
from tallstore.cli.options import BundleArgument, JsonOption

USAGE: Final = "BUNDLE [--task TASK] [--json]"
EXAMPLES: Final = """\
tallstore inspect bundle
tallstore inspect bundle --task spam
tallstore inspect bundle --json
tallstore inspect org/name@v1"""


def inspect(
    bundle: BundleArgument,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Show this task, tensor by tensor.",
            show_default=False,
            autocompletion=task_names,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a bundle: sizes, methods, how true each task is. Decodes nothing.

    Of a bundle on the Hub it downloads the manifest; with --task, the task's table too.
    """
    from tallstore.cli import terminal  # noqa: PLC0415 - rich

    if task is None:
        from tallstore.cli.views.bundle import print_bundle  # noqa: PLC0415 - what this form alone needs
        from tallstore.hub.snapshot import find  # noqa: PLC0415
        from tallstore.inspecting.summary import summarise  # noqa: PLC0415

        summary = summarise(*find(bundle))
        terminal.print_json(summary.to_dict()) if as_json else print_bundle(summary)
        return

    from tallstore.cli.views.task import print_task  # noqa: PLC0415 - what this form alone needs: numpy
    from tallstore.hub.opening import open_files  # noqa: PLC0415
    from tallstore.inspecting.task_details import describe_task  # noqa: PLC0415

    details = describe_task(open_files(bundle), task)
    terminal.print_json(details.to_dict()) if as_json else print_task(details)
