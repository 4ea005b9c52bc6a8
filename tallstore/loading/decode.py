"""Sides to weights: the algebra of the specification, tile by tile on the CPU.

Results are the same on every machine and under every setting of torch: products and sums are separate operations of the
width that the specification names, and flushing of subnormal numbers is off while they run.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.loading.scratch import scratch
from tallstore.loading.sides import SharedChunk, Sides, Tile, as_float32, delta
from tallstore.loading.subnormals import subnormals_count

_TILE_NUMEL: Final = 1 << 19  # near enough to the caches, and few calls: between any two, threads wait for each other
_SERIAL_NUMEL: Final = 1 << 15  # torch works on that many elements without its other threads
_PROCESS: Final = os.getpid()


def rebuild(destination: Tensor, base: Tensor, sides: Sides, centre: SharedChunk | None, start: int) -> None:
    """Write elements [start, start + n) of a coded tensor, which lie in one chunk, to *destination*.

    Cost: a few tiles of scratch memory, which the thread keeps; the elements are read and written once.

    Args:
        destination: [n], of the result's dtype; not in the memory of *base*.
        base: [n], float16, bfloat16, float32 or float64; read only.
        sides: of the chunk that the elements lie in.
        centre: of that chunk; None where the tensor has none.
        start: of the flat tensor.
    """
    offset = start % CHUNK_NUMEL
    with _ieee_arithmetic(base.numel()) as tile_numel:
        for first in range(0, base.numel(), tile_numel):
            last = min(first + tile_numel, base.numel())
            place = (offset + first, offset + last, start + first)
            here, before = _part(destination, first, last), _part(base, first, last)
            simple = centre is None and sides.keep_zeros and base.dtype != torch.float64
            if not simple or not _add(here, before, sides.tile(*place), start + first):
                moved = None if centre is None else centre.everywhere(*place)
                _add_selected(here, before, delta(sides.tile(*place), start + first), moved)


def deltas(sides: Sides, start: int, stop: int) -> Tensor:
    """What is added to elements [start, stop) of a coded tensor, which lie in one chunk: float32 [stop - start]."""
    found = torch.empty(stop - start, dtype=torch.float32, device="cpu")
    offset = start % CHUNK_NUMEL
    with _ieee_arithmetic(found.numel()) as tile_numel:
        for first in range(0, found.numel(), tile_numel):
            last = min(first + tile_numel, found.numel())
            found[first:last] = delta(sides.tile(offset + first, offset + last, start + first), start + first)
    return found


def _part(elements: Tensor, first: int, last: int) -> Tensor:
    """Elements [first, last): the tensor itself where that is all of it, since every operation has its price."""
    return elements if last - first == elements.numel() else elements[first:last]


def copy_cast(destination: Tensor, source: Tensor) -> None:
    """Write *source* to *destination*, both [n]: bit for bit in one dtype, else rounded once, to nearest even."""
    if destination.dtype == source.dtype:
        destination.copy_(source)
        return
    with _ieee_arithmetic(source.numel()) as tile_numel:
        for first in range(0, source.numel(), tile_numel):
            destination[first : first + tile_numel].copy_(_cast(source[first : first + tile_numel], destination.dtype))


def _add(destination: Tensor, base: Tensor, tile: Tile, start: int) -> bool:
    """Write base + delta; False where the base has something that no sum keeps, and must be selected.

    Zeros of the deltas are negative and keep every number of the base as it is, but not every NaN.
    """
    direct = destination.dtype == torch.float32
    if base.dtype != torch.float32:
        base = as_float32(base, "total")  # faster than a sum of two dtypes; the sum may then take its place
    total = destination if direct else scratch.tensor("total", base.numel(), torch.float32)
    torch.add(base, delta(tile, start), out=total)
    if not math.isfinite(total.sum().item()):
        return False
    if not direct:
        destination.copy_(total)
    return True


def _add_selected(destination: Tensor, base: Tensor, delta: Tensor, centre: Tensor | None) -> None:
    """Write base + centre + delta, and the base alone where delta is 0.

    Each sum is rounded to float32, over a float64 base to float64; the last one is cast.
    """
    kept = delta == 0
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    moved = wide if centre is None else wide + centre
    total = _cast(moved + delta, destination.dtype)
    torch.where(kept, _cast(base, destination.dtype), total, out=destination)


def _cast(elements: Tensor, dtype: torch.dtype) -> Tensor:
    """*elements* in *dtype*, rounded once to nearest even; *elements* themselves where that is their dtype."""
    if elements.dtype == torch.float64 and dtype.is_floating_point and dtype.itemsize < 4:
        elements = _rounded_to_odd(elements)  # torch goes by way of float32, and would round twice
    return elements.to(dtype)


def _rounded_to_odd(elements: Tensor) -> Tensor:
    """float64 *elements* as float32, inexact ones with their last bit set: no later rounding takes one for a tie."""
    single = elements.to(torch.float32)
    nearest = single.to(torch.float64)
    pattern = single.view(torch.int32)
    moves = (nearest != elements) & ~elements.isnan() & (pattern & 1 == 0)
    outward = nearest.abs() > elements.abs()
    pattern += moves.to(torch.int32) * (1 - 2 * outward.to(torch.int32))
    return single


@contextlib.contextmanager
def _ieee_arithmetic(numel: int) -> Iterator[int]:
    """A block in which subnormal numbers count, whatever `torch.set_flush_denormal` said; gives the size of its tiles.

    The setting is the thread's own, but torch's other threads inherit it when they are started, and nothing reaches it
    there again: tiles are then small enough for this thread to do them alone.
    """
    with subnormals_count(), np.errstate(over="ignore"):  # to infinity, as in torch
        serial = numel <= _SERIAL_NUMEL or torch.get_num_threads() == 1
        yield _TILE_NUMEL if serial or not _other_threads_flush() else _SERIAL_NUMEL


def _other_threads_flush() -> bool:
    if os.getpid() != _PROCESS:  # they stayed with the parent: torch would wait for them for ever
        return True
    probe, subnormal = _probe()
    return not bool(torch.mul(probe, 0.5)[subnormal].all())


@cache
def _probe() -> tuple[Tensor, Tensor]:
    """A tile of float32 whose halves are subnormal here and there, in the share of every thread; and where."""
    tile = torch.ones(_TILE_NUMEL, dtype=torch.float32, device="cpu")
    places = torch.arange(0, _TILE_NUMEL, _SERIAL_NUMEL // 8, device="cpu")
    tile[places] = torch.finfo(torch.float32).tiny
    return tile, places


def _work_alone() -> None:
    """Where torch's threads have begun, a forked process has none of them: one does, as in DataLoader's workers."""
    if _probe.cache_info().currsize:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_work_alone)
