"""Plots of the vectors that tasks share: how their codes are used, and how large their values are in each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from tallstore.format.manifest import SharedDtype
from tallstore.inspecting.shared_vectors import LEVELS, VectorStatistics
from tallstore.reporting.blocks import SharedBlock
from tallstore.reporting.drawing import Palette, Plot, label_ticks, shown_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DTYPES: Final[Mapping[SharedDtype, str]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I8": "int8",
    "LOG4": "log4",
}
_LABELS: Final[Mapping[SharedDtype, str]] = {
    "LOG4": "magnitude, as a share of the row's largest",
    "I8": "code, in steps of its row",
    **dict.fromkeys(("F16", "BF16", "F32"), "magnitude, from a power of two to the next"),
}
_MOST_LABELS: Final = 18


def levels_of(vectors: Sequence[VectorStatistics]) -> Mapping[SharedDtype, tuple[int, ...]]:
    """How many values have each level, by dtype."""
    found: dict[SharedDtype, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
    for vector in vectors:
        counts = np.array(vector.counts, np.int64)
        found[vector.dtype] = found.get(vector.dtype, np.zeros_like(counts)) + counts
    return {dtype: tuple(counts.tolist()) for dtype, counts in found.items()}


def shared(vectors: Sequence[VectorStatistics], blocks: Sequence[SharedBlock]) -> Plot | None:
    """Levels, a panel a dtype, and the root mean square by block; None where nothing is shared."""
    if not blocks:
        return None
    levels = levels_of(vectors)
    smallest, largest = min(block.rms for block in blocks), max(block.rms for block in blocks)
    dtypes = " and ".join(DTYPES[dtype] for dtype in levels)
    told = (
        f"Shared vectors in {dtypes}; their root mean square is {smallest:.4g} to {largest:.4g} over"
        f" {len(blocks)} blocks of the model."
    )

    def draw(figure: Figure, palette: Palette) -> None:
        *panels, last = figure.subplots(1, len(levels) + 1)
        for axes, (dtype, counts) in zip(panels, levels.items(), strict=True):
            _draw_levels(axes, dtype, counts, palette)
        _draw_blocks(last, blocks, palette)

    return Plot("shared", "The values of the shared vectors", told, 3.4, draw)


def _draw_levels(axes: Axes, dtype: SharedDtype, counts: Sequence[int], palette: Palette) -> None:
    used = np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1])) if used.size else (0, 0)
    if dtype == "LOG4":
        first, last = 0, len(counts) - 1
    total = max(1, sum(counts))
    heights = [100 * count / total for count in counts[first : last + 1]]
    axes.bar(range(len(heights)), heights, width=0.86 if len(heights) < 60 else 1.0, color=palette.first)
    axes.set_title(f"% of {DTYPES[dtype]} values")
    axes.set_xlabel(_LABELS[dtype])
    labels = [_level(dtype, LEVELS[dtype][place]) for place in range(first, last + 1)]
    label_ticks(axes, "x", labels, 6)
    axes.grid(axis="y", lw=0.6)
    axes.spines[["left"]].set_visible(False)


def _level(dtype: SharedDtype, value: float) -> str:
    if dtype == "I8":
        return f"{value:.0f}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def _draw_blocks(axes: Axes, blocks: Sequence[SharedBlock], palette: Palette) -> None:
    rows = range(len(blocks))
    axes.barh(rows, [block.rms for block in blocks], color=palette.first, height=0.7 if len(blocks) < 40 else 1.0)
    axes.set_ylim(len(blocks) - 0.4, -0.6)
    axes.set_title("root mean square by block")
    label_ticks(axes, "y", [shown_tensor(block.block.label) for block in blocks], _MOST_LABELS)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", lw=0.6)
    axes.spines[["left", "bottom"]].set_visible(False)
