"""A slow reading of the algebra, one element at a time, in Python's own float64 and integers.

It shares no code with tallstore, and takes and gives bit patterns, so that -0.0, subnormals and NaN payloads are what
they are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Float(NamedTuple):
    """A binary floating-point format: bits in all, significant bits, exponent of the smallest subnormal."""

    nbits: int
    precision: int
    smallest: int

    @property
    def infinity(self) -> int:
        exponent_bits = self.nbits - self.precision
        return ((1 << exponent_bits) - 1) << (self.precision - 1)


FLOATS = {
    "F16": Float(16, 11, -24),
    "BF16": Float(16, 8, -133),
    "F32": Float(32, 24, -149),
    "F64": Float(64, 53, -1074),
}


def decode(pattern: int, dtype: str) -> float:
    """The number that a bit pattern stands for; exact."""
    if dtype == "BF16":
        return struct.unpack("<f", struct.pack("<I", pattern << 16))[0]
    letters = {"F16": "<He", "F32": "<If", "F64": "<Qd"}[dtype]
    return struct.unpack("<" + letters[2], struct.pack("<" + letters[1], pattern))[0]


def encode(x: float, dtype: str) -> int:
    """The bit pattern of *x* rounded once to nearest even; beyond the largest number, infinity."""
    nbits, precision, smallest = form = FLOATS[dtype]
    sign = int(math.copysign(1, x) < 0) << (nbits - 1)
    if math.isnan(x):
        return sign | form.infinity | 1 << (precision - 2)
    if math.isinf(x):
        return sign | form.infinity
    if x == 0:
        return sign
    mantissa, exponent = math.frexp(abs(x))
    quantum = max(exponent - precision, smallest)
    # |x| is `numerator` times 2 ** (exponent - 53), and `count` times 2 ** quantum once it is rounded.
    numerator, shift = int(math.ldexp(mantissa, 53)), quantum - (exponent - 53)
    count, rest = numerator >> shift, numerator & ((1 << shift) - 1)
    half = 1 << shift >> 1
    count += rest > half or (rest == half and shift > 0 and count & 1)
    # A count of 2 ** precision carries into the exponent's field by itself.
    field = quantum - smallest
    return sign | min((field << (precision - 1)) + count, form.infinity)


def rounded(x: float, dtype: str) -> float:
    """*x* rounded once to *dtype*."""
    return decode(encode(x, dtype), dtype)


def r13(x: float) -> float:
    """*x* rounded to 13 significant bits; what is then under 2^-60 is 0."""
    mantissa, exponent = math.frexp(x)
    result = math.ldexp(round(mantissa * 8192), exponent - 13)
    return result if abs(result) >= 2.0**-60 else 0.0


def log4(code: int) -> float:
    """The value of a log4 code."""
    return 2.0 ** -(code // 2) * (181 / 256 if code % 2 else 1)


class Side(NamedTuple):
    """What a task chose for one element: a value before its scale, and the vector whose steps are in that scale."""

    value: float
    role: str | None


def sides(
    kind: str,
    codes: Sequence[int],
    vectors: Mapping[str, Sequence[float]],
    own: Iterable[float] = (),
    levels: int | None = None,
) -> list[Side | None]:
    """The side of every element, None where it is absent: the table of section 8.

    Args:
        kind: of the tensor.
        codes: bits or fields.
        vectors: values of the shared vectors, by role.
        own: values of a sparse tensor.
        levels: of a uniform one.
    """
    following = iter(own)
    chosen: list[Side | None] = []
    for i, code in enumerate(codes):
        match kind, code:
            case ("mask" | "signed" | "sparse", 0):
                chosen.append(None)
            case ("mask" | "signed" | "two-level", 1):
                chosen.append(Side(vectors["merged"][i], "merged"))
            case ("signed", 2):
                chosen.append(Side(-vectors["merged"][i], "merged"))
            case ("two-level", 0):
                chosen.append(Side(vectors["merged_lo"][i], "merged_lo"))
            case ("sign", _):
                chosen.append(Side(1.0 if code else -1.0, None))
            case ("sparse", 1):
                chosen.append(Side(next(following), None))
            case ("uniform", _):
                chosen.append(Side(code - 1.0 if levels == 3 else code - (levels - 1) / 2, None))
            case _:
                raise AssertionError(f"{kind} has no code {code}")
    assert list(following) == []
    return chosen


def element(
    base: int, side: int, value: float, scale: float, *, centre: float | None = None, base_dtype: str, result_dtype: str
) -> int:
    """Bit pattern of one element of the expert.

    Args:
        base: the base's bit pattern.
        side: 1 plus, -1 minus, 0 absent.
        value: the shared vector's, before the step.
        scale: the row's.
        centre: of the element, its step included; None where there is none.
        base_dtype: of *base*.
        result_dtype: of the result.
    """
    # float64 holds the product of two float32 exactly, and their sum so well that rounding it again is as good as once.
    delta = rounded(scale * (side * value), "F32")
    if delta == 0:
        return base if result_dtype == base_dtype else encode(decode(base, base_dtype), result_dtype)
    wide = "F64" if base_dtype == "F64" else "F32"
    moved = decode(base, base_dtype)
    if centre is not None:
        moved = rounded(moved + centre, wide)
    return encode(rounded(moved + delta, wide), result_dtype)


def patterns(tensor: torch.Tensor) -> list[int]:
    """Bit patterns of a tensor's elements."""
    width = tensor.element_size()
    flat = tensor.detach().contiguous().view(-1).view(INTEGERS[width])
    return [pattern & ((1 << 8 * width) - 1) for pattern in flat.tolist()]


def from_patterns(elements: Sequence[int], dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor of those bit patterns."""
    width = dtype.itemsize
    raw = b"".join(pattern.to_bytes(width, "little") for pattern in elements)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(tuple(shape)) if raw else torch.empty(shape, dtype=dtype)


def rebuild(
    base: torch.Tensor,
    sides: Sequence[int],
    values: Sequence[float],
    scales: Sequence[float],
    dtype: torch.dtype | None = None,
    *,
    centre: Sequence[float] | None = None,
) -> torch.Tensor:
    """A whole tensor of the expert.

    Args:
        base: the base's.
        sides: an element each: 1, -1 or 0.
        values: an element each.
        scales: a row each, of equally many elements.
        dtype: of the result; None for the base's.
        centre: an element each, steps included; None for none.
    """
    dtype = dtype or base.dtype
    length = base.numel() // len(scales)
    dtypes = {"base_dtype": NAMES[base.dtype], "result_dtype": NAMES[dtype]}
    elements = [
        element(
            pattern,
            side,
            value,
            scales[position // length],
            centre=None if centre is None else centre[position],
            **dtypes,
        )
        for position, (pattern, side, value) in enumerate(zip(patterns(base), sides, values, strict=True))
    ]
    return from_patterns(elements, dtype, base.shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
