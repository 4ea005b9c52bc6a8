"""`pack`: what was packed, and what was stored whole and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from tallstore.cli import terminal
from tallstore.cli.figures import listed, number, several
from tallstore.cli.hints import in_options
from tallstore.cli.tables import Column, print_table
from tallstore.cli.views.bundle import score_column
from tallstore.packing import Action, PackedTask, PackReport
from tallstore.sizes import readable

_VERBS: Final[dict[Action, tuple[str, str]]] = {
    "pack": ("packed", "into"),
    "add": ("added", "to"),
    "repack": ("repacked", "in"),
}


def print_packed(report: PackReport, *, embedded: bool = False) -> None:
    """A sentence, a row a task, and the hints; *embedded*: whether the base is in a new bundle."""
    console = terminal.output()
    before = report.checkpoints_nbytes + (report.base_nbytes if embedded else 0)
    past, where = _VERBS[report.action]
    verb = f"would {report.action}" if report.dry_run else past
    what = f"{several(len(report.tasks), 'task')}{' and their base' if embedded else ''}"
    now = "" if report.action == "pack" else f"; the bundle has {readable(report.bundle_nbytes)}"
    console.print(
        f"{verb} {what} {where} {report.path} with {report.method}: {readable(before)} of checkpoints in"
        f" {readable(report.written_nbytes)}, {before / max(1, report.written_nbytes):.1f} times smaller{now}"
    )
    tasks = report.tasks
    print_table(
        console,
        [
            Column("task", [task.name for task in tasks], "name"),
            Column("size", [readable(task.nbytes) for task in tasks]),
            Column("bits", [number(task.bits, 2) for task in tasks], droppable=7),
            Column("cosine", [number(task.cosine, 3) for task in tasks], droppable=9),
            Column("gain", [number(task.gain, 3) for task in tasks], droppable=1),
            score_column([task.score for task in tasks]),
            Column("whole", [str(len(task.whole)) for task in tasks], droppable=3),
        ],
    )
    _print_whole(console, tasks)
    for advice in report.advice:
        console.print(Text(in_options(advice), "yellow"))


def _print_whole(console: Console, tasks: Sequence[PackedTask]) -> None:
    """Why tensors were stored whole, and what that costs: a line a reason, the dearest first."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    nbytes: Counter[str] = Counter()
    for task in tasks:
        for stored in task.whole:
            reason = in_options(stored.reason)
            names[reason][stored.tensor] = None
            nbytes[reason] += stored.nbytes
    for reason, cost in nbytes.most_common():
        console.print(f"stored whole, {reason}: {listed(list(names[reason]))}; {readable(cost)} in all tasks")
