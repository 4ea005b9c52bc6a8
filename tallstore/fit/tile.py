"""A tile: the same rows of one tensor, of every task that has them. The unit that fits work on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TaskStatistics:
    """Sums over one task's vector in one whole tensor, in float64.

    Attributes:
        numel: elements.
        sum_squares: of the task vector.
        sum_magnitudes: of the task vector.
    """

    numel: int
    sum_squares: float
    sum_magnitudes: float

    @property
    def rms(self) -> float:
        """Root mean square of the task vector."""
        return math.sqrt(self.sum_squares / self.numel)


@dataclass(frozen=True)
class Tile:
    """Task vectors of the tasks that cover one range of a tensor.

    Attributes:
        tasks: the tasks' names.
        task_vectors: finetuned - base, 1-D float32, of equal length, in the order of *tasks*.
        statistics: of each task's whole tensor, in the order of *tasks*.
        shared_by: how many tasks share the merged vector here: as many as there are, unless the tile is of one of them.
    """

    tasks: tuple[str, ...]
    task_vectors: tuple[Tensor, ...]
    statistics: tuple[TaskStatistics, ...]
    shared_by: int
