"""TALL-masks (arXiv 2405.07813): one merged vector, and a bit a parameter a task that says where it serves the task.

    merged = sum over tasks of tau_t   (or their TIES merge, or their mean)
    mask_t = |tau_t| > mask_lambda * |merged - tau_t|          equation 4, strict as in the authors' code
    expert_t = base + gain_t * mask_t * merged

Masks are computed from the merged vector as stored; where that is zero they are cleared. The authors use gain 1; scaled
so that its projection on tau_t is one, the same form keeps far more of the expert (`gain="one"`, the default).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit.ties import disjoint_sum, trim_threshold
from tallstore.fit.tile import TaskStatistics, Tile
from tallstore.format.manifest import Scalar, SharedDtype

Merge = Literal["sum", "ties", "mean"]
Gain = Literal["one", "published"]
#: Maps a function over tasks: `map`, or an executor's.
Run = Callable[
    [Callable[[Callable[[], Iterable[Tensor]]], float], Iterable[Callable[[], Iterable[Tensor]]]], Iterable[float]
]
PUBLISHED_GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class TallMask:
    """{0, 1} masks over a merged vector.

    Args:
        mask_lambda: larger values give thinner masks. A sequence (the paper's grid is 0.2, 0.3, 0.4, 0.5, 0.6) needs
            `pack(evaluate=…)`, which chooses the best for each task, the smaller on a tie.
        merge: how task vectors become the merged vector: "sum", "ties" (the largest 20 % a task, disjoint sum) or
            "mean".
        gain: "one" scales each tensor's reconstruction so that its projection on the task vector is one; "published"
            is 1.
    """

    mask_lambda: float | Sequence[float] = 1.0
    merge: Merge = "sum"
    gain: Gain = "one"

    kind: ClassVar = "mask"
    name: ClassVar = "tall-mask"
    merged_dtype: ClassVar[SharedDtype] = "I8"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset({"I8", "F16", "BF16", "F32"})
    minimum_experts: ClassVar = 2

    @classmethod
    def published(cls) -> TallMask:
        """The paper's own: TIES merge, mask_lambda 0.4, gain 1."""
        return cls(mask_lambda=0.4, merge="ties", gain="published")

    def __post_init__(self) -> None:
        """Refuse what is outside the documented ranges."""
        try:
            values = self.lambdas
        except (TypeError, ValueError):
            values = ()
        if not values or not all(math.isfinite(value) and value >= 0 for value in values):
            raise OptionError(f"TallMask: mask_lambda is {self.mask_lambda!r}; give a number from 0, such as 1.0")
        for option, value, known in (("merge", self.merge, get_args(Merge)), ("gain", self.gain, get_args(Gain))):
            if value not in known:
                raise OptionError(f"TallMask: {option} is {value!r}; give one of {', '.join(map(repr, known))}")

    @property
    def lambdas(self) -> tuple[float, ...]:
        """The candidates for mask_lambda, ascending; one where there is nothing to choose."""
        given = self.mask_lambda
        return tuple(sorted(map(float, given))) if isinstance(given, Iterable) else (float(given),)

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        recorded: Scalar | list[Scalar] = self.lambdas[0]
        if isinstance(self.mask_lambda, Iterable):
            recorded = list(self.lambdas)
        return {"mask_lambda": recorded, "merge": self.merge, "gain": self.gain}


@dataclass(frozen=True)
class TallMaskFit:
    """A TallMask at work on one set of tasks.

    Attributes:
        lambdas: mask_lambda by task.
        thresholds: the smallest magnitude that TIES' trim keeps, by task; empty for other merges.
    """

    method: TallMask
    lambdas: Mapping[str, float]
    thresholds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        method: TallMask,
        chunks: Mapping[str, Callable[[], Iterable[Tensor]]],
        lambdas: Mapping[str, float],
        run: Run = map,
    ) -> TallMaskFit:
        """Do what needs all of a task's parameters: for TIES, two passes over every task vector.

        Args:
            method: the method.
            chunks: by task, a function that streams its whole task vector.
            lambdas: by task.
            run: maps a function over the tasks, as `map` does or as an executor's.
        """
        if method.merge != "ties":
            return cls(method, lambdas)
        return cls(method, lambdas, dict(zip(chunks, run(trim_threshold, chunks.values()), strict=True)))

    def with_lambdas(self, lambdas: Mapping[str, float]) -> TallMaskFit:
        """The same fit at other lambdas."""
        return replace(self, lambdas=lambdas)

    def merge(self, tile: Tile) -> Tensor:
        """The merged vector of a tile: float32, of its length."""
        if self.method.merge == "ties":
            return disjoint_sum(tile.task_vectors, (self.thresholds[task] for task in tile.tasks))
        total = torch.zeros_like(tile.task_vectors[0])
        for task_vector in tile.task_vectors:
            total += task_vector
        return total / len(tile.tasks) if self.method.merge == "mean" else total

    def code(self, tile: Tile, position: int, merged: Tensor) -> Tensor:
        """Mask of the task at *position* as uint8 of 0 and 1, from *merged* as stored."""
        task_vector = tile.task_vectors[position]
        limit = self.lambdas[tile.tasks[position]] * (merged - task_vector).abs()
        return ((task_vector.abs() > limit) & (merged != 0)).to(torch.uint8)

    def fitted_scale(self, _statistics: TaskStatistics, shared_by: int) -> float:
        """The scale that the rule itself gives: 1; a mean that is scaled back is that of *shared_by* task vectors."""
        return float(shared_by) if self.method.merge == "mean" and self.method.gain == "one" else 1.0

    def gain(self, statistics: TaskStatistics, projection: float) -> float:
        """1 as published; or what takes <gain * R, tau> to ||tau||^2, for *projection* = <R, tau>."""
        return 1.0 if self.method.gain == "published" else statistics.sum_squares / projection
