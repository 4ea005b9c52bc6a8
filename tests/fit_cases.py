"""Tiles for tests of the fits: task vectors, and any range of them as packing cuts it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tallstore.fit import Coded, Fit, Inputs, Method, Shared, TaskStatistics, Tile, prepare, side_values

TASKS = ("a", "b", "c", "d", "e", "f")


def task_vectors(*scales: float, numel: int = 5000, seed: int = 1) -> list[Tensor]:
    """Normally distributed task vectors of those root mean squares."""
    random = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(numel, generator=random) for scale in scales]


def tile(
    vectors: Sequence[Tensor],
    start: int = 0,
    stop: int | None = None,
    *,
    rows: int = 1,
    only: int | None = None,
    given: Tensor | None = None,
) -> Tile:
    """Elements [start, stop) of tasks whose whole vectors have *rows* rows; or of the one at *only*."""
    taken = range(len(vectors)) if only is None else [only]
    stop = vectors[0].numel() if stop is None else min(stop, vectors[0].numel())
    length = vectors[0].numel() // rows
    whole = start % length == 0 and (stop - start) % length == 0
    return Tile(
        tasks=tuple(TASKS[position] for position in taken),
        task_vectors=tuple(vectors[position][start:stop] for position in taken),
        statistics=tuple(TaskStatistics.of(vectors[position], rows) for position in taken),
        shared_by=len(vectors),
        first_row=start // length,
        rows=(stop - start) // length if whole else 1,
        is_whole=whole,
        tensor="w",
        shape=(rows, length),
        start=start,
        given=None if given is None else given[start:stop],
    )


def prepared(method: Method, vectors: Sequence[Tensor], *, rows: int = 1, pieces: int = 700) -> Fit:
    """The method at work on one tensor, which is streamed in *pieces*."""
    streams = {
        task: lambda vector=vector: (vector[start : start + pieces] for start in range(0, vector.numel(), pieces))
        for task, vector in zip(TASKS, vectors, strict=False)
    }
    return prepare(method, Inputs(streams, [lambda: [tile(vectors, rows=rows)]]))


def rebuilt(fit: Fit, coded: Coded, shared: Shared, rows: int = 1) -> Tensor:
    """What a task gets at gain one, without the centre: float64."""
    sides = side_values(fit.kind, coded, shared, fit.levels).double()
    if isinstance(coded.scale, Tensor):
        return (sides.view(rows, -1) * coded.scale.double()[:, None]).view(-1)
    return sides * coded.scale
