"""Signed masks over a shared magnitude: the default method.

The tasks share where and how far weights move; the signs are their own.

    v_t      = tau_t / rms(tau_t)                     a tensor (or a row) a task at unit root mean square
    merged   = mean over tasks of |v_t|               a magnitude, stored in four bits with a step a row
    mask_t   = sign(v_t) where |v_t| > threshold * merged (as stored), else 0; sign(v_t) where one task alone moved
    expert_t = base + gain_t * rms(tau_t) * mask_t * merged

Task vectors of different tasks are nearly orthogonal, so a shared sum carries the crosstalk of all of them; a shared
magnitude carries none, and its worth does not fade as tasks are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch

from tallstore.fit.base import Fit
from tallstore.fit.gain import WIDEST, Gain, check_choice, check_gain, check_number
from tallstore.fit.sides import exceeds
from tallstore.fit.tile import Coded, ScaleBy, Shared, Tile
from tallstore.format.manifest import Scalar, SharedDtype

_MEAN_MAGNITUDE = math.sqrt(2 / math.pi)  # of a normal distribution, in standard deviations
_FAR = 8.0  # times the gain of task vectors that have nothing to do with each other: these have


@dataclass(frozen=True)
class SignedMask:
    """Signed masks over the tasks' mean magnitude, gain one.

    Args:
        threshold: how many times the shared magnitude a weight must move to be kept; 0 keeps every sign, larger values
            give thinner masks and smaller bundles, up to about 3: where next to nothing exceeds it, every sign is kept
            instead. 1.2 costs about 1.1 bits a parameter a task.
        scale: whether each task's tensor is brought to unit root mean square as a whole ("tensor") or row by row
            ("row"), which costs a number a row.
        gain: "one" (see `tallstore.fit.gain`), "least-squares", or "published": the normalisation undone, and no more.
    """

    threshold: float = 1.2
    scale: ScaleBy = "tensor"
    gain: Gain = "one"

    name: ClassVar = "signed-mask"
    merged_dtype: ClassVar[SharedDtype] = "LOG4"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset({"LOG4", "I8", "F16", "BF16", "F32"})
    minimum_experts: ClassVar = 2

    def __post_init__(self) -> None:
        """Refuse what is outside the documented ranges."""
        check_number("SignedMask", "threshold", self.threshold, 1.2)
        check_choice("SignedMask", "scale", self.scale, get_args(ScaleBy))
        check_gain("SignedMask", self.gain)

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        return {"threshold": float(self.threshold), "scale": self.scale, "gain": self.gain}


@dataclass(frozen=True)
class SignedMaskFit(Fit):
    """A SignedMask at work. It needs nothing beyond a tile and its tensor's statistics."""

    method: SignedMask

    kind = "signed"
    roles = ("merged",)

    @property
    def widest(self) -> float:
        """By how much the threshold lets through of many independent, normally distributed task vectors."""
        if not self.method.threshold:
            return WIDEST
        kept = _MEAN_MAGNITUDE**2 * math.exp(-((_MEAN_MAGNITUDE * self.method.threshold) ** 2) / 2)  # <R, v> / <v, v>
        return min(WIDEST, _FAR / kept) if kept else WIDEST

    @property
    def fallback(self) -> SignedMaskFit | None:
        """Every sign: where next to no weight exceeds its threshold, as between two checkpoints of one run."""
        return SignedMaskFit(replace(self.method, threshold=0.0)) if self.method.threshold > 0 else None

    def merge(self, tile: Tile) -> Shared:
        """Mean magnitude of the tasks at unit root mean square."""
        total = torch.zeros_like(tile.task_vectors[0])
        for position in range(len(tile.tasks)):
            total += tile.at_unit(position, self.method.scale).abs_()
        return {"merged": total / len(tile.tasks)}

    def code(self, tile: Tile, position: int, shared: Shared) -> Coded:
        """Fields of the task at *position*: 0 absent, 1 plus, 2 minus."""
        merged = shared["merged"]
        # One task's own magnitude is no measure of it: nothing would exceed it.
        threshold = self.method.threshold if tile.shared_by > 1 else 0.0
        kept = exceeds(tile.at_unit(position, self.method.scale).abs_(), threshold * merged) & exceeds(merged, 0.0)
        # 1 for plus, 2 for minus: moved up by one where the task vector is negative.
        codes = kept << exceeds(0.0, tile.task_vectors[position])
        return Coded(codes, tile.scale_of(position, self.method.scale))
