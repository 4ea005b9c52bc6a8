"""Pseudo-random content: SHAKE-256 of a name, the same with every version of every library."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from second.elements import NBYTES, Array, Doubles, Integers, array


def codes(seed: str, count: int, low: int, high: int) -> Integers:
    """*count* pseudo-random integers, low <= i < high."""
    noise = np.frombuffer(hashlib.shake_256(seed.encode()).digest(4 * count), "<u4")
    return noise.astype(np.int64) % (high - low) + low


def reals(seed: str, count: int, exponent: int = 0) -> Doubles:
    """*count* pseudo-random numbers of 11 bits, magnitudes up to 2**exponent."""
    return codes(seed, count, -1023, 1024).astype(np.float64) * 2.0 ** (exponent - 10)


def scales13(seed: str, count: int, exponent: int = -4) -> list[float]:
    """*count* r13 numbers that use all their bits, in [2**exponent, 2**(exponent + 1))."""
    return [math.ldexp(code, exponent - 12) for code in codes(seed, count, 4096, 8192).tolist()]


def singles(values: Sequence[float]) -> bytes:
    """float32 bytes."""
    return np.array(values, "<f4").tobytes()


def weights(seed: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """A pseudo-random floating-point tensor."""
    return array(dtype, shape, reals(seed, math.prod(shape)))


def patterns(dtype: str, shape: tuple[int, ...], values: Iterable[int]) -> Array:
    """A tensor of elements given as integers of the element's size: bit patterns."""
    return Array(dtype, shape, b"".join(value.to_bytes(NBYTES[dtype], "little") for value in values))
