"""Bits and fields to what is added to the base: the sides that a task chose, and their scales, tile by tile on the CPU.

One class a way of choosing. A tile is in the thread's scratch memory. They count on the caller that flushing of
subnormal numbers is off, and that numpy says nothing of overflow.

Numbers are kept with their signs turned: values times minus one, scales times minus one. Their product is the same, and
it is -0.0 where a side is absent: added to any number, -0.0 changes no bit, while +0.0 makes a -0.0 positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.forking import cached_property
from tallstore.format import bits
from tallstore.format.bits import Bytes
from tallstore.format.encodings import LOG4_VALUES, SIGNED_VALUES
from tallstore.format.manifest import SharedDtype
from tallstore.loading.looking_up import LookUp
from tallstore.loading.scratch import scratch

_VIEWS: Final = {"I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_LOG4: Final = LookUp(4, LOG4_VALUES, torch.float32)
_TURNED_SIGNS: Final = LookUp(2, tuple(-sign for sign in SIGNED_VALUES), torch.int8)


@dataclass(frozen=True)
class RowScales:
    """The scales of a tensor's rows.

    Attributes:
        scales: float32, one for the whole tensor or one a row.
        row_length: elements of a row.
    """

    scales: NDArray[np.float32]
    row_length: int

    @cached_property
    def are_positive(self) -> bool:
        """Whether zeros times a turned scale are -0.0."""
        return bool(self.scales.min(initial=1) > 0)

    @cached_property
    def _turned(self) -> NDArray[np.float32]:
        return np.negative(self.scales)

    def multiply(self, elements: Tensor, start: int) -> None:
        """Multiply *elements*, those from *start* on of the flat tensor, by their rows' turned scales, in place.

        In numpy, whose views, unlike torch's, let no other thread take the interpreter's lock.
        """
        flat = elements.numpy()
        if self.scales.size == 1:
            np.multiply(flat, self._turned[0], out=flat)
            return
        done = 0
        while done < flat.size:
            row, inside = divmod(start + done, self.row_length)
            whole = 0 if inside else (flat.size - done) // self.row_length
            # Whole rows, or a row's end at the beginning, or a row's beginning at the end.
            last = done + whole * self.row_length if whole else min(flat.size, done + self.row_length - inside)
            part = flat[done:last].reshape(max(1, whole), -1)
            np.multiply(part, self._turned[row : row + max(1, whole), None], out=part)
            done = last


class Tile(NamedTuple):
    """What is added to a tile of the base.

    Attributes:
        turned: float32 [n], in scratch memory; its zeros are +0.0. Minus the values, or the deltas if *scales* is None,
            whose zeros are -0.0 then.
        scales: of the tensor's rows.
    """

    turned: Tensor
    scales: RowScales | None


class Sides(Protocol):
    """What a task chose for the elements of one chunk of a tensor."""

    @property
    def keep_zeros(self) -> bool:
        """Whether deltas of 0 leave -0.0 in the base as it is; if not, they must be looked for."""

    def tile(self, first: int, last: int, start: int) -> Tile:
        """Elements [first, last) of the chunk.

        Args:
            first: in the chunk.
            last: behind the last element, in the chunk.
            start: where *first* is in the flat tensor.
        """


def delta(tile: Tile, start: int) -> Tensor:
    """Scale times value, rounded to float32, 0 where a side is absent: [n], in place of the tile."""
    if tile.scales is not None:
        tile.scales.multiply(tile.turned, start)
    return tile.turned


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

    @property
    def keep_zeros(self) -> bool:
        """As `Sides.keep_zeros`."""
        return self.scales.are_positive

    def everywhere(self, first: int, last: int, start: int) -> Tensor:
        """Scale times value, rounded to float32, in memory of its own; arguments as for `Sides.tile`."""
        elements = torch.neg(self._values(first, last))
        self.scales.multiply(elements, start)
        return elements

    def chosen(self, turned_signs: Tensor, first: int, last: int) -> Tile:
        """The values under *turned_signs*, int8 [n]: 0, 1 or -1."""
        if self.dtype == "I8":  # codes have no -128: one byte holds every product
            codes = scratch.tensor("codes", last - first, torch.int8)
            np.multiply(self.values[first:last].view(np.int8), turned_signs.numpy(), out=codes.numpy())
            return Tile(as_float32(codes, "elements"), self.scales)
        values = self._values(first, last).mul_(as_float32(turned_signs, "signs"))
        if self.dtype != "LOG4":
            values.add_(0.0)  # the zeros of negative values are -0.0
        return Tile(values, self.scales)

    def _values(self, first: int, last: int) -> Tensor:
        """float32, in scratch memory."""
        if self.dtype == "LOG4":
            return _LOG4(self.values, first, last)
        width = _VIEWS[self.dtype].itemsize
        stored = _tensor(self.values[first * width : last * width])
        return as_float32(stored.view(_VIEWS[self.dtype]), "elements")


@dataclass(frozen=True, slots=True)
class MaskSides:
    """Merged where a bit is set."""

    bits: Bytes
    merged: SharedChunk

    @property
    def keep_zeros(self) -> bool:
        """As `Sides.keep_zeros`."""
        return self.merged.keep_zeros

    def tile(self, first: int, last: int, _start: int) -> Tile:
        """As `Sides.tile`."""
        return self.merged.chosen(_turned_bits(self.bits, first, last), first, last)


@dataclass(frozen=True, slots=True)
class SignedSides:
    """Merged, plus or minus or not at all, by 2-bit fields."""

    fields: Bytes
    merged: SharedChunk

    @property
    def keep_zeros(self) -> bool:
        """As `Sides.keep_zeros`."""
        return self.merged.keep_zeros

    def tile(self, first: int, last: int, _start: int) -> Tile:
        """As `Sides.tile`."""
        return self.merged.chosen(_TURNED_SIGNS(self.fields, first, last), first, last)


@dataclass(frozen=True, slots=True)
class TwoLevelSides:
    """Merged where a bit is set, merged_lo where it is not."""

    bits: Bytes
    merged: SharedChunk
    merged_lo: SharedChunk

    @property
    def keep_zeros(self) -> bool:
        """As `Sides.keep_zeros`."""
        return self.merged.keep_zeros and self.merged_lo.keep_zeros

    def tile(self, first: int, last: int, start: int) -> Tile:
        """As `Sides.tile`."""
        upper = _turned_bits(self.bits, first, last)
        chosen = scratch.tensor("upper", last - first, torch.float32)
        chosen.copy_(delta(self.merged.chosen(upper, first, last), start))
        lower = torch.bitwise_not(upper, out=upper)  # of 0 and -1
        chosen += delta(self.merged_lo.chosen(lower, first, last), start)  # one of the two is 0: exact
        return Tile(chosen, None)


class LevelSides:
    """Numbers that the codes themselves stand for."""

    def __init__(self, codes: Bytes, width: int, levels: tuple[float, ...], scales: RowScales) -> None:
        """Take the codes of a chunk.

        Args:
            codes: bits or fields.
            width: bits a code.
            levels: what each code stands for: multiples of 1/2 up to 63.
            scales: of the tensor's rows.
        """
        self._codes, self._turned = codes, _turned_levels(width, levels)
        self._scales = RowScales(scales.scales * np.float32(0.5), scales.row_length)

    @property
    def keep_zeros(self) -> bool:
        """As `Sides.keep_zeros`."""
        return self._scales.are_positive

    def tile(self, first: int, last: int, _start: int) -> Tile:
        """As `Sides.tile`."""
        return Tile(as_float32(self._turned(self._codes, first, last), "elements"), self._scales)


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

    @property
    def keep_zeros(self) -> bool:
        """As `Sides.keep_zeros`."""
        return self.scales.are_positive

    def tile(self, first: int, last: int, _start: int) -> Tile:
        """As `Sides.tile`."""
        low, high = np.searchsorted(self.positions, (first, last))
        turned = scratch.tensor("elements", last - first, torch.float32).zero_()
        turned.numpy()[self.positions[low:high] - first] = 0.0 - self.values[low:high]
        return Tile(turned, self.scales)


@cache
def _turned_levels(width: int, levels: tuple[float, ...]) -> LookUp:
    """Whole numbers, to be multiplied by half the scale: the same products."""
    return LookUp(width, tuple(-2 * level for level in levels), torch.int8)


def set_positions(packed: Bytes, first: int, last: int) -> tuple[int, NDArray[np.intp]]:
    """The set bits among [first, last) of *packed*.

    Returns:
        how many are set before *first*, and where those are that are set from there on, ascending.
    """
    unpacked = np.unpackbits(packed, count=last, bitorder="little").view(np.bool_)
    return int(np.count_nonzero(unpacked[:first])), np.flatnonzero(unpacked[first:]) + first


def values_as_float32(values: Bytes, dtype: SharedDtype) -> NDArray[np.float32]:
    """*values* of a floating-point *dtype* in float32, which holds them exactly."""
    return _tensor(values).view(_VIEWS[dtype]).to(torch.float32).numpy()


def as_float32(elements: Tensor, name: str) -> Tensor:
    """*elements* in float32, which holds them exactly, in the scratch memory of that name."""
    return scratch.tensor(name, elements.numel(), torch.float32).copy_(elements)


def _turned_bits(packed: Bytes, first: int, last: int) -> Tensor:
    """Bits [first, last) of *packed*: int8 [last - first], -1 where one is set."""
    begin = first // 8 * 8
    packed = packed[begin // 8 : bits.packed_nbytes(last, 1)]
    unpacked = np.unpackbits(packed, count=last - begin, bitorder="little")[first - begin :].view(np.int8)
    return torch.from_numpy(np.negative(unpacked, out=unpacked))


def _tensor(array: NDArray[np.generic]) -> Tensor:
    """*array* as a tensor: in the same memory, unless it is read-only, which torch does not know."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
