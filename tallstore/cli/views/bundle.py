"""`inspect`: a bundle's header, and a row a task."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from tallstore.cli import terminal
from tallstore.cli.figures import NOTHING, count, listed, number, several, significant, spread
from tallstore.cli.tables import Column, print_facts, print_table
from tallstore.inspecting.summary import BundleSummary, GroupSummary, TaskSummary
from tallstore.sizes import readable

_SHORT_HASH = 12
_MOST_GROUPS = 4  # with more, those that are alike share a line
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8", "LOG4": "log4"}


def print_bundle(summary: BundleSummary) -> None:
    """The bundle's header, a row a task in the bundle's order, and what cannot be read here."""
    console = terminal.output()
    print_facts(console, _facts(summary))
    tasks = summary.tasks
    shown = print_table(
        console,
        [
            Column("task", [task.name for task in tasks], "name"),
            Column("group", [task.group for task in tasks], "text", droppable=7) if len(summary.groups) > 1 else None,
            Column("parameters", [count(task.parameters) for task in tasks], droppable=1),
            Column("size", [readable(task.nbytes) for task in tasks]),
            Column("bits", [number(task.bits, 2) for task in tasks], droppable=9),
            Column("cosine", [number(task.cosine, 3) for task in tasks], droppable=10),
            Column("gain", [number(task.gain, 3) for task in tasks], droppable=2),
            score_column([task.score for task in tasks]),
            *_kind_counts(tasks),
            Column("", [_remark(task) for task in tasks], "text") if any(map(_remark, tasks)) else None,
        ],
    )
    if "bits" in shown and any(task.bits is not None for task in tasks):
        console.print(Text("bits: a coded parameter, its share of the shared vectors included", "dim"))
    for task in tasks:
        if task.unreadable is not None:
            console.print(Text(task.unreadable, "yellow"))
    absent = [task.name for task in tasks if not task.fetched]
    if absent:
        console.print(Text(f"not fetched: {listed(absent)}", "yellow"))


def score_column(scores: Sequence[float | None]) -> Column | None:
    """What the user's own evaluation gave; None where it gave nothing."""
    if all(score is None for score in scores):
        return None
    return Column("score", [significant(score) for score in scores], droppable=8)


def _facts(summary: BundleSummary) -> list[tuple[str, str]]:
    facts = [
        ("bundle", f"{summary.where} (format {summary.format_version}, by {summary.generator})"),
        ("base", _describe_base(summary)),
        *(("group", group) for group in _describe_groups(summary.groups)),
    ]
    if len(summary.tasks) > 1:
        facts.append(("tasks", _describe_tasks(summary.tasks)))
    facts.append(("size", _describe_sizes(summary)))
    if summary.ratio is not None:
        weighed = summary.weighed
        whom = several(len(weighed), "checkpoint")
        if len(weighed) < len(summary.tasks):
            whom += f" of {len(summary.tasks)}"
        if summary.base.embedded:
            whom += " and the base's"
        facts.append(
            ("ratio", f"{summary.ratio:.1f} times smaller than {whom} ({readable(summary.checkpoints_nbytes)})")
        )
    return facts


def _describe_base(summary: BundleSummary) -> str:
    base = summary.base
    place = "in the bundle" if base.embedded else "not in the bundle"
    name = base.repo_id or ("" if base.embedded else "not named")
    if base.revision is not None:
        name += f"@{base.revision[:_SHORT_HASH]}"
    described = f"{name}, {place}" if name else place
    if base.parameters is None or base.tensors is None or base.checkpoint_nbytes is None:
        return described
    size = f"{count(base.parameters)} parameters in {several(base.tensors, 'tensor')}"
    return f"{described}: {size}, {readable(base.checkpoint_nbytes)}"


def _describe_groups(groups: Sequence[GroupSummary]) -> list[str]:
    """A line a group; where there are many, a line for neighbours that were made alike."""
    if len(groups) <= _MOST_GROUPS:
        runs = [[group] for group in groups]
    else:
        runs = [list(run) for _, run in groupby(groups, key=_describe_method)]
    return [_describe_run(run) for run in runs]


def _describe_run(run: Sequence[GroupSummary]) -> str:
    first, last = run[0], run[-1]
    ids = first.id if len(run) == 1 else f"{first.id} to {last.id}"
    tasks = several(sum(group.tasks for group in run), "task")
    where = "" if len(run) == 1 else f" in {several(len(run), 'group')}"
    return f"{ids}: {_describe_method(first)}, {tasks}{where}, {readable(sum(group.nbytes for group in run))} shared"


def _describe_method(group: GroupSummary) -> str:
    parameters = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in group.parameters.items())
    method = f"{group.method} ({parameters})" if parameters else group.method
    dtypes = " and ".join(_DTYPES.get(dtype, dtype) for dtype in group.merged_dtypes or ())
    return f"{method}{', merged in ' * bool(dtypes)}{dtypes}"


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _describe_tasks(tasks: Sequence[TaskSummary]) -> str:
    here = sum(task.fetched for task in tasks)
    parts = [f"{len(tasks)}" if here == len(tasks) else f"{len(tasks)}, {here} of them here"]
    cosines = [task.cosine for task in tasks if task.cosine is not None]
    if cosines:
        parts.append(f"cosine {spread(min(cosines), max(cosines), 3)}")
    return "; ".join(parts)


def _describe_sizes(summary: BundleSummary) -> str:
    parts = [f"{readable(summary.shared_nbytes)} shared"]
    if summary.tasks:
        mean = readable(summary.tasks_nbytes // len(summary.tasks))
        each = f" ({mean} each)" if len(summary.tasks) > 1 else ""
        parts.append(f"{readable(summary.tasks_nbytes)} of tasks{each}")
    if summary.base.embedded:
        parts.append(f"{readable(summary.base_nbytes)} of the base")
    if summary.companions_nbytes:
        parts.append(f"{readable(summary.companions_nbytes)} of configs and tokenizers")
    return f"{readable(summary.nbytes)}: {', '.join(parts)}"


def _kind_counts(tasks: Sequence[TaskSummary]) -> list[Column]:
    """How many tensors are coded, same, whole and other; columns without any count are left out."""

    def column(heading: str, counts: list[int], droppable: int) -> Column | None:
        cells = [NOTHING if task.kinds is None else str(count) for task, count in zip(tasks, counts, strict=True)]
        return Column(heading, cells, droppable=droppable) if any(counts) else None

    columns = (
        column("coded", [task.coded for task in tasks], 6),
        column("same", [task.same for task in tasks], 4),
        column("whole", [task.whole for task in tasks], 5),
        column("other", [task.other for task in tasks], 3),
    )
    return [found for found in columns if found is not None]


def _remark(task: TaskSummary) -> str:
    if not task.fetched:
        return "not fetched"
    return "" if task.unreadable is None else "too new"
