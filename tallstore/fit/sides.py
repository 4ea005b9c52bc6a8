"""What codes stand for, by kind: the side that each element chose, at scale one (the specification, section 8).

torch selects and compares element by element, with a branch each; what is here works on several at a time.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tallstore.fit.tile import Coded, Shared

Kind = Literal["mask", "signed", "two-level", "sign", "sparse", "uniform"]
Levels = Literal[3, 4, 8, 16]


def exceeds(values: Tensor | float, limits: Tensor | float) -> Tensor:
    """1 where *values*, float32, are greater than *limits*, and 0 elsewhere: uint8. One of them is a tensor."""
    first, second = (given.numpy() if isinstance(given, Tensor) else np.float32(given) for given in (values, limits))
    return torch.from_numpy(np.greater(first, second).view(np.uint8))


def nonzero(values: Tensor) -> Tensor:
    """1 where *values*, float32, are neither +0.0 nor -0.0, and 0 elsewhere: uint8."""
    return torch.from_numpy(np.not_equal(values.numpy(), np.float32(0)).view(np.uint8))


def select(bits: Tensor, values: Tensor) -> Tensor:
    """*values*, float32, where *bits*, uint8, are 1; +0.0 where they are 0, whatever the values are there."""
    every_bit = bits.view(torch.int8).neg().to(torch.int32)
    return torch.bitwise_and(every_bit, values.view(torch.int32), out=every_bit).view(torch.float32)


def side_values(kind: Kind, coded: Coded, shared: Shared, levels: Levels | None = None) -> Tensor:
    """The chosen side's value at scale one, 0 where it is absent: float32, of the length of the codes.

    Args:
        kind: of the codes.
        coded: a task's codes, and its own values if it is sparse.
        shared: the shared vectors there, as stored.
        levels: of `uniform`.
    """
    codes = coded.codes
    if kind == "mask":
        return select(codes, shared["merged"])
    if kind == "signed":
        # As readers do it. Shared magnitudes are near 1 and scales at most 2^60: nothing here is infinite.
        signs = (codes & 1).view(torch.int8) - (codes >> 1).view(torch.int8)
        return signs.float().mul_(shared["merged"])
    if kind == "two-level":
        return select(codes, shared["merged"]).add_(select(1 - codes, shared["merged_lo"]))
    if kind == "sign":
        return codes.float() * 2 - 1
    if kind == "sparse":
        sides = torch.zeros(codes.numel(), dtype=torch.float32, device="cpu")
        if coded.values is not None:
            sides[codes != 0] = coded.values
        return sides
    return codes.float() - (1.0 if levels == 3 else ((levels or 0) - 1) / 2)


def present(kind: Kind, coded: Coded, levels: Levels | None = None) -> Tensor | None:
    """Where a side is present, and a centre is added with it; None for everywhere."""
    if kind in ("sign", "two-level"):
        return None
    if kind == "uniform":
        return None if levels != 3 else coded.codes != 1
    return coded.codes != 0
