"""`tallstore remove`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

import tallstore
from tallstore.cli.completion import task_names
from tallstore.cli.options import JsonOption, LocalBundleArgument

if TYPE_CHECKING:
    from tallstore.growing.removing import RemoveReport

USAGE: Final = "BUNDLE TASK… [OPTIONS]"
EXAMPLES: Final = """\
# what would go, and how much that frees
tallstore remove bundle spam mood --dry-run
# a task
tallstore remove bundle spam
# without a question, in a terminal too
tallstore remove bundle mood --yes"""


def remove(
    bundle: LocalBundleArgument,
    task: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK", help="A task's name, or several.", show_default=False, autocompletion=task_names
        ),
    ],
    *,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing. Where nobody is at a terminal, nothing is asked anyway.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove tasks from a bundle, and what no other task needs. They cannot be had back, but from their originals.

    In a terminal, it shows what goes and asks. The bundle changes in one step; the other tasks stay as they are.
    """
    from tallstore.cli import terminal  # noqa: PLC0415 - rich
    from tallstore.cli.views.removed import print_leaving, print_removed  # noqa: PLC0415

    if not (yes or dry_run) and sys.stdin.isatty() and sys.stderr.isatty():
        print_leaving(tallstore.remove(bundle, task, dry_run=True))
        _ask()
    report: RemoveReport = tallstore.remove(bundle, task, dry_run=dry_run)
    terminal.print_json(report.to_dict()) if as_json else print_removed(report)


def _ask() -> None:
    """Whether to go on.

    Raises:
        typer.Exit: not to.
    """
    sys.stderr.write("remove? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        sys.stderr.write("nothing was removed\n")
        raise typer.Exit(1)
