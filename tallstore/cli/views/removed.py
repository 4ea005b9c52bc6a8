"""`remove`: what goes, and what went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from tallstore.cli import terminal
from tallstore.cli.figures import several
from tallstore.sizes import readable

if TYPE_CHECKING:
    from tallstore.growing.removing import RemoveReport


def print_leaving(report: RemoveReport) -> None:
    """What would go, before a question: on stderr, as the question is."""
    _print(terminal.aside(), report)


def print_removed(report: RemoveReport) -> None:
    """What went, or would go."""
    _print(terminal.output(), report)


def _print(console: Console, report: RemoveReport) -> None:
    verb, freed = ("would remove", "to be freed") if report.dry_run else ("removed", "freed")
    what = several(len(report.tasks), "task")
    console.print(f"{verb} {what} from {report.path}: {readable(report.nbytes)} {freed}", soft_wrap=True)
    for task in report.tasks:
        console.print(f"  {task}", soft_wrap=True)
    for group in report.groups:
        console.print(f"  {group}, a group, with its last task")
