"""What the command line prints: tables that fit the terminal, progress, and errors of one line."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # the commands that need them have them; an error or a help text needs none
    from tallstore.exporting import Exported
    from tallstore.inspecting.summary import BundleSummary, GroupSummary, Presence, TaskSummary
    from tallstore.inspecting.task_details import TaskDetails, TensorSummary
    from tallstore.packing import PackedTask, PackReport
    from tallstore.packing.group import StoredWhole

_WIDTH_OF_A_PIPE = 200  # nothing is cut short where nobody looks at the lines' length
_NARROWEST_NAME = 12
_GAP = 2
_SHOWN_NAMES = 3
_SHORT_HASH = 12
_NOTHING = "–"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8", "LOG4": "log4"}

# The library's hints name Python's arguments; whoever reads them here needs the options of the command line.
_OPTIONS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"key_mapping=\{regular expression: replacement\}"), lambda _: "--key-mapping 'REGEX=REPLACEMENT'"),
    (
        re.compile(r'key_mapping=\{"(.*?)": "(.*?)"\}'),
        lambda found: f"--key-mapping '{found[1]}={found[2]}'".replace("\\\\", "\\"),
    ),
    (
        re.compile(r"give it: open_bundle\(path, base=…\) takes a path, a state dict or a Hub id"),
        lambda _: "give --base",
    ),
    (re.compile(r"\bSignedMask\(\)"), lambda _: "--method signed-mask"),
    (re.compile(r"\boverwrite=True"), lambda _: "--overwrite"),
    (re.compile(r"\bprivate="), lambda _: "--private"),
    (
        re.compile(r"\b(?:base_ref|merged_dtype|mask_lambda|key_mapping)\b"),
        lambda found: "--" + found[0].replace("_", "-"),
    ),
)


def output() -> Console:
    """Where results go. Lines are as long as the terminal is wide, and in a pipe as long as they need be."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _WIDTH_OF_A_PIPE
    return Console(width=width, highlight=False, markup=False, emoji=False)


def report_error(message: str) -> None:
    """One line on stderr."""
    _say_aside("error: ", "bold red", in_options(message))


def report_warning(message: str) -> None:
    """One line on stderr."""
    _say_aside("warning: ", "yellow", in_options(message))


def report_interrupt() -> None:
    """One line on stderr."""
    _say_aside("interrupted", "bold red", "")


def _say_aside(label: str, style: str, message: str) -> None:
    line = Text.assemble((label, style), " ".join(message.split()))
    Console(stderr=True, highlight=False, emoji=False).print(line, soft_wrap=True)


def in_options(message: str) -> str:
    """A message of the library with the command line's options in the place of Python's arguments."""
    for argument, option in _OPTIONS:
        message = argument.sub(option, message)
    return message


@contextlib.contextmanager
def progress(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with bytes, rate and time left; nothing where stderr is no terminal.

    Yields:
        what to call with bytes done and bytes in all.
    """
    console = Console(stderr=True)
    if not (sys.stderr.isatty() and console.is_interactive):
        yield lambda _done, _total: None
        return
    from rich import progress as bars  # noqa: PLC0415 - takes long to import, and `inspect` needs none

    columns = (
        bars.TextColumn(doing, markup=False),
        bars.BarColumn(bar_width=None),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(compact=True),
    )
    with bars.Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# --- inspect ----------------------------------------------------------------------------------------------------------


def print_bundle(summary: BundleSummary) -> None:
    """The bundle's header, and a row a task."""
    console = output()
    _print_facts(console, _bundle_facts(summary))
    several = len(summary.groups) > 1
    columns = [
        _Column("task", [task.name for task in summary.tasks], "name"),
        _Column("group", [task.group for task in summary.tasks], "text", droppable=7) if several else None,
        _Column("parameters", [_count(task.parameters) for task in summary.tasks], droppable=1),
        _Column("size", [decimal(task.nbytes) for task in summary.tasks]),
        _Column("bits", [_number(task.bits, 2) for task in summary.tasks], droppable=9),
        _Column("cosine", [_number(task.cosine, 3) for task in summary.tasks], droppable=10),
        _Column("gain", [_number(task.gain, 3) for task in summary.tasks], droppable=2),
        *_scores([task.score for task in summary.tasks]),
        *_kind_counts(summary.tasks),
        _Column("", [_remark(task) for task in summary.tasks], "text") if any(map(_remark, summary.tasks)) else None,
    ]
    shown = _print_table(console, [column for column in columns if column is not None])
    if "bits" in shown and any(task.bits is not None for task in summary.tasks):
        console.print(Text("bits: a coded parameter, its share of the shared vectors included", "dim"))
    for task in summary.tasks:
        if task.unreadable is not None:
            console.print(Text(task.unreadable, "yellow"))
    absent = [task.name for task in summary.tasks if not task.fetched]
    if absent:
        console.print(Text(f"not fetched: {_listed(absent)}", "yellow"))


def _bundle_facts(summary: BundleSummary) -> list[tuple[str, str]]:
    facts = [
        ("bundle", f"{summary.path} (format {summary.format_version}, by {summary.generator})"),
        ("base", _describe_base(summary)),
        *(("group", _describe_group(group)) for group in summary.groups),
        ("size", _describe_sizes(summary)),
    ]
    if summary.ratio is not None:
        weighed = summary.weighed
        whom = f"{len(weighed)} checkpoint{'' if len(weighed) == 1 else 's'}"
        if len(weighed) < len(summary.tasks):
            whom += f" of {len(summary.tasks)}"
        if summary.base.embedded:
            whom += " and the base's"
        facts.append(
            ("ratio", f"{summary.ratio:.1f} times smaller than {whom} ({decimal(summary.checkpoints_nbytes)})")
        )
    return facts


def _describe_base(summary: BundleSummary) -> str:
    base = summary.base
    place = "in the bundle" if base.embedded else "not in the bundle"
    name = base.repo_id or ("" if base.embedded else "not named")
    if base.revision is not None:
        name += f"@{base.revision[:_SHORT_HASH]}"
    size = f"{_count(base.parameters)} parameters in {base.tensors} tensors, {decimal(base.checkpoint_nbytes)}"
    return f"{name}, {place}: {size}" if name else f"{place}: {size}"


def _describe_group(group: GroupSummary) -> str:
    parameters = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in group.parameters.items())
    method = f"{group.method} ({parameters})" if parameters else group.method
    dtypes = " and ".join(_DTYPES.get(dtype, dtype) for dtype in group.merged_dtypes or ())
    tasks = f"{group.tasks} task{'' if group.tasks == 1 else 's'}"
    return f"{group.id}: {method}{', merged in ' * bool(dtypes)}{dtypes}, {tasks}, {decimal(group.nbytes)} shared"


def _describe_sizes(summary: BundleSummary) -> str:
    parts = [f"{decimal(summary.shared_nbytes)} shared"]
    if summary.tasks:
        mean = decimal(summary.tasks_nbytes // len(summary.tasks))
        parts.append(f"{decimal(summary.tasks_nbytes)} of tasks ({mean} each)")
    if summary.base.embedded:
        parts.append(f"{decimal(summary.base_nbytes)} of the base")
    if summary.companions_nbytes:
        parts.append(f"{decimal(summary.companions_nbytes)} of configs and tokenizers")
    return f"{decimal(summary.nbytes)}: {', '.join(parts)}"


def _kind_counts(tasks: Sequence[TaskSummary]) -> list[_Column]:
    """How many tensors are coded, same, whole and other; columns without any count are left out."""

    def column(heading: str, counts: list[int], droppable: int) -> _Column | None:
        cells = [_NOTHING if task.kinds is None else str(count) for task, count in zip(tasks, counts, strict=True)]
        return _Column(heading, cells, droppable=droppable) if any(counts) else None

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


def print_task(details: TaskDetails) -> None:
    """One task's header, and a row a tensor."""
    console = output()
    _print_facts(console, _task_facts(details))
    tensors = details.tensors
    _print_table(
        console,
        [
            _Column("tensor", [tensor.name for tensor in tensors], "name"),
            _Column("kind", [_describe_kind(tensor) for tensor in tensors], "text"),
            _Column("dtype", [(tensor.dtype or _NOTHING).lower() for tensor in tensors], "text", droppable=2),
            _Column("shape", [_shape(tensor) for tensor in tensors], droppable=3),
            _Column("gain", [_significant(tensor.gain) for tensor in tensors], droppable=1),
            _Column("size", [_stored(tensor.nbytes) for tensor in tensors]),
        ],
    )
    if any(tensor.nbytes is None for tensor in tensors):
        console.print(Text("sizes are not known: the task's files are not here", "yellow"))


def _task_facts(details: TaskDetails) -> list[tuple[str, str]]:
    task = details.task
    bits = "" if task.bits is None else f", {task.bits:.2f} bits a coded parameter"
    facts = [
        ("task", f"{task.name} of {details.path} ({task.group}, {details.method})"),
        ("size", f"{decimal(task.nbytes)} for {_count(task.parameters)} parameters{bits}"),
        ("fidelity", _describe_fidelity(task)),
    ]
    if details.estimates:
        others = [
            f"{name} masks about {estimate.cosine:.3f} at {estimate.bits:.2f} bits"
            for name, estimate in details.estimates.items()
        ]
        facts.append(("others", f"cosine of {', of '.join(others)}"))
    if details.files:
        facts.append(("files", ", ".join(f"{file.name} ({decimal(file.size)})" for file in details.files)))
    return facts


def _describe_fidelity(task: TaskSummary) -> str:
    if task.cosine is None:
        return "exact: nothing is coded"
    score = "" if task.score is None else f", score {task.score:.4g}"
    return f"cosine {task.cosine:.3f}, gain {_number(task.gain, 3)}{score}"


def _describe_kind(tensor: TensorSummary) -> str:
    if tensor.tied_to is not None:
        return f"{tensor.kind} of {tensor.tied_to}"
    if tensor.rows is not None:
        return f"{tensor.kind} from row {tensor.rows}"
    return tensor.kind if tensor.base in (None, tensor.name) else f"{tensor.kind} over {tensor.base}"


def _shape(tensor: TensorSummary) -> str:
    if tensor.shape is None:
        return _NOTHING
    return " × ".join(map(str, tensor.shape)) or "scalar"


# --- pack, verify, export ---------------------------------------------------------------------------------------------


def print_packed(report: PackReport, *, embedded: bool) -> None:
    """What was packed, and what was stored whole and why; *embedded*: whether the base is in the bundle."""
    console = output()
    before = report.checkpoints_nbytes + (report.base_nbytes if embedded else 0)
    verb = "would pack" if report.dry_run else "packed"
    what = f"{len(report.tasks)} tasks{' and their base' if embedded else ''}"
    console.print(
        f"{verb} {what} into {report.path} with {report.method}: {decimal(before)} of checkpoints"
        f" in {decimal(report.bundle_nbytes)}, {before / max(1, report.bundle_nbytes):.1f} times smaller"
    )
    tasks = report.tasks
    _print_table(
        console,
        [
            _Column("task", [task.name for task in tasks], "name"),
            _Column("size", [decimal(task.nbytes) for task in tasks]),
            _Column("bits", [_number(task.bits, 2) for task in tasks], droppable=2),
            _Column("cosine", [_number(task.cosine, 3) for task in tasks], droppable=4),
            _Column("gain", [_number(task.gain, 3) for task in tasks], droppable=1),
            *_scores([task.score for task in tasks]),
            _Column("whole", [str(len(task.whole)) for task in tasks], droppable=3),
        ],
    )
    _print_whole(console, tasks)
    for advice in report.advice:
        console.print(Text(in_options(advice), "yellow"))


def _print_whole(console: Console, tasks: Sequence[PackedTask]) -> None:
    """Why tensors were stored whole, and what that costs: a line a reason."""
    by_reason: dict[str, list[StoredWhole]] = defaultdict(list)
    for task in tasks:
        for stored in task.whole:
            by_reason[in_options(stored.reason)].append(stored)
    for reason, stored_whole in sorted(by_reason.items(), key=lambda item: -sum(stored.nbytes for stored in item[1])):
        names = list(dict.fromkeys(stored.tensor for stored in stored_whole))
        cost = decimal(sum(stored.nbytes for stored in stored_whole))
        console.print(f"stored whole, {reason}: {_listed(names)}; {cost} in all tasks")


def print_problems(problems: Sequence[object]) -> None:
    """Each problem that `verify` found, a line."""
    console = output()
    for problem in problems:
        console.print(str(problem), soft_wrap=True)


def print_verified(present: Presence) -> None:
    """How much was checked."""
    console = output()
    console.print(f"no problems: {present.files} files checked, {decimal(present.nbytes)}")
    if present.not_fetched:
        console.print(f"not fetched, so not checked: {_listed(present.not_fetched)}")


def print_exported(exported: Exported) -> None:
    """What was written where."""
    console = output()
    weights = exported.weights[0] if len(exported.weights) == 1 else f"{len(exported.weights) - 1} shards"
    companions = f", {', '.join(exported.companions)}" if exported.companions else ""
    console.print(
        f"exported {exported.task} to {exported.path}: {exported.tensors} tensors, {decimal(exported.nbytes)}"
        f" in {weights}{companions}"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """One column of a table.

    Attributes:
        heading, cells: from the top.
        holds: "number" is aligned to the right; "name" gives way to the others where the terminal is narrow.
        droppable: columns are left out in this order where the terminal is too narrow; None stays.
    """

    heading: str
    cells: Sequence[str]
    holds: Literal["name", "text", "number"] = "number"
    droppable: int | None = None

    @property
    def width(self) -> int:
        """What it takes; a name can be folded."""
        width = max(map(cell_len, (self.heading, *self.cells)))
        return min(width, _NARROWEST_NAME) if self.holds == "name" else width


def _print_table(console: Console, columns: Sequence[_Column]) -> list[str]:
    """Print the columns that fit; their headings."""
    shown = _fitting(columns, console.width)
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold"
    )
    for column in shown:
        is_number = column.holds == "number"
        table.add_column(
            column.heading,
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
            min_width=column.width if is_number else None,
        )
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)
    return [column.heading for column in shown]


def _fitting(columns: Sequence[_Column], width: int) -> list[_Column]:
    shown = list(columns)
    while sum(column.width + _GAP for column in shown) - _GAP > width:
        droppable = [column for column in shown if column.droppable is not None]
        if not droppable:
            break
        shown.remove(min(droppable, key=lambda column: column.droppable or 0))
    return shown


def _print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, _GAP, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, fact in facts:
        table.add_row(label, Text(fact))
    console.print(table)


def _scores(scores: Sequence[float | None]) -> list[_Column]:
    if all(score is None for score in scores):
        return []
    return [_Column("score", [_significant(score) for score in scores], droppable=8)]


def _count(number: int) -> str:
    """A number of parameters for people."""
    value = float(number)
    for unit in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:.0f}" if not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f} T"


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _stored(nbytes: int | None) -> str:
    if nbytes is None:
        return "?"
    return decimal(nbytes) if nbytes else _NOTHING


def _significant(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4g}"


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
