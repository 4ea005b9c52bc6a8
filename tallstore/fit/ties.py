"""TIES-Merging (arXiv 2306.01708): trim each task vector, elect a sign, add what agrees. Streamed.

    trim:    keep the largest 20 % of magnitudes of a task over ALL its parameters together, ties included
    elect:   gamma = sign(sum over tasks of the trimmed values)
    merge:   sum over tasks of the trimmed values whose sign is gamma  ("disjoint sum" of nik-dim/tall_masks d10af8b)

Where trimmed values cancel exactly the elected sign is 0 and nothing is merged, as the paper's formula has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from tallstore.fit.sides import select

KEPT = 0.2

# A float32 magnitude ordered as its bit pattern: 31 bits, counted in two passes of 16 and 15.
_LOW_BITS = 15


def trim_threshold(chunks: Callable[[], Iterable[Tensor]], kept: float = KEPT) -> float:
    """The smallest magnitude that the trim keeps, exactly, without the vector ever being in memory.

    It is the k-th smallest magnitude for k = d - int(d * kept) (1-based) of d parameters: what is at least as large
    stays.
    Two passes over *chunks*, each a histogram of 2^16 or 2^15 counts.

    Args:
        chunks: called once a pass; gives the task vector in pieces, float32 and finite, of any shape.
        kept: the share to keep.
    """
    high_counts = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
    for chunk in chunks():
        high_counts += torch.bincount(_pattern(chunk) >> _LOW_BITS, minlength=1 << 16)
    numel = int(high_counts.sum())
    if numel == 0:
        return 0.0
    rank = numel - int(numel * kept)
    cumulated = high_counts.cumsum(0)
    high = int(torch.searchsorted(cumulated, rank))
    rank -= int(cumulated[high - 1]) if high else 0

    low_counts = torch.zeros(1 << _LOW_BITS, dtype=torch.int64, device="cpu")
    for chunk in chunks():
        pattern = _pattern(chunk)
        # numpy finds the few that are meant several times faster.
        within = pattern.numpy()[(pattern >> _LOW_BITS).numpy() == high] & ((1 << _LOW_BITS) - 1)
        low_counts += torch.bincount(torch.from_numpy(within), minlength=1 << _LOW_BITS)
    low = int(torch.searchsorted(low_counts.cumsum(0), rank))
    return torch.tensor(high << _LOW_BITS | low, dtype=torch.int32, device="cpu").view(torch.float32).item()


def _pattern(chunk: Tensor) -> Tensor:
    return chunk.reshape(-1).abs().view(torch.int32)


def trimmed(task_vector: Tensor, threshold: float) -> Tensor:
    """The task vector with what the trim does not keep set to 0."""
    kept = np.greater_equal(task_vector.abs().numpy(), np.float32(threshold)).view(np.uint8)
    return select(torch.from_numpy(kept), task_vector)


def disjoint_sum(kept: list[Tensor]) -> Tensor:
    """The merged vector of trimmed task vectors: float32, of their length."""
    elected = torch.sign(_sum(kept))
    # Times the elected sign, what agrees is positive; what does not is cut off at 0.
    return _sum([(values * elected).clamp_min_(0.0) for values in kept]).mul_(elected)


def _sum(tensors: list[Tensor]) -> Tensor:
    """In the order of the tasks, so that the result is one and the same everywhere."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total += tensor
    return total
