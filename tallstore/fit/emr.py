"""EMR-Merging (arXiv 2405.17461): elect a sign, mask by it, rescale.

    merged   = gamma * max over the tasks that agree with gamma of |tau_t|,     gamma = sign(sum over tasks of tau_t)
    mask_t   = tau_t * merged > 0
    lambda_t = sum |tau_t| / sum |mask_t * merged|                              over all parameters of the task
    expert_t = base + lambda_t * mask_t * merged                                gain="published"

Where task vectors cancel exactly, no sign is elected and merged is 0, as in the paper's formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tallstore.fit.base import Fit
from tallstore.fit.gain import Gain, check_gain
from tallstore.fit.sides import exceeds, select
from tallstore.fit.tile import Coded, Shared, Tile
from tallstore.format.manifest import Scalar, SharedDtype

#: Streams the tiles of one tensor.
Tiles = Callable[[], Iterable[Tile]]
#: Maps a function over tensors: `map`, or an executor's.
Run = Callable[
    [Callable[[Tiles], dict[str, tuple[float, float]]], Iterable[Tiles]], Iterable[dict[str, tuple[float, float]]]
]


@dataclass(frozen=True)
class Emr:
    """EMR-Merging's elected vector and masks.

    Args:
        gain: "published" is the paper's rescaler, one number a task, which takes another pass over all task vectors;
            of all fits, this one alone was truer with it than with "one". "one" and "least-squares" scale a tensor.
    """

    gain: Gain = "published"

    name: ClassVar = "emr"
    merged_dtype: ClassVar[SharedDtype] = "I8"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset({"I8", "F16", "BF16", "F32"})
    minimum_experts: ClassVar = 2

    def __post_init__(self) -> None:
        """Refuse what is no gain."""
        check_gain("Emr", self.gain)

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        return {"gain": self.gain}


@dataclass(frozen=True)
class EmrFit(Fit):
    """An Emr at work.

    Attributes:
        rescalers: lambda_t by task; empty unless the gain is the published one.
    """

    method: Emr
    rescalers: Mapping[str, float] = field(default_factory=dict)

    kind = "mask"
    roles = ("merged",)

    @classmethod
    def prepare(cls, method: Emr, tensors: Iterable[Tiles], run: Run = map) -> EmrFit:
        """Sum up both sides of every task's rescaler, if they are asked for: one pass over *tensors*.

        Args:
            method: the method.
            tensors: for each tensor that will be coded, a function that streams its tiles.
            run: maps a function over them, as `map` does or as an executor's.
        """
        if method.gain != "published":
            return cls(method)
        task_vectors: dict[str, float] = {}
        masked: dict[str, float] = {}
        for by_task in run(functools.partial(_sides, cls(method)), tensors):
            for task, (own, agreeing) in by_task.items():
                task_vectors[task] = task_vectors.get(task, 0.0) + own
                masked[task] = masked.get(task, 0.0) + agreeing
        return cls(method, {task: task_vectors[task] / total for task, total in masked.items() if total})

    def chosen(self, task: str) -> Mapping[str, float]:
        """The task's rescaler, where it is the paper's."""
        return {"rescaler": self.rescalers[task]} if task in self.rescalers else {}

    def merge(self, tile: Tile) -> Shared:
        """The elected vector of a tile."""
        total = torch.zeros_like(tile.task_vectors[0])
        for vector in tile.task_vectors:
            total += vector
        elected = torch.sign(total)
        largest = torch.zeros_like(total)
        for vector in tile.task_vectors:
            torch.maximum(largest, vector * elected, out=largest)
        return {"merged": largest * elected}

    def code(self, tile: Tile, position: int, shared: Shared) -> Coded:
        """Mask of the task at *position*, as 0 and 1."""
        agrees = _agrees(tile.task_vectors[position], shared["merged"])
        return Coded(agrees, self.rescalers.get(tile.tasks[position], 1.0))


def _sides(fit: EmrFit, tiles: Tiles) -> dict[str, tuple[float, float]]:
    """By task, sum |tau_t| and sum |mask_t * merged| over one tensor."""
    sides: dict[str, tuple[float, float]] = {}
    for tile in tiles():
        if not tile.tasks:
            continue
        merged = fit.merge(tile)["merged"]
        for task, vector in zip(tile.tasks, tile.task_vectors, strict=True):
            agreeing = select(_agrees(vector, merged), merged)
            own, masked = sides.get(task, (0.0, 0.0))
            sides[task] = (own + _sum_magnitudes(vector), masked + _sum_magnitudes(agreeing))
    return sides


def _sum_magnitudes(vector: Tensor) -> float:
    return vector.abs().sum(dtype=torch.float64).item()


def _agrees(vector: Tensor, merged: Tensor) -> Tensor:
    """1 where both have one sign: uint8. Signs are multiplied, not numbers: a product of small ones is 0."""
    return exceeds(torch.sign(vector).mul_(torch.sign(merged)), 0.0)
