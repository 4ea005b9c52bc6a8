"""`statistics`: what was counted, how many masks claim a weight, and what each two masks have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

from rich.console import Console
from rich.text import Text

from tallstore.cli import terminal
from tallstore.cli.figures import NOTHING, count, listed, percent, several
from tallstore.cli.tables import Column, fits, print_facts, print_table
from tallstore.inspecting.statistics import LeftOut, Statistics

_MOST_MASKS = 12  # of a matrix, and of a profile with a line for each number of masks
_RANGES = 9  # of numbers of masks that share a line, where there are more
_PAIRS = 3
_REASONS = 4
_LONGEST_BAR = 40
_SHORTEST_BAR = 8
_EIGHTHS = " ▏▎▍▌▋▊▉"


def print_statistics(statistics: Statistics) -> None:
    """The facts, the agreement profile, and a row a task with its overlaps: a matrix where the terminal has room."""
    console = terminal.output()
    print_facts(console, list(_facts(statistics)))
    if statistics.numel:
        _print_profile(console, statistics)
    _print_tasks(console, statistics)
    if statistics.not_fetched:
        console.print(Text(f"not fetched, so not counted: {listed(statistics.not_fetched)}", "yellow"))


def _facts(statistics: Statistics) -> Iterator[tuple[str, str]]:
    yield "bundle", statistics.where
    masks, tensors = several(len(statistics.tasks), "mask"), several(len(statistics.tensors), "tensor")
    density = f", density {percent(statistics.density)}" if statistics.numel else ""
    yield "counted", f"{masks} over {count(statistics.numel)} weights in {tensors}{density}"
    by_reason: defaultdict[str, list[LeftOut]] = defaultdict(list)
    for tensor in statistics.left_out:
        by_reason[tensor.reason].append(tensor)
    reasons = sorted(by_reason.items(), key=lambda item: -_numel(item[1]))
    for reason, left_out in reasons[:_REASONS]:
        yield "left out", f"{_amount(left_out)}, {reason}: {listed([tensor.name for tensor in left_out])}"
    others = [tensor for _, left_out in reasons[_REASONS:] for tensor in left_out]
    if others:
        yield "left out", f"{_amount(others)}, for {several(len(reasons) - _REASONS, 'other reason')}"


def _amount(left_out: Sequence[LeftOut]) -> str:
    return f"{count(_numel(left_out))} weights in {several(len(left_out), 'tensor')}"


def _numel(left_out: Sequence[LeftOut]) -> int:
    return sum(tensor.numel for tensor in left_out)


# --- how many masks claim a weight


def _print_profile(console: Console, statistics: Statistics) -> None:
    lines = [
        (_label(first, last, len(statistics.tasks)), sum(statistics.claimed_by[first : last + 1]))
        for first, last in _ranges(len(statistics.tasks))
    ]
    shares = [number / statistics.numel for _, number in lines]
    columns = [
        Column("claimed by", [label for label, _ in lines], "text"),
        Column("weights", [count(number) for _, number in lines], droppable=1),
        Column("share", [percent(share) for share in shares]),
    ]
    room = min(_LONGEST_BAR, console.width - sum(column.width + 2 for column in columns))
    if room >= _SHORTEST_BAR:
        columns.append(Column("", [_bar(share / max(shares), room) for share in shares], "text"))
    print_table(console, columns)


def _ranges(masks: int) -> list[tuple[int, int]]:
    """Numbers of masks from none to all of them, each by itself where they are few: first and last of each line."""
    between = range(2, masks)
    step = 1 if masks <= _MOST_MASKS else -(-len(between) // _RANGES)
    ranges = [(first, min(first + step, masks) - 1) for first in between[::step]]
    return [(0, 0), *([(1, 1)] if masks > 1 else []), *ranges, (masks, masks)]


def _label(first: int, last: int, masks: int) -> str:
    if first == masks:
        return "the mask" if masks == 1 else f"all {masks} (universal)"
    names = {0: "none (catastrophic)", 1: "one (selfish)"}
    return names.get(first, str(first) if first == last else f"{first} to {last}")


def _bar(share: float, width: int) -> str:
    """A bar of a share of *width*, to an eighth of a character."""
    eighths = round(8 * width * share)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


# --- what each two have in common


def _print_tasks(console: Console, statistics: Statistics) -> None:
    """A row a task: its density, and its overlaps with all others, or with the nearest."""
    tasks = statistics.tasks
    names = Column("task", tasks, "name")
    densities = Column("density", [percent(statistics.densities[task]) for task in tasks])
    if not statistics.numel or len(tasks) == 1:
        print_table(console, [names, densities])
        return
    numbers = [str(place + 1) for place in range(len(tasks))]
    matrix = [Column("", numbers), names, densities, *_matrix(statistics)]
    if len(tasks) <= _MOST_MASKS and fits(matrix, console.width):
        print_table(console, matrix)
        console.print(Text("1, 2, …: of the weights that either of two masks claims, the % that both claim", "dim"))
        return
    nearest = [_nearest(statistics, place) for place in range(len(tasks))]
    print_table(
        console,
        [
            names,
            densities,
            Column("nearest task", [name for name, _ in nearest], "name", droppable=8),
            Column("in common", [percent(share) for _, share in nearest], droppable=9),
        ],
    )
    console.print(Text("in common: of the weights that either of two masks claims, those that both claim", "dim"))
    _print_pairs(console, statistics)


def _matrix(statistics: Statistics) -> list[Column]:
    """A column a task: the share of weights that it has in common with each."""
    return [
        Column(
            str(place + 1),
            [
                "" if other == place else NOTHING if share is None else f"{100 * share:.1f}"
                for other, share in enumerate(row)
            ],
        )
        for place, row in enumerate(statistics.similarity)
    ]


def _nearest(statistics: Statistics, place: int) -> tuple[str, float | None]:
    """The task that one has most in common with, and how much."""
    shares = [
        (share, -other)
        for other, share in enumerate(statistics.similarity[place])
        if other != place and share is not None
    ]
    if not shares:
        return NOTHING, None
    share, other = max(shares)
    return statistics.tasks[-other], share


def _print_pairs(console: Console, statistics: Statistics) -> None:
    """The pairs that have most in common, and least."""
    pairs = [
        (share, f"{statistics.tasks[one]} and {statistics.tasks[other]}: {percent(share)}")
        for one, other in combinations(range(len(statistics.tasks)), 2)
        if (share := statistics.similarity[one][other]) is not None
    ]
    if len(pairs) < 2 * _PAIRS:
        return
    pairs.sort(key=lambda pair: -pair[0])
    console.print()
    facts = [("nearest", text) for _, text in pairs[:_PAIRS]]
    print_facts(console, [*facts, *(("farthest", text) for _, text in reversed(pairs[-_PAIRS:]))])
