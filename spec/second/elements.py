"""Tensors as bytes: casts, r13, LOG4, packed fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]
Doubles = NDArray[np.float64]
Singles = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

CHUNK = 1 << 20

NBYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32", "F64")
NBITS = {"bits": 1, "2-bit fields": 2, "4-bit fields": 4, "LOG4": 4} | {name: 8 * n for name, n in NBYTES.items()}


@dataclass(frozen=True)
class Array:
    """A tensor: *raw* is its elements, row-major and little-endian."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def rows(self, count: int) -> Array:
        """Its first *count* rows, along the first dimension."""
        shape = (count, *self.shape[1:])
        return Array(self.dtype, shape, self.raw[: math.prod(shape) * NBYTES[self.dtype]])


def array(dtype: str, shape: tuple[int, ...], values: Floats) -> Array:
    """A floating-point tensor of *values*, each cast to *dtype*."""
    return Array(dtype, shape, cast(values, dtype))


def wide(tensor: Array) -> Floats:
    """Its elements as numbers: float64 for F64, float32 for the narrower ones. Exact."""
    if tensor.dtype == "F64":
        return np.frombuffer(tensor.raw, "<f8")
    if tensor.dtype == "BF16":
        return (np.frombuffer(tensor.raw, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(tensor.raw, {"F16": "<f2", "F32": "<f4"}[tensor.dtype]).astype(np.float32)


def cast(values: Floats, dtype: str) -> bytes:
    """*values* (float32 or float64) rounded once to *dtype*, to nearest even; beyond its range to infinity (REC-6)."""
    if dtype == "BF16":
        return bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def bfloat16(values: Floats) -> bytes:
    """Round to bfloat16, by integers.

    A float64 goes to float32 by rounding to odd first: an inexact result gets its last bit set, so that the second
    rounding cannot take it for a tie. Two roundings to nearest would be wrong.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    pattern = single.view(np.uint32).copy()
    inexact = (single != values) & ~np.isnan(values)
    even = inexact & (pattern & 1 == 0)
    pattern[even & (np.abs(single) > np.abs(values))] -= np.uint32(1)
    pattern[even & (np.abs(single) < np.abs(values))] += np.uint32(1)
    rounded = (pattern + np.uint32(0x7FFF) + ((pattern >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (pattern >> 16) | 0x40, rounded).astype("<u2").tobytes()


def r13(x: float) -> float:
    """*x* rounded to 13 significant bits, to nearest even; what is then smaller than 2^-60 is 0 (NUM-1)."""
    mantissa, exponent = math.frexp(x)  # 0.5 <= |mantissa| < 1, and Python's round() is to even
    rounded = math.ldexp(round(mantissa * 8192), exponent - 13)
    if abs(rounded) > 2.0**60:
        raise ValueError(f"{x} is above 2^60 [NUM-3]")
    return rounded if abs(rounded) >= 2.0**-60 else 0.0


def log4(codes: Integers) -> Singles:
    """Values of LOG4 codes 0..15, before the step: 2^(-k/2), with 181/256 for the square root of 1/2."""
    return np.array([(181 / 256 if k % 2 else 1.0) * 2.0 ** -(k // 2) for k in codes.tolist()], np.float32)


def pack(codes: Integers, width: int) -> bytes:
    """Fields of *width* bits, element i at bit i * width of the little-endian whole; pad bits are zero."""
    per_byte = 8 // width
    padded = np.zeros(-(-codes.size // per_byte) * per_byte, np.int64)
    padded[: codes.size] = codes
    shifts = np.arange(per_byte) * width
    packed: bytes = (padded.reshape(-1, per_byte) << shifts).sum(axis=1).astype(np.uint8).tobytes()
    return packed
