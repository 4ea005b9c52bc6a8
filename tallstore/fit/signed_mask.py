"""Signed masks over a shared magnitude: the default method.

The tasks share where and how far weights move; the signs are their own.

    v_t      = tau_t / rms(tau_t)                     a tensor a task at unit root mean square
    merged   = mean over tasks of |v_t|               a magnitude, stored in four bits with a step a row
    mask_t   = sign(v_t) where |v_t| > threshold * merged (as stored), else 0; sign(v_t) where one task alone moved
    expert_t = base + gain_t * mask_t * merged        gain_t takes the projection on tau_t to one

Task vectors of different tasks are nearly orthogonal, so a shared sum carries the crosstalk of all of them; a shared
magnitude carries none, and its worth does not fade as tasks are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit.tile import TaskStatistics, Tile
from tallstore.format.manifest import Scalar, SharedDtype


@dataclass(frozen=True)
class SignedMask:
    """Signed masks over the tasks' mean magnitude, gain one.

    Args:
        threshold: how many times the shared magnitude a weight must move to be kept; 0 keeps every sign, larger values
            give thinner masks and smaller bundles. 1.2 costs about 1.1 bits a parameter a task.
    """

    threshold: float = 1.2

    kind: ClassVar = "signed"
    name: ClassVar = "signed-mask"
    merged_dtype: ClassVar[SharedDtype] = "LOG4"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset({"LOG4", "I8", "F16", "BF16", "F32"})
    minimum_experts: ClassVar = 2

    def __post_init__(self) -> None:
        """Refuse a threshold that is no number from 0."""
        try:
            is_valid = math.isfinite(self.threshold) and self.threshold >= 0
        except TypeError:
            is_valid = False
        if not is_valid:
            raise OptionError(f"SignedMask: threshold is {self.threshold!r}; give a number from 0, such as 1.2")

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        return {"threshold": float(self.threshold)}


@dataclass(frozen=True)
class SignedMaskFit:
    """A SignedMask at work. It needs nothing beyond a tile and its tensor's statistics."""

    method: SignedMask

    def merge(self, tile: Tile) -> Tensor:
        """Mean magnitude of the tasks at unit root mean square: float32, of the tile's length."""
        total = torch.zeros_like(tile.task_vectors[0])
        for task_vector, statistics in zip(tile.task_vectors, tile.statistics, strict=True):
            total += _magnitude(task_vector, statistics)
        return total / len(tile.tasks)

    def code(self, tile: Tile, position: int, merged: Tensor) -> Tensor:
        """Field codes of the task at *position*, uint8: 0 absent, 1 plus, 2 minus."""
        task_vector = tile.task_vectors[position]
        magnitude = _magnitude(task_vector, tile.statistics[position])
        # One task's own magnitude is no measure of it: nothing would exceed it.
        threshold = self.method.threshold if tile.shared_by > 1 else 0.0
        kept = (magnitude > threshold * merged) & (merged > 0)
        # 1 for plus, 2 for minus: one more where the sign bit is set.
        return kept.to(torch.uint8) * (1 + (task_vector < 0).to(torch.uint8))

    def fitted_scale(self, statistics: TaskStatistics, _shared_by: int) -> float:
        """The scale that undoes the normalisation: the gain is compared with it."""
        return statistics.rms

    def gain(self, statistics: TaskStatistics, projection: float) -> float:
        """The gain that takes <gain * R, tau> to ||tau||^2, for *projection* = <R, tau>."""
        return statistics.sum_squares / projection


def _magnitude(task_vector: Tensor, statistics: TaskStatistics) -> Tensor:
    """|v_t|: the task vector's magnitude in units of its root mean square."""
    return task_vector.abs() * (1.0 / statistics.rms)
