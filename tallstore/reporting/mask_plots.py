"""Plots of what the masks of a bundle have in common: densities by block, the agreement profile, overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tallstore.inspecting.statistics import Statistics
from tallstore.reporting.blocks import MaskedBlock
from tallstore.reporting.drawing import FONT, Palette, Plot, heat, label_ticks, shown, shown_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED: Final = 40
"""Rows of more tasks bear no names, and are ordered so that alike ones are neighbours."""
MOST_ROWS: Final = 400
"""More tasks are not drawn."""
MOST_VALUES: Final = 16
"""Of so many rows and columns, values are written into their cells."""
_MOST_COLUMN_LABELS: Final = 28
_LONGEST_COLUMN_LABEL: Final = 24
_NEAREST: Final = 0.8  # what is paler than any cell is at most this share of the strongest: noise stays pale
_MOST_BARS: Final = 12  # that bear their share
_MOST_AS_ONE: Final = 6  # numbers of masks that are one class
_STRENGTHS: Final = (0.4, 0.7, 1.0)


def order_of(masks: Statistics) -> tuple[int, ...]:
    """The positions of the tasks as rows are drawn: the bundle's own order while they are few, then by likeness.

    Alike are masks that have more in common than chance would give masks of their densities. Those, and the groups of
    them that have most in common on average, are put side by side, until all are one.
    """
    count = min(len(masks.tasks), MOST_ROWS)
    if count <= MOST_NAMED:
        return tuple(range(count))
    common = np.array([row[:count] for row in masks.overlap[:count]], np.float64)
    claimed = np.maximum(common.diagonal(), 1.0)
    likeness = common / np.outer(claimed, claimed)
    np.fill_diagonal(likeness, -1.0)
    groups: list[list[int]] = [[place] for place in range(count)]
    for _ in range(count - 1):
        one, other = sorted(divmod(int(likeness.argmax()), count))
        sizes = len(groups[one]), len(groups[other])
        joined = (sizes[0] * likeness[one] + sizes[1] * likeness[other]) / sum(sizes)
        joined[likeness[one] < 0] = -1.0
        joined[[one, other]] = -1.0
        likeness[one, :] = likeness[:, one] = joined
        likeness[other, :] = likeness[:, other] = -1.0
        groups[one] += groups[other]
    return tuple(groups[0])


def density(masks: Statistics, blocks: Sequence[MaskedBlock]) -> Plot:
    """A row a task, a column a block."""
    order = order_of(masks)
    values = _matrix([block.densities for block in blocks]).T[list(order)]
    low, high = _span(values)
    told = (
        f"The share of weights that each of {len(order)} masks claims in each of {len(blocks)} blocks of the model:"
        f" {100 * low:.1f} % to {100 * high:.1f} %."
    )
    names = [shown(masks.tasks[place]) for place in order]
    labels = [shown_tensor(block.block.label, _LONGEST_COLUMN_LABEL) for block in blocks]

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        _draw_matrix(figure, axes, values, "share of weights claimed")
        _label_tasks(axes, names, palette)
        label_ticks(axes, "x", labels, _MOST_COLUMN_LABELS)
        if max(values.shape) <= MOST_VALUES:
            _write_values(axes, values)
        axes.tick_params(axis="x", rotation=55)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")

    longest = max(map(len, labels))
    height = 1.0 + 0.055 * longest + _rows_height(len(order))
    return Plot("density", "Density of the masks by task and block", told, height, draw)


def overlap(masks: Statistics) -> Plot | None:
    """What each two masks have in common; None of a single one, or where none claims anything."""
    order = order_of(masks)
    if len(order) < 2 or not any(map(any, masks.overlap)):
        return None
    values = _matrix(masks.similarity)[np.ix_(order, order)]
    np.fill_diagonal(values, np.nan)
    low, high = _span(values)
    told = (
        f"Of the weights that either of two masks claims, the share that both claim, for {len(order)} tasks:"
        f" {100 * low:.1f} % to {100 * high:.1f} %."
    )
    names = [f"{shown(masks.tasks[place])}  {row + 1}" for row, place in enumerate(order)]

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        _draw_matrix(figure, axes, values, "share of weights in common")
        _label_tasks(axes, names, palette)
        if len(order) <= MOST_NAMED:
            label_ticks(axes, "x", [str(row + 1) for row in range(len(order))])
        else:
            axes.set_xticks([])
        if len(order) <= MOST_VALUES:
            _write_values(axes, values)

    return Plot("overlap", "What each two masks have in common", told, 1.1 + _rows_height(len(order), 0.27), draw)


def profile(masks: Statistics, blocks: Sequence[MaskedBlock]) -> Plot:
    """How many weights are claimed by 0, 1, …, N masks: of all, and block by block."""
    shares = [share or 0.0 for share in masks.profile]
    names = {0: "no mask (catastrophic)", 1: "one (selfish)", len(masks.tasks): f"all {len(masks.tasks)} (universal)"}
    told = "; ".join(f"claimed by {name}: {100 * shares[count]:.1f} %" for count, name in sorted(names.items()))

    def draw(figure: Figure, palette: Palette) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _draw_profile(left, shares, palette)
        _draw_by_block(right, blocks, len(masks.tasks), palette)

    return Plot("agreement", "How many masks claim a weight", f"Of all weights, {told}.", 3.7, draw)


@dataclass(frozen=True)
class Claimed:
    """Weights that are alike in how many masks claim them.

    Attributes:
        label: what they are called.
        first, last: by how many masks they are claimed.
        colour: the palette's.
        strength: of that colour.
    """

    label: str
    first: int
    last: int
    colour: str
    strength: float = 1.0


def classes(tasks: int) -> tuple[Claimed, ...]:
    """Weights by how many of *tasks* masks claim them: none, one, several (of many tasks, in three classes), all."""
    none = Claimed("none", 0, 0, "third")
    if tasks == 1:
        return none, Claimed("the mask", 1, 1, "second")
    between = range(2, tasks)
    cuts = [2, tasks] if len(between) < _MOST_AS_ONE else [2, 2 + tasks // 4, 2 + tasks // 2, tasks]
    several = [
        Claimed(f"{first}" if first + 1 == end else f"{first} to {end - 1}", first, end - 1, "first", strength)
        for (first, end), strength in zip(pairwise(cuts), _STRENGTHS[-len(cuts) + 1 :], strict=True)
        if end > first
    ]
    return none, Claimed("one", 1, 1, "second"), *several, Claimed(f"all {tasks}", tasks, tasks, "fourth")


def _draw_profile(axes: Axes, shares: Sequence[float], palette: Palette) -> None:
    count = len(shares)
    if count > _MOST_BARS:  # the rest of the axis would be empty
        count = max(place for place, share in enumerate(shares) if share) + 1
    colours = {
        number: (getattr(palette, each.colour), each.strength)
        for each in classes(len(shares) - 1)
        for number in range(each.first, each.last + 1)
    }
    heights, width = [100 * share for share in shares[:count]], 0.8 if count < 60 else 1.0
    axes.bar(range(count), heights, width, color=palette.background)  # lines behind do not shine through
    bars = axes.bar(range(count), heights, width, color=[colours[number] for number in range(count)])
    if count <= _MOST_BARS:
        axes.bar_label(bars, [f"{100 * share:.1f}" for share in shares], padding=2, size=8)
        axes.set_xticks(range(count))
    else:
        axes.locator_params(axis="x", integer=True)
    axes.set_title("% of all weights")
    axes.set_xlabel("masks that claim a weight")
    axes.grid(axis="y", lw=0.6)
    axes.spines[["left"]].set_visible(False)


def _draw_by_block(axes: Axes, blocks: Sequence[MaskedBlock], tasks: int, palette: Palette) -> None:
    bottom = np.zeros(len(blocks))
    for each in classes(tasks):
        heights = [100 * sum(block.claimed_by[each.first : each.last + 1]) / block.numel for block in blocks]
        colour = (getattr(palette, each.colour), each.strength)
        axes.bar(range(len(blocks)), heights, bottom=bottom, width=0.86, color=colour, label=each.label)
        bottom += heights
    axes.set_title("% of the weights of each block")
    axes.set_xlabel("blocks, in the order of the model")
    axes.set_xticks([])
    axes.set_ylim(0, 100)
    axes.margins(x=0.01)
    axes.spines[["left"]].set_visible(False)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=6, handlelength=1, handleheight=1, columnspacing=1
    )


def _draw_matrix(figure: Figure, axes: Axes, values: NDArray[np.float64], label: str) -> None:
    low, high = _span(values)
    low = min(low, _NEAREST * high)
    axes.imshow(heat(values, low, high), interpolation="none", aspect="auto", origin="upper")
    axes.spines[["left", "bottom"]].set_visible(False)
    _draw_legend(figure, axes, (low, high), label)


def _write_values(axes: Axes, values: NDArray[np.float64]) -> None:
    """Percents into the cells that have a value."""
    for (row, column), share in np.ndenumerate(values):
        if not np.isnan(share):
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", size=8.5)


def _draw_legend(figure: Figure, axes: Axes, span: tuple[float, float], label: str) -> None:
    """A strip of the cells' colours, from the smallest value to the largest."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415 - an extra
    from matplotlib.colors import ListedColormap, Normalize  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    low, high = span
    if high == low:
        figure.supxlabel(f"{label}: {100 * low:.1f} % everywhere", size=FONT, x=0.5)
        return
    colours = ListedColormap(heat(np.linspace(0.0, 1.0, 64)[None], 0.0, 1.0)[0] / 255)
    strip = figure.colorbar(
        ScalarMappable(Normalize(100 * low, 100 * high), colours),
        ax=axes,
        location="top",
        shrink=0.4,
        aspect=28,
        anchor=(0.0, 0.0),
        pad=0.02,
        label=f"{label}, %",
    )
    strip.outline.set_visible(False)
    strip.locator = MaxNLocator(5)
    strip.update_ticks()


def _label_tasks(axes: Axes, names: Sequence[str], palette: Palette) -> None:
    if len(names) <= MOST_NAMED:
        label_ticks(axes, "y", list(names))
        axes.tick_params(axis="y", labelcolor=palette.ink)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(names)} tasks, alike ones together")


def _rows_height(rows: int, each: float = 0.22) -> float:
    return max(0.6, each * rows) if rows <= MOST_NAMED else 5.5


def _span(values: NDArray[np.float64]) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def _matrix(rows: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], np.float64)
