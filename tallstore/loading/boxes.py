"""Slices of row-major tensors: which elements of the flat tensor they are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from tallstore.forking import cached_property


class Part(NamedTuple):
    """A part of a box that is a box itself.

    Attributes:
        start: its first element, in the flat tensor.
        place: where in the box it begins.
        lengths: elements along each dimension.
    """

    start: int
    place: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part as an index of the box."""
        return tuple(slice(begin, begin + length) for begin, length in zip(self.place, self.lengths, strict=True))


@dataclass(frozen=True)
class Box:
    """A slice of a tensor, contiguous along each dimension; it may be empty.

    Attributes:
        shape: of the tensor.
        offsets: the slice's first element along each dimension.
        lengths: its elements along each dimension.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the slice."""
        return math.prod(self.lengths)

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.lengths == self.shape

    @property
    def is_run(self) -> bool:
        """Whether its elements lie one behind the other in the flat tensor."""
        return self.numel == self.stop - self.start

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(accumulate(self.shape[:0:-1], int.__mul__, initial=1))[::-1][: len(self.shape)]

    @cached_property
    def start(self) -> int:
        """Its first element in the flat tensor."""
        return sum(offset * stride for offset, stride in zip(self.offsets, self.strides, strict=True))

    @property
    def stop(self) -> int:
        """Behind its last element in the flat tensor."""
        return self.start + self._spans[0]

    def parts(self, first: int, last: int) -> Iterator[Part]:
        """What of the box lies among elements [first, last) of the flat tensor, in that order.

        Few, whatever the sizes: two at most for each dimension.
        """
        return self._parts(first, last, self.start, ())

    def end(self, part: Part) -> int:
        """Behind the last element of *part* in the flat tensor."""
        return part.start + _span(part.lengths, self.strides)

    @cached_property
    def _spans(self) -> tuple[int, ...]:
        """By dimension: flat elements from the first to the last of the box's along it and those behind it."""
        return tuple(_span(self.lengths[axis:], self.strides[axis:]) for axis in range(len(self.shape) + 1))

    def _parts(self, first: int, last: int, start: int, place: tuple[int, ...]) -> Iterator[Part]:
        """Of the elements of the box at *place* along the leading dimensions, the first of which is at *start*."""
        axis = len(place)
        stop = start + self._spans[axis]
        if max(first, start) >= min(last, stop):
            return
        if first <= start and stop <= last:
            rest = self.lengths[axis:]
            yield Part(start, place + (0,) * len(rest), (1,) * axis + rest)
            return
        length, stride, span = self.lengths[axis], self.strides[axis], self._spans[axis + 1]
        # Those from `low` on, before `high`, lie in the range; of the ones beside them, a piece may.
        low = max(0, -((start - first) // stride))
        high = min(length, (last - span - start) // stride + 1)
        if 0 < low <= length:
            yield from self._parts(first, last, start + (low - 1) * stride, (*place, low - 1))
        if low < high:
            begin = start + low * stride
            behind = self.lengths[axis + 1 :]
            yield Part(begin, (*place, low, *(0 for _ in behind)), ((1,) * axis) + (high - low, *behind))
        if max(0, low) <= high < length:
            yield from self._parts(first, last, start + high * stride, (*place, high))


def _span(lengths: tuple[int, ...], strides: tuple[int, ...]) -> int:
    if 0 in lengths:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True))
