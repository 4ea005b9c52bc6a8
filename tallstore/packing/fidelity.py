"""How near a reconstruction is to its expert: sums over tiles, and the two numbers that come of them.

    cosine = <R, tau> / (||R|| ||tau||)        gain = <R, tau> / ||tau||^2        R = reconstruction - base

What matters most is the gain: a reconstruction that falls short along the task vector behaves less like the expert than
one that is noisy across it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tallstore.fit import TaskStatistics, Tile, exceeds, select
from tallstore.format.manifest import Estimate

# What `SignedMask()` would do, for the estimate of it.
_THRESHOLD = 1.2
_SHARED_BITS = 4.0
_BLOCK_NUMEL = 1 << 9
_SMALLEST_DOT = 1e-24  # of any smaller one, products that float32 rounds to 0 may have been a part


def dot(first: Tensor, second: Tensor) -> float:
    """Inner product of two 1-D tensors: to about 8 digits, and the same on any number of threads.

    Products are float32, summed in blocks, and the blocks in float64. Where one is float64, or the numbers so small or
    so large that float32 could not hold their products, everything is. What is not finite stays so.
    """
    if first.dtype == second.dtype == torch.float32:
        products = first * second
        blocks = products[: products.numel() // _BLOCK_NUMEL * _BLOCK_NUMEL].view(-1, _BLOCK_NUMEL)
        rest = products[blocks.numel() :]
        found = blocks.sum(1).sum(dtype=torch.float64).item()
        if rest.numel():
            found += rest.sum(dtype=torch.float64).item()
        if _SMALLEST_DOT < abs(found) < math.inf:
            return found
    return torch.dot(first.double(), second.double()).item()


@dataclass(frozen=True)
class Sums:
    """<R, tau>, ||R||^2 and ||tau||^2 over any part of a model; they add up."""

    projection: float = 0.0
    reconstruction: float = 0.0
    task_vector: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        """Over both parts together."""
        return Sums(
            self.projection + other.projection,
            self.reconstruction + other.reconstruction,
            self.task_vector + other.task_vector,
        )

    def __mul__(self, factor: float) -> Sums:
        """Over a part *factor* times as large that is just like this one."""
        return Sums(self.projection * factor, self.reconstruction * factor, self.task_vector * factor)

    @property
    def cosine(self) -> float | None:
        """None where either side is zero."""
        norms = math.sqrt(self.reconstruction) * math.sqrt(self.task_vector)
        return self.projection / norms if norms else None

    @property
    def gain(self) -> float | None:
        """None where the task vector is zero."""
        return self.projection / self.task_vector if self.task_vector else None


@dataclass(frozen=True)
class Estimated:
    """What a fit would do to one tensor of one task, or to a share of it: the cosine there, and bits a parameter.

    Attributes:
        cosine, bits: there.
        numel, sum_squares: how much they stand for; of a share, a part of the tensor's.
    """

    cosine: float
    bits: float
    numel: float
    sum_squares: float


def sign_estimate(statistics: TaskStatistics) -> Estimated:
    """One sign bit a parameter and one scale a tensor, gain one: cosine = sum |tau| / (sqrt(n) ||tau||), exactly."""
    cosine = statistics.sum_magnitudes / math.sqrt(statistics.numel * statistics.sum_squares)
    return Estimated(cosine, 1.0, statistics.numel, statistics.sum_squares)


def signed_estimates(tile: Tile, share: float) -> list[Estimated]:
    """`SignedMask()` on a tile that stands for a *share* of its tensor, by task; bits are the entropy of the codes."""
    magnitudes = [
        vector.abs() / statistics.rms for vector, statistics in zip(tile.task_vectors, tile.statistics, strict=True)
    ]
    merged = torch.stack(magnitudes).mean(0)
    estimates = []
    limit = (_THRESHOLD if tile.shared_by > 1 else 0.0) * merged
    for magnitude, statistics in zip(magnitudes, tile.statistics, strict=True):
        chosen = exceeds(magnitude, limit)
        kept = select(chosen, merged)
        norm, energy = dot(kept, kept), dot(magnitude, magnitude)
        cosine = dot(kept, magnitude) / math.sqrt(norm * energy) if norm and energy else 0.0
        density = int(np.count_nonzero(chosen.numpy())) / chosen.numel()
        bits = _entropy(density) + density + _SHARED_BITS / len(tile.tasks)  # which, of which sign, and its magnitude
        estimates.append(Estimated(cosine, bits, share * statistics.numel, share * statistics.sum_squares))
    return estimates


def _entropy(density: float) -> float:
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p > 0)


def combine(estimates: Iterable[Estimated]) -> Estimate | None:
    """Over all tensors of a task, each at gain one: there ||R||^2 = ||tau||^2 / cosine^2. None where there is nothing.

    The sums are exact: the order of the estimates, which come from several threads, does not matter.
    """
    counted = [estimate for estimate in estimates if estimate.cosine > 0]
    if not counted:
        return None
    task_vector = math.fsum(estimate.sum_squares for estimate in counted)
    reconstruction = math.fsum(estimate.sum_squares / estimate.cosine**2 for estimate in counted)
    bits = math.fsum(estimate.bits * estimate.numel for estimate in counted)
    numel = math.fsum(estimate.numel for estimate in counted)
    return Estimate(cosine=_rounded(math.sqrt(task_vector / reconstruction)), bits=_rounded(bits / numel))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
