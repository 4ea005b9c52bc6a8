"""Bit patterns and numbers that are hard on arithmetic: what bases and shared vectors of tests are made of."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from tests import reference


def specials(dtype: torch.dtype) -> list[int]:
    """Zeros, the ends of the subnormal and normal numbers, infinities, NaNs with payloads; each with both signs."""
    form = reference.FLOATS[reference.NAMES[dtype]]
    fraction = 1 << (form.precision - 1)
    positive = [
        0,
        1,
        fraction - 1,
        fraction,
        form.infinity - 1,
        form.infinity,
        form.infinity + 1,
        form.infinity + fraction // 2,
    ]
    return [sign << (form.nbits - 1) | pattern for pattern in positive for sign in (0, 1)]


def base_patterns(random: np.random.Generator, dtype: torch.dtype, count: int) -> list[int]:
    """Bit patterns over the whole exponent range, specials in between."""
    drawn = random.integers(0, 1 << 8 * dtype.itemsize, count, dtype=np.uint64).tolist()
    return [
        special if random.random() < 0.3 else pattern
        for pattern, special in zip(drawn, itertools.cycle(specials(dtype)), strict=False)
    ]


def numbers_for(shared: str, random: np.random.Generator, base: torch.Tensor) -> np.ndarray:
    """Codes, or values near the base's own magnitudes, so that sums cancel, tie and overflow."""
    if shared == "LOG4":
        return random.integers(0, 16, base.numel())
    if shared == "I8":
        return random.integers(-127, 128, base.numel())
    near = np.nan_to_num(base.view(-1).double().numpy()) * random.choice([-1, 0.5, -0.99951171875, 0], base.numel())
    largest = 65504 if shared == "F16" else 2.0**127
    # A float16 has nothing under 2^-24, which stands for the 2^-60 of the wider ones here.
    smallest = 2.0**-24 if shared == "F16" else 2.0**-60
    return np.where(np.abs(near) < smallest, 0, np.clip(near, -largest, largest))
