"""r13 numbers: float32 with at most 13 significant bits, so that products with shared values are exact in float32.

A scale of 13 bits times an int8, bfloat16 or float16 value (7, 8 or 11 bits) needs at most 24 bits, which is what a
float32 holds: every machine gets the same product, with fused multiply-add or without (spec, NUM-1).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

SMALLEST = 2.0**-60
LARGEST = 2.0**60

# float64 keeps 52 fraction bits; 13 significant bits are one implicit and 12 stored ones.
_DROPPED = np.uint64(40)
_HALF_BELOW = np.uint64((1 << 39) - 1)
_ONE = np.uint64(1)
# Of float32: whole numbers are compared faster, and in the order of their magnitudes.
_MAGNITUDE, _NEGATIVE_ZERO = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
_SMALLEST, _LARGEST = np.array([SMALLEST, LARGEST], np.float32).view(np.uint32)


def r13(values: ArrayLike) -> NDArray[np.float32]:
    """Round finite float64 *values* to 13 significant bits, nearest even; a result of magnitude under 2^-60 becomes +0.

    Magnitudes above 2^60 are rounded like any other (infinity from 2^128 on): a writer must not store them, a reader
    refuses them (`in_range`).

    Returns:
        float32, of the shape of *values*. Exact below 2^128: 13 bits always fit.
    """
    wide = np.asarray(values, dtype=np.float64)
    pattern = wide.view(np.uint64)
    even = (pattern >> _DROPPED) & _ONE
    rounded = (((pattern + _HALF_BELOW + even) >> _DROPPED) << _DROPPED).view(np.float64)
    with np.errstate(over="ignore"):
        return np.where(np.abs(rounded) < SMALLEST, 0.0, rounded).astype(np.float32)


def in_range(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """True where a value is 0 or of magnitude in [2^-60, 2^60]; False for NaN and infinity."""
    magnitude = np.asarray(values, dtype=np.float32).view(np.uint32) & _MAGNITUDE
    return np.asarray(
        (magnitude == 0) | (magnitude - _SMALLEST <= _LARGEST - _SMALLEST)
    )  # what is smaller wraps around


def is_r13(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """True where a float32 is an r13 number: 13 significant bits, in range, and not -0.0."""
    pattern = np.asarray(values, dtype=np.float32).view(np.uint32)
    return np.asarray((pattern & np.uint32(0x7FF) == 0) & in_range(values) & (pattern != _NEGATIVE_ZERO))


def is_r13_number(value: float) -> bool:
    """As `is_r13`, of one number, which need not be a float32; takes a tenth of the time."""
    if value == 0:
        return math.copysign(1, value) > 0
    return SMALLEST <= abs(value) <= LARGEST and math.ldexp(math.frexp(value)[0], 13).is_integer()


def row_scales(gains: NDArray[np.float32], steps: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The scale of each row: the gain, or r13 of gain times step formed in float64 (spec, REC-4).

    Args:
        gains: float32 r13, of one element or one a row.
        steps: float32 r13, one a row, or None where the shared vector has no step.

    Returns:
        float32 r13 numbers, of the broadcast shape.
    """
    if steps is None:
        return gains
    return r13(gains.astype(np.float64) * steps.astype(np.float64))
