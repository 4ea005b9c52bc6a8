"""What fits work on: a tile, the same rows of one tensor of every task that has them; and what they make of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tallstore.format.manifest import Role

#: Shared vectors over one range, by role: float32, 1-D. Before they are stored, or as a reader sees them at gain one.
Shared = Mapping[Role, Tensor]
#: What is brought to unit root mean square, and has a scale of its own.
ScaleBy = Literal["tensor", "row"]
#: Below it a scale could not be stored (NUM-1).
SMALLEST_RMS = 2.0**-60


@dataclass(frozen=True, eq=False)
class TaskStatistics:
    """Sums over one task's vector in one whole tensor.

    Attributes:
        numel: elements.
        row_sum_squares: of the task vector, float64 [rows].
        row_sum_magnitudes: of the task vector, float64 [rows].
    """

    numel: int
    row_sum_squares: Tensor
    row_sum_magnitudes: Tensor

    @classmethod
    def of(cls, task_vector: Tensor, rows: int = 1) -> TaskStatistics:
        """Of a whole task vector, float32, of *rows* rows."""
        by_row = task_vector.reshape(rows, -1)
        return cls(task_vector.numel(), *row_sums(by_row))

    @cached_property
    def sum_squares(self) -> float:
        """Of the whole task vector."""
        return float(self.row_sum_squares.sum())

    @cached_property
    def sum_magnitudes(self) -> float:
        """Of the whole task vector."""
        return float(self.row_sum_magnitudes.sum())

    @property
    def rms(self) -> float:
        """Root mean square of the task vector."""
        return math.sqrt(self.sum_squares / self.numel)

    @property
    def mean_magnitude(self) -> float:
        """Of the task vector."""
        return self.sum_magnitudes / self.numel

    @cached_property
    def row_rms(self) -> Tensor:
        """Root mean square of each row: float32 [rows]."""
        return (self.row_sum_squares / (self.numel // len(self.row_sum_squares))).sqrt().float()

    @property
    def unit(self) -> float:
        """What takes the task vector to unit root mean square; 0 where that is too small to be undone."""
        return 1 / self.rms if self.rms > SMALLEST_RMS else 0.0

    @cached_property
    def row_unit(self) -> Tensor:
        """`unit` of each row: float32 [rows]."""
        return torch.where(self.row_rms > SMALLEST_RMS, 1 / self.row_rms, 0.0)

    @cached_property
    def row_mean_magnitude(self) -> Tensor:
        """Mean magnitude of each row: float32 [rows]."""
        return (self.row_sum_magnitudes / (self.numel // len(self.row_sum_magnitudes))).float()


def row_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares and sum of magnitudes of each row of a float32 [rows, length]: float64 [rows]."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square_(), rows.abs().sum(dim=1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Tile:
    """Task vectors of the tasks that cover one range of a tensor: whole rows of it, or a piece of one row.

    Attributes:
        tasks: the tasks' names.
        task_vectors: finetuned - base, 1-D float32, of equal length, in the order of *tasks*.
        statistics: of each task's whole tensor, in the order of *tasks*.
        shared_by: how many tasks share the vectors here: as many as there are, unless the tile is of one of them.
        first_row, rows: which rows of the tensor; *rows* is 1 for a piece.
        is_whole: the rows are whole.
        tensor: the base's name for it.
        shape: of the base's tensor.
        start: the tile's first element in the flat tensor.
        given: somebody else's merged vector here, where there is one: 1-D float32.
    """

    tasks: tuple[str, ...]
    task_vectors: tuple[Tensor, ...]
    statistics: tuple[TaskStatistics, ...]
    shared_by: int
    first_row: int = 0
    rows: int = 1
    is_whole: bool = True
    tensor: str = ""
    shape: tuple[int, ...] = ()
    start: int = 0
    given: Tensor | None = None

    def by_row(self, elements: Tensor) -> Tensor:
        """*elements*, 1-D of the tile's length, as [rows, length]; no copy."""
        return elements.view(self.rows, -1)

    def of_rows(self, numbers: Tensor) -> Tensor:
        """The tile's part of *numbers*, one for each row of the tensor."""
        return numbers[self.first_row : self.first_row + self.rows]

    def at_unit(self, position: int, scale: ScaleBy) -> Tensor:
        """The task vector at *position* with its tensor or its rows at unit root mean square: 1-D float32, a copy."""
        statistics = self.statistics[position]
        if scale == "tensor":
            return self.task_vectors[position] * statistics.unit
        return (self.by_row(self.task_vectors[position]) * self.of_rows(statistics.row_unit)[:, None]).view(-1)

    def scale_of(self, position: int, scale: ScaleBy) -> float | Tensor:
        """What undoes `at_unit`: one number for the tensor, or float32 [rows]."""
        statistics = self.statistics[position]
        return statistics.rms if scale == "tensor" else self.of_rows(statistics.row_rms)


def centre(tile: Tile) -> Tensor:
    """Mean of the tile's task vectors: float32, of its length."""
    total = torch.zeros_like(tile.task_vectors[0])
    for vector in tile.task_vectors:
        total += vector
    return total / len(tile.tasks)


@dataclass(frozen=True, eq=False)
class Coded:
    """What a fit makes of one task in one tile.

    Attributes:
        codes: uint8, of the tile's length: bits, or fields, of the fit's kind.
        scale: the fit's own scale, before the gain: one number for the tensor, or float32 [rows] for those of the tile.
        values: of the set bits of a `sparse` tensor, at scale one: float32, 1-D.
    """

    codes: Tensor
    scale: float | Tensor
    values: Tensor | None = None
