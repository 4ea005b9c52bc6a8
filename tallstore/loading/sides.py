"""Bits and fields to what is added to the base: the sides that a task chose, scaled, tile by tile on the CPU.

One class a way of choosing; all give float32 tiles, in which 0 stands for a side that is absent. They count on the
caller that flushing of subnormal numbers is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.format import bits
from tallstore.format.bits import Bytes
from tallstore.format.encodings import LOG4_VALUES, SIGNED_VALUES
from tallstore.format.manifest import SharedDtype

_ALIGNED: Final = 8  # elements of 1, 2 and 4 bits begin a byte there
_FLOAT32: Final = np.dtype(np.float32)
_VIEWS: Final = {"I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


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


class Sides(Protocol):
    """What a task chose for the elements of one chunk of a tensor."""

    def delta(self, first: int, last: int, start: int) -> Tensor:
        """Scale times value of elements [first, last) of the chunk, rounded to float32; 0 where the side is absent.

        Args:
            first: in the chunk.
            last: behind the last element, in the chunk.
            start: where *first* is in the flat tensor.

        Returns:
            float32 [last - first], in new memory.
        """


@dataclass(frozen=True, slots=True)
class SharedChunk:
    """One chunk of a shared vector, and what its values are multiplied by.

    Attributes:
        values: the decoded bytes.
        dtype: of *values*.
        scales: of the tensor's rows.
    """

    values: Bytes
    dtype: SharedDtype
    scales: RowScales

    def tile(self, first: int, last: int, start: int) -> Tensor:
        """Scale times value, everywhere; arguments and result as for `Sides.delta`."""
        elements = self._unscaled(first, last)
        self.scales.multiply(elements, start)
        return elements

    def chosen(self, signs: NDArray[Any], first: int, last: int, start: int) -> Tensor:
        """Scale times sign times value; *signs* are 0, 1 or -1, in integers; the rest as for `Sides.delta`."""
        if self.dtype == "I8":  # codes have no -128: one byte holds every product
            chosen = np.multiply(self.values[first:last].view(np.int8), signs.view(np.int8))
            elements = _tensor(chosen).to(torch.float32)
        else:
            elements = self._unscaled(first, last)
            np.multiply(elements.numpy(), signs, out=elements.numpy())  # exact
        self.scales.multiply(elements, start)
        return elements

    def _unscaled(self, first: int, last: int) -> Tensor:
        """float32, in new memory."""
        if self.dtype == "LOG4":
            return _tensor(_looked_up(self.values, first, last, 4, LOG4_VALUES))
        width = _VIEWS[self.dtype].itemsize
        stored = _tensor(self.values[first * width : last * width]).view(_VIEWS[self.dtype])
        return torch.empty(last - first, dtype=torch.float32, device="cpu").copy_(stored)


@dataclass(frozen=True, slots=True)
class MaskSides:
    """Merged where a bit is set."""

    bits: Bytes
    merged: SharedChunk

    def delta(self, first: int, last: int, start: int) -> Tensor:
        """As `Sides.delta`."""
        return self.merged.chosen(_unpacked(self.bits, first, last), first, last, start)


@dataclass(frozen=True, slots=True)
class SignedSides:
    """Merged, plus or minus or not at all, by 2-bit fields."""

    fields: Bytes
    merged: SharedChunk

    def delta(self, first: int, last: int, start: int) -> Tensor:
        """As `Sides.delta`."""
        signs = _looked_up(self.fields, first, last, 2, SIGNED_VALUES, dtype=np.dtype(np.int8))
        return self.merged.chosen(signs, first, last, start)


@dataclass(frozen=True, slots=True)
class TwoLevelSides:
    """Merged where a bit is set, merged_lo where it is not."""

    bits: Bytes
    merged: SharedChunk
    merged_lo: SharedChunk

    def delta(self, first: int, last: int, start: int) -> Tensor:
        """As `Sides.delta`."""
        upper = _unpacked(self.bits, first, last)
        delta = self.merged.chosen(upper, first, last, start)
        return delta.add_(self.merged_lo.chosen(upper ^ 1, first, last, start))  # one of the two is 0: exact


@dataclass(frozen=True, slots=True)
class LevelSides:
    """Numbers that the codes themselves stand for.

    Attributes:
        codes: bits or fields.
        width: bits a code.
        values: what each code stands for.
        scales: of the tensor's rows.
    """

    codes: Bytes
    width: int
    values: tuple[float, ...]
    scales: RowScales

    def delta(self, first: int, last: int, start: int) -> Tensor:
        """As `Sides.delta`."""
        delta = _tensor(_looked_up(self.codes, first, last, self.width, self.values))
        self.scales.multiply(delta, start)
        return delta


@dataclass(frozen=True, slots=True)
class SparseSides:
    """Values of the task's own, here and there.

    Attributes:
        positions: ascending: where in the chunk they are. Only elements between two of which all are here are
            asked for.
        values: float32, one a position.
        scales: of the tensor's rows.
    """

    positions: NDArray[np.intp]
    values: NDArray[np.float32]
    scales: RowScales

    def delta(self, first: int, last: int, start: int) -> Tensor:
        """As `Sides.delta`."""
        low, high = np.searchsorted(self.positions, (first, last))
        delta = np.zeros(last - first, np.float32)
        delta[self.positions[low:high] - first] = self.values[low:high]
        scaled = _tensor(delta)
        self.scales.multiply(scaled, start)
        return scaled


def set_positions(packed: Bytes, first: int, last: int) -> tuple[int, NDArray[np.intp]]:
    """The set bits among [first, last) of *packed*.

    Returns:
        how many are set before *first*, and where those are that are set from there on, ascending.
    """
    unpacked = np.unpackbits(packed, count=last, bitorder="little").view(np.bool_)
    return int(np.count_nonzero(unpacked[:first])), np.flatnonzero(unpacked[first:]) + first


def as_float32(values: Bytes, dtype: SharedDtype) -> NDArray[np.float32]:
    """*values* of a floating-point *dtype* in float32, which holds them exactly."""
    return _tensor(values).view(_VIEWS[dtype]).to(torch.float32).numpy()


def _unpacked(packed: Bytes, first: int, last: int) -> Bytes:
    """Bits [first, last) of *packed*, one a byte."""
    begin = first // _ALIGNED * _ALIGNED
    count = last - begin
    packed = packed[begin // 8 :][: bits.packed_nbytes(count, 1)]
    return np.unpackbits(packed, count=count, bitorder="little")[first - begin :]


def _looked_up(
    packed: Bytes, first: int, last: int, width: int, values: tuple[float, ...], *, dtype: np.dtype[Any] = _FLOAT32
) -> NDArray[Any]:
    """What codes [first, last) of *packed* stand for."""
    begin = first // _ALIGNED * _ALIGNED
    return bits.look_up(packed[begin * width // 8 :], last - begin, width, values, dtype)[first - begin :]


def _tensor(array: NDArray[np.generic]) -> Tensor:
    """*array* as a tensor: in the same memory, unless it is read-only, which torch does not know."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
