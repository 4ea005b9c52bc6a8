"""Plots of what a bundle's tasks cost, and of how true they are: a row a task, or, of many, how they are spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from tallstore.inspecting.summary import TaskSummary
from tallstore.reporting.drawing import Palette, Plot, label_ticks, shown
from tallstore.sizes import several

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS: Final = 40
"""Of more tasks, the spread is shown."""
_BINS: Final = 24
_ROUNDING: Final = 5e-4


@dataclass(frozen=True)
class _Measure:
    """One number a task; None where it has none."""

    label: str
    digits: int
    values: tuple[float | None, ...]

    @property
    def known(self) -> tuple[float, ...]:
        return tuple(value for value in self.values if value is not None)


def fidelity(tasks: Sequence[TaskSummary]) -> Plot | None:
    """Bits, cosine, gain where it is not one, the score where there is one; None where no task has any."""
    measures = (
        _Measure("bits a parameter", 2, tuple(task.bits for task in tasks)),
        _Measure("cosine", 4, tuple(task.cosine for task in tasks)),
        _Measure("gain", 4, tuple(task.gain for task in tasks)),
        _Measure("score", 4, tuple(task.score for task in tasks)),
    )
    known = [measure for measure in measures if measure.known]
    drawn = [measure for measure in known if measure.label != "gain" or not _is_one(measure)]
    if not drawn:
        return None
    spans = (
        f"{measure.label} {min(measure.known):.{measure.digits}f} to {max(measure.known):.{measure.digits}f}"
        for measure in known
    )
    told = f"Over {several(len(tasks), 'task')}: {'; '.join(spans)}."
    names = [shown(task.name) for task in tasks]

    def draw(figure: Figure, palette: Palette) -> None:
        panels = figure.subplots(1, len(drawn), sharey=len(tasks) <= MOST_ROWS, squeeze=False)[0]
        for axes, measure in zip(panels, drawn, strict=True):
            axes.set_title(measure.label)
            if len(tasks) <= MOST_ROWS:
                _draw_rows(axes, measure, palette)
            else:
                _draw_spread(axes, measure, palette)
        if len(tasks) <= MOST_ROWS:
            label_ticks(panels[0], "y", names)
            panels[0].tick_params(axis="y", labelcolor=palette.ink)
            panels[0].set_ylim(len(tasks) - 0.4, -0.6)
        else:
            panels[0].set_ylabel("tasks")

    height = 0.7 + 0.21 * len(tasks) if len(tasks) <= MOST_ROWS else 2.6
    return Plot("fidelity", "What a task costs, and how true it is", told, height, draw)


def _is_one(gain: _Measure) -> bool:
    """Whether every task's gain is one, as most methods make it: a panel of that says nothing."""
    return all(abs(value - 1) < _ROUNDING for value in gain.known)


def _draw_rows(axes: Axes, measure: _Measure, palette: Palette) -> None:
    rows = [row for row, value in enumerate(measure.values) if value is not None]
    axes.hlines(range(len(measure.values)), 0, 1, transform=axes.get_yaxis_transform(), color=palette.line, lw=0.7)
    axes.plot(measure.known, rows, "o", color=palette.first, markersize=5)
    axes.margins(x=0.12)
    axes.spines[["left"]].set_visible(False)
    _few_ticks(axes, measure)


def _draw_spread(axes: Axes, measure: _Measure, palette: Palette) -> None:
    axes.hist(measure.known, bins=_BINS, color=palette.first)
    axes.axvline(float(np.median(measure.known)), color=palette.second, lw=1.5)
    _few_ticks(axes, measure)


def _few_ticks(axes: Axes, measure: _Measure) -> None:
    """Ticks that do not run into each other: numbers as they are, without an offset; a lone one has room."""
    low, high = min(measure.known), max(measure.known)
    if high - low < 10.0**-measure.digits:
        axes.set_xlim(low - 5 * 10.0**-measure.digits, high + 5 * 10.0**-measure.digits)
    axes.locator_params(axis="x", nbins=3)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
