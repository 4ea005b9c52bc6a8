"""The page's tables: every number of the library that a plot shows, exactly, and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tallstore.format.manifest import Role, SharedDtype
from tallstore.inspecting.shared_vectors import LEVELS, VectorStatistics
from tallstore.inspecting.statistics import Statistics
from tallstore.inspecting.summary import BundleSummary, GroupSummary, TaskSummary
from tallstore.reporting.blocks import MaskedBlock, SharedBlock
from tallstore.reporting.size_plots import parts_of
from tallstore.reporting.vector_plots import DTYPES, levels_of
from tallstore.sizes import count, readable

MOST_COLUMNS: Final = 20
"""So many tasks have a column each where all are beside all; of more, the least and the most are shown."""
MOST_ROWS: Final = 1000
"""Longer tables end here."""

_NOTHING: Final = "–"
Kind = Literal["name", "text", "number"]


@dataclass(frozen=True)
class Column:
    """A heading, what stands below it, and what the heading means where that is not plain."""

    heading: str
    kind: Kind = "number"
    about: str | None = None


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number behind it, by which rows are sorted; None where there is none."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows.

    Attributes:
        id: of its element.
        caption: what it is of.
        columns, rows: as many cells a row as there are columns.
        note: what was left out.
    """

    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str | None = None


def tasks(summary: BundleSummary, masks: Statistics | None) -> Table:
    """A row a task, in the bundle's order."""
    methods = {group.id: group.method for group in summary.groups}
    densities = {} if masks is None else masks.densities
    shown = summary.tasks
    columns = [
        Column("task", "name"),
        Column("method", "text"),
        Column("parameters"),
        Column("size", about="of its own files"),
        Column("bits", about="a coded parameter, its share of the shared vectors included"),
        Column("cosine", about="between the task vector and what the bundle makes of it"),
        Column("gain", about="how far along the task vector that goes: 1 is the whole way"),
        Column("score", about="what the packer’s own evaluation gave"),
        Column("density", about="the share of weights that its mask claims"),
        Column("whole", about="tensors that are stored whole"),
        Column("state", "text"),
    ]
    rows = [
        (
            Cell(task.name),
            Cell(methods[task.group]),
            Cell(count(task.parameters), task.parameters),
            Cell(readable(task.nbytes), task.nbytes),
            _number(task.bits, 2),
            _number(task.cosine, 4),
            _number(task.gain, 4),
            _number(task.score, 4),
            _percent(densities.get(task.name)),
            Cell(_NOTHING) if task.kinds is None else Cell(str(task.whole), task.whole),
            Cell(_state(task)),
        )
        for task in shown
    ]
    return _cut(_without_empty(Table("tasks", "The tasks of the bundle", tuple(columns), tuple(rows))))


def sizes(summary: BundleSummary) -> Table:
    """A row a part of the bundle."""
    rows = [
        (Cell(part.label), Cell(readable(part.nbytes), part.nbytes), _percent(part.nbytes / summary.nbytes))
        for part in parts_of(summary)
    ]
    columns = (Column("part", "name"), Column("size"), Column("share"))
    return Table("sizes", "What the bundle is made of", columns, tuple(rows))


def density(masks: Statistics, blocks: Sequence[MaskedBlock]) -> Table:
    """A row a block, a column a task; of many tasks, the smallest and the largest density."""
    each = len(masks.tasks) <= MOST_COLUMNS
    columns = [Column("block", "name"), Column("weights"), Column("all masks")]
    columns += [Column(task) for task in masks.tasks] if each else [Column("least"), Column("most")]
    rows = []
    for block in blocks:
        known = [value for value in block.densities if value is not None]
        values = block.densities if each else ((min(known), max(known)) if known else (None, None))
        rows.append(
            (
                Cell(block.block.label),
                Cell(count(block.numel), block.numel),
                _percent(block.density),
                *map(_percent, values),
            )
        )
    return _cut(Table("density", "The share of weights that masks claim, by block", tuple(columns), tuple(rows)))


def agreement(masks: Statistics) -> Table:
    """A row a number of masks."""
    last = len(masks.tasks)
    names = {1: "selfish", last: "universal", 0: "catastrophic"}
    rows = [
        (Cell(str(number), number), Cell(names.get(number, "")), Cell(f"{weights:,}", weights), _percent(share))
        for number, (weights, share) in enumerate(zip(masks.claimed_by, masks.profile, strict=True))
    ]
    columns = (Column("masks"), Column("called", "text"), Column("weights"), Column("share"))
    return _cut(Table("agreement", "Weights by how many masks claim them", columns, tuple(rows)))


def overlap(masks: Statistics) -> Table:
    """All beside all; of many tasks, the one that each has most in common with."""
    if len(masks.tasks) <= MOST_COLUMNS:
        columns = [Column("task", "name"), *(Column(task) for task in masks.tasks)]
        rows = [
            (Cell(task), *(Cell("") if other == place else _percent(share) for other, share in enumerate(row)))
            for place, (task, row) in enumerate(zip(masks.tasks, masks.similarity, strict=True))
        ]
        caption = "Of the weights that either of two masks claims, the share that both claim"
        return Table("overlap", caption, tuple(columns), tuple(rows))
    columns = [Column("task", "name"), Column("nearest task", "name"), Column("in common")]
    rows = [(Cell(task), *_nearest(masks, place)) for place, task in enumerate(masks.tasks)]
    caption = "The task that each has most in common with: of the weights that either claims, the share that both do"
    return _cut(Table("overlap", caption, tuple(columns), tuple(rows)))


def tensors(masks: Statistics) -> Table:
    """A row a tensor of the base: how its masks agree, or why they were not counted."""
    columns = (
        Column("tensor", "name"),
        Column("weights"),
        Column("density", about="over all masks"),
        Column("catastrophic", about="claimed by no mask"),
        Column("selfish", about="claimed by one mask"),
        Column("universal", about="claimed by all masks"),
        Column("not counted", "text"),
    )
    counted = [
        (
            Cell(tensor.name),
            Cell(f"{tensor.numel:,}", tensor.numel),
            _percent(sum(tensor.claimed) / sum(tensor.weights) if sum(tensor.weights) else None),
            *(_percent(tensor.profile[place]) for place in (0, 1, -1)),
            Cell(""),
        )
        for tensor in masks.tensors
    ]
    left_out = [
        (
            Cell(tensor.name),
            Cell(f"{tensor.numel:,}", tensor.numel),
            *(Cell(_NOTHING) for _ in range(4)),
            Cell(tensor.reason),
        )
        for tensor in masks.left_out
    ]
    table = Table("tensors", "The tensors of the base, and the masks over them", columns, (*counted, *left_out))
    return _cut(_without_empty(table))


def groups(summary: BundleSummary, vectors: Sequence[VectorStatistics]) -> Table:
    """A row a group and role of its vectors; a group that shares nothing, or is not here, has one too."""
    columns = (
        Column("group", "name"),
        Column("method", "text"),
        Column("tasks"),
        Column("size"),
        Column("vector", "text", "what it is for"),
        Column("dtype", "text"),
        Column("values"),
        Column("root mean square"),
        Column("largest", about="in magnitude"),
        Column("zeros"),
    )
    rows = []
    for group in summary.groups:
        own = [vector for vector in vectors if vector.group == group.id]
        roles: dict[tuple[Role, SharedDtype], list[VectorStatistics]] = {}
        for vector in own:
            roles.setdefault((vector.role, vector.dtype), []).append(vector)
        known = (
            Cell(group.id),
            Cell(method_of(group)),
            Cell(str(group.tasks), group.tasks),
            Cell(readable(group.nbytes), group.nbytes),
        )
        if not roles:
            rows.append((*known, *(Cell(_NOTHING) for _ in range(6))))
        rows += [(*known, Cell(role), Cell(DTYPES[dtype]), *_sums(members)) for (role, dtype), members in roles.items()]
    return _cut(
        _without_empty(Table("groups", "The groups, and the vectors that their tasks share", columns, tuple(rows)))
    )


def levels(vectors: Sequence[VectorStatistics]) -> Table:
    """A row a level that is in use."""
    rows = [
        (
            Cell(DTYPES[dtype]),
            Cell(f"{value:.4g}".replace("-", "−"), value),
            Cell(f"{number:,}", number),
            _percent(number / sum(counts)),
        )
        for dtype, counts in levels_of(vectors).items()
        for value, number in zip(LEVELS[dtype], counts, strict=True)
        if number
    ]
    columns = (
        Column("dtype", "text"),
        Column("level", about="before the row’s step; of floats, the power of two below the magnitude"),
        Column("values"),
        Column("share"),
    )
    return Table("levels", "How the codes of the shared vectors are used", columns, tuple(rows))


def magnitudes(blocks: Sequence[SharedBlock]) -> Table:
    """A row a block."""
    rows = [
        (Cell(block.block.label), Cell(count(block.numel), block.numel), Cell(f"{block.rms:.4g}", block.rms))
        for block in blocks
    ]
    columns = (Column("block", "name"), Column("values"), Column("root mean square"))
    return Table("magnitudes", "The shared vectors by block", columns, tuple(rows))


def method_of(group: GroupSummary) -> str:
    """A group's method with its parameters."""
    listed = ", ".join(
        f"{key.replace('_', ' ')} {_plain(value)}" for key, value in group.parameters.items() if value is not None
    )
    return f"{group.method} ({listed})" if listed else group.method


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _sums(vectors: Sequence[VectorStatistics]) -> tuple[Cell, ...]:
    numel = sum(vector.numel for vector in vectors)
    rms = (sum(vector.sum_of_squares for vector in vectors) / numel) ** 0.5 if numel else None
    largest, zeros = max(vector.largest for vector in vectors), sum(vector.zeros for vector in vectors)
    return (
        Cell(count(numel), numel),
        Cell(_NOTHING) if rms is None else Cell(f"{rms:.4g}", rms),
        Cell(f"{largest:.4g}", largest),
        _percent(zeros / numel if numel else None),
    )


def _nearest(masks: Statistics, place: int) -> tuple[Cell, Cell]:
    shares = [
        (share, -other) for other, share in enumerate(masks.similarity[place]) if other != place and share is not None
    ]
    if not shares:
        return Cell(_NOTHING), Cell(_NOTHING)
    share, other = max(shares)
    return Cell(masks.tasks[-other]), _percent(share)


def _state(task: TaskSummary) -> str:
    if not task.fetched:
        return "not fetched"
    return "" if task.unreadable is None else "too new"


def _number(value: float | None, digits: int) -> Cell:
    return Cell(_NOTHING) if value is None else Cell(f"{value:.{digits}f}", value)


def _percent(share: float | None) -> Cell:
    return Cell(_NOTHING) if share is None else Cell(f"{100 * share:.1f} %", share)


def _without_empty(table: Table) -> Table:
    """Columns that say nothing of any row are left out."""
    kept = [
        place
        for place in range(len(table.columns))
        if place == 0 or any(row[place].text not in {"", _NOTHING} for row in table.rows)
    ]
    columns = tuple(table.columns[place] for place in kept)
    return Table(
        table.id, table.caption, columns, tuple(tuple(row[place] for place in kept) for row in table.rows), table.note
    )


def _cut(table: Table) -> Table:
    more = len(table.rows) - MOST_ROWS
    if more <= 0:
        return table
    note = f"and {more:,} more; tallstore inspect and statistics, with --json, have all of them"
    return Table(table.id, table.caption, table.columns, table.rows[:MOST_ROWS], note)
