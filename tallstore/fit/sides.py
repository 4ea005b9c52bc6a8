"""What codes stand for, by kind: the side that each element chose, at scale one (the specification, section 8)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tallstore.fit.tile import Coded, Shared

Kind = Literal["mask", "signed", "two-level", "sign", "sparse", "uniform"]
Levels = Literal[3, 4, 8, 16]


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
        return torch.where(codes == 0, 0.0, shared["merged"])
    if kind == "signed":
        merged = shared["merged"]
        return torch.where(codes == 0, 0.0, torch.where(codes == 1, merged, -merged))
    if kind == "two-level":
        return torch.where(codes == 0, shared["merged_lo"], shared["merged"])
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
