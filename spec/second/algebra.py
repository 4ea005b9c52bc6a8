"""The algebra: an expert from its base (REC-1 to REC-7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from second.elements import NBYTES, Array, Integers, Singles, array, cast, r13, wide


def row_count(shape: tuple[int, ...], row_axes: int) -> int:
    """Rows of a tensor (REC-7)."""
    return 1 if len(shape) <= 1 else math.prod(shape[:row_axes])


def row_scales(gains: Sequence[float], steps: Sequence[float] | None, rows: int) -> list[float]:
    """One scale a row, from one gain or a gain a row, and a step a row or none (REC-4)."""
    each = gains if len(gains) == rows else [gains[0]] * rows
    return list(each) if steps is None else [r13(gain * step) for gain, step in zip(each, steps, strict=True)]


def reconstruct(base: Array, side: Integers, merged: Singles, scales: Sequence[float], dtype: str) -> Array:
    """The expert's tensor.

    Args:
        base: the base's, F16, BF16, F32 or F64.
        side: an element each: 0 absent, 1 plus, -1 minus.
        merged: the shared vector before its steps.
        scales: one a row.
        dtype: of the result.
    """
    scale = np.repeat(np.array(scales, np.float32), base.count // len(scales))
    with np.errstate(over="ignore", invalid="ignore"):
        delta = scale * (side.astype(np.float32) * merged)  # float32 times float32, rounded once
        number = wide(base)
        total = number + delta.astype(number.dtype)  # float64 for an F64 base, float32 for the others
    moved = (side != 0) & (delta != 0)
    width = NBYTES[dtype]
    kept = np.frombuffer(recast(base, dtype).raw, np.uint8).reshape(-1, width)
    summed = np.frombuffer(cast(total, dtype), np.uint8).reshape(-1, width)
    return Array(dtype, base.shape, np.where(moved[:, None], summed, kept).tobytes())


def recast(tensor: Array, dtype: str) -> Array:
    """*tensor* in *dtype*: bit for bit where that is its own (REC-1), else each element cast."""
    return tensor if dtype == tensor.dtype else array(dtype, tensor.shape, wide(tensor))
