"""Bits to weights: the algebra of the specification, tile by tile on the CPU.

Results are the same on every machine and under every setting of torch: products and sums are separate operations of the
width that the specification names, and flushing of subnormal numbers is off while they run.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.format import bits
from tallstore.format.bits import Bytes
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import LOG4_VALUES, SIGNED_VALUES
from tallstore.format.manifest import SharedDtype

_TILE_NUMEL: Final = 1 << 18  # what fits the caches, and makes the cost of a call small
_SERIAL_NUMEL: Final = 1 << 15  # torch works on that many elements without its other threads
_ALIGNED: Final = 8  # elements of 1, 2 and 4 bits begin a byte there
_VIEWS: Final = {"I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_INTEGERS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALLEST_NORMAL: Final = sys.float_info.min


@dataclass(frozen=True, slots=True)
class CodedChunk:
    """The decoded bytes of one chunk of a coded tensor.

    Attributes:
        sides: the task's bits (*width* 1) or signed fields (2).
        width: bits an element of *sides*.
        values: the shared vector's.
        dtype: of *values*.
    """

    sides: Bytes
    width: Literal[1, 2]
    values: Bytes
    dtype: SharedDtype


@dataclass(frozen=True, slots=True)
class RowScales:
    """The scales of a tensor's rows.

    Attributes:
        scales: float32, one for the whole tensor or one a row.
        row_length: elements of a row.
    """

    scales: NDArray[np.float32]
    row_length: int

    def multiply(self, elements: Tensor, start: int) -> None:
        """Multiply *elements*, those from *start* on of the flat tensor, by their rows' scales, in place."""
        if self.scales.size == 1:
            elements.mul_(float(self.scales[0]))
            return
        done = 0
        while done < elements.numel():
            row, inside = divmod(start + done, self.row_length)
            left = elements.numel() - done
            whole = 0 if inside else left // self.row_length
            if whole:
                rows = elements[done : done + whole * self.row_length].view(whole, self.row_length)
                rows.mul_(_tensor(self.scales[row : row + whole]).view(whole, 1))
                done += whole * self.row_length
            else:  # a row's end at the beginning, a row's beginning at the end
                part = min(left, self.row_length - inside)
                elements[done : done + part].mul_(float(self.scales[row]))
                done += part


def rebuild(destination: Tensor, base: Tensor, coded: CodedChunk, scales: RowScales, start: int) -> None:
    """Write elements [start, start + n) of a coded tensor, which lie in one chunk, to *destination*.

    Cost: a few tiles of scratch memory; the elements are read and written once.

    Args:
        destination: [n], of the result's dtype.
        base: [n], float16, bfloat16, float32 or float64; read only.
        coded: of the chunk that the elements lie in.
        scales: of the tensor's rows.
        start: of the flat tensor.
    """
    offset = start % CHUNK_NUMEL
    with _ieee_arithmetic(base.numel()) as tile_numel:
        for first in range(0, base.numel(), tile_numel):
            last = min(first + tile_numel, base.numel())
            delta = _signed_values(coded, offset + first, offset + last)
            scales.multiply(delta, start + first)
            _add(destination[first:last], base[first:last], delta)


def copy_cast(destination: Tensor, source: Tensor) -> None:
    """Write *source* to *destination*, both [n]: bit for bit in one dtype, else rounded once, to nearest even."""
    if destination.dtype == source.dtype:
        destination.copy_(source)
        return
    with _ieee_arithmetic(source.numel()) as tile_numel:
        for first in range(0, source.numel(), tile_numel):
            destination[first : first + tile_numel].copy_(_cast(source[first : first + tile_numel], destination.dtype))


def _signed_values(coded: CodedChunk, first: int, last: int) -> Tensor:
    """The chosen side's value of elements [first, last) of the chunk, 0 where it is absent: float32, in new memory."""
    numel = last - first
    begin = first // _ALIGNED * _ALIGNED
    sides = coded.sides[begin * coded.width // 8 :]
    if coded.width == 1:
        chosen = np.unpackbits(sides[: bits.packed_nbytes(last - begin, 1)], count=last - begin, bitorder="little")
    else:
        chosen = bits.look_up(sides, last - begin, 2, SIGNED_VALUES, np.dtype(np.int8))
    if coded.dtype == "LOG4":
        looked_up = bits.look_up(coded.values[begin // 2 :], last - begin, 4, LOG4_VALUES, np.dtype(np.float32))
        values = _tensor(looked_up[first - begin :])
    else:
        width = _VIEWS[coded.dtype].itemsize
        values = _tensor(coded.values[first * width : last * width]).view(_VIEWS[coded.dtype])
    product = torch.empty(numel, dtype=torch.float32, device="cpu")
    return torch.mul(values, _tensor(chosen[first - begin :]), out=product)  # by 0, 1 or -1: exact


def _add(destination: Tensor, base: Tensor, delta: Tensor) -> None:
    """Write base + delta, rounded to float32 (float64 over a float64 base) and cast; the base where delta is 0."""
    if destination.dtype == torch.promote_types(base.dtype, torch.float32):
        total = torch.add(base, delta, out=destination)
    else:
        total = torch.add(base, delta)
        destination.copy_(_cast(total, destination.dtype))
    if _zeros_may_count(base, total):
        kept = delta == 0
        torch.where(kept, _cast(base, destination.dtype), destination, out=destination)


def _zeros_may_count(base: Tensor, total: Tensor) -> bool:
    """Whether adding +0.0 may have changed bits: it makes -0.0 positive, and NaNs quiet.

    Both are rare, and selecting elements costs several times what adding does. -0.0 is the smallest of the integers
    that have the elements' bits; a sum over a NaN is NaN.
    """
    patterns = base.view(_INTEGERS[base.element_size()])
    return bool(patterns.amin() == torch.iinfo(patterns.dtype).min) or not math.isfinite(total.sum().item())


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


def _tensor(array: NDArray[np.generic]) -> Tensor:
    """*array* as a tensor: in the same memory, unless it is read-only, which torch does not know."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@contextlib.contextmanager
def _ieee_arithmetic(numel: int) -> Iterator[int]:
    """A block in which subnormal numbers count, whatever `torch.set_flush_denormal` said; gives the size of its tiles.

    The setting is the thread's own, but torch's other threads inherit it when they are started, and nothing reaches it
    there again: tiles are then small enough for this thread to do them alone.
    """
    flushes = _SMALLEST_NORMAL * 0.5 == 0.0
    if flushes:
        torch.set_flush_denormal(False)
    try:
        yield _SERIAL_NUMEL if numel > _SERIAL_NUMEL and _other_threads_flush() else _TILE_NUMEL
    finally:
        if flushes:
            torch.set_flush_denormal(True)


def _other_threads_flush() -> bool:
    probe, subnormal = _probe()
    return not bool(torch.mul(probe, 0.5)[subnormal].all())


@cache
def _probe() -> tuple[Tensor, Tensor]:
    """A tile of float32 whose halves are subnormal here and there, in the share of every thread; and where."""
    tile = torch.ones(_TILE_NUMEL, dtype=torch.float32, device="cpu")
    places = torch.arange(0, _TILE_NUMEL, _SERIAL_NUMEL // 8, device="cpu")
    tile[places] = torch.finfo(torch.float32).tiny
    return tile, places
