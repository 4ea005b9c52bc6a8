"""Elements of a tensor and where they are wanted, chunk by chunk: what is read, decoded and written in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.loading import parallel
from tallstore.loading.boxes import Box, Part
from tallstore.loading.decode import copy_cast
from tallstore.loading.scratch import scratch

_JOB_NUMEL: Final = CHUNK_NUMEL // 2


class Source(Protocol):
    """Where elements come from."""

    def read(self, start: int, stop: int, destination: Tensor) -> None:
        """Write elements [start, stop), which lie in one chunk, to *destination* in the dtype that it gives."""


@dataclass(frozen=True, slots=True)
class Section:
    """Elements [start, stop) of a tensor, whose source counts them, and their chunks, from 0; and what it gives."""

    start: int
    stop: int
    source: Source
    dtype: torch.dtype

    def pieces(self, start: int, stop: int, destination: Tensor) -> Iterator[Piece]:
        """What of elements [start, stop) of the tensor lies here; they go to *destination*, [stop - start]."""
        for first, last in self._chunked(start, stop):
            place = self.start + first - start
            yield Piece(self.source, first, last, self.dtype, destination[place : place + last - first])

    def cuts(self, box: Box, destination: Tensor) -> Iterator[Cut]:
        """What of a box of the tensor lies here; it goes to *destination*, of the box's lengths."""
        for first, last in self._chunked(box.start, box.stop):
            parts = tuple(box.parts(self.start + first, self.start + last))
            if parts:
                yield Cut(self, box, parts, destination)

    def _chunked(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges that each lie in one chunk, counted as the source does."""
        first, stop = max(start, self.start) - self.start, min(stop, self.stop) - self.start
        while first < stop:
            last = min(stop, (first // CHUNK_NUMEL + 1) * CHUNK_NUMEL)
            yield first, last
            first = last


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of a source, which lie in one chunk, and where they are wanted.

    Attributes:
        dtype: that the source gives.
        destination: [stop - start], of any dtype.
    """

    source: Source
    start: int
    stop: int
    dtype: torch.dtype
    destination: Tensor

    @property
    def numel(self) -> int:
        """How many are decoded."""
        return self.stop - self.start

    def write(self) -> None:
        """Read, decode, and write them."""
        if self.destination.dtype == self.dtype:
            self.source.read(self.start, self.stop, self.destination)
            return
        given = torch.empty(self.numel, dtype=self.dtype, device="cpu")
        self.source.read(self.start, self.stop, given)
        copy_cast(self.destination, given)


@dataclass(frozen=True, slots=True)
class Cut:
    """Parts of a box that lie in one chunk of a section, and where the box is wanted.

    Attributes:
        parts: in their order; all from the first to the last is decoded, since one call for each row costs more.
        destination: of the box's lengths, of any dtype and strides.
    """

    section: Section
    box: Box
    parts: Sequence[Part]
    destination: Tensor

    @property
    def numel(self) -> int:
        """How many elements are decoded."""
        return self.box.end(self.parts[-1]) - self.parts[0].start

    def write(self) -> None:
        """Read and decode them, and write those that are in the box."""
        first = self.parts[0].start
        begin = first - self.section.start
        elements = _scratch(self.section.dtype, self.numel)
        self.section.source.read(begin, begin + self.numel, elements)
        if self.destination.dtype != self.section.dtype:
            given, elements = elements, _scratch(self.destination.dtype, self.numel)
            copy_cast(elements, given)
        for part in self.parts:
            found = elements[part.start - first :].as_strided(part.lengths, self.box.strides)
            self.destination[part.slices].copy_(found)


def jobs(pieces: Iterable[Piece | Cut]) -> Iterator[parallel.Job]:
    """Jobs of a piece each, or of many small ones: a job costs about as much as decoding a thousand elements."""
    group: list[Piece | Cut] = []
    numel = 0
    try:
        for piece in pieces:
            group.append(piece)
            numel += piece.numel
            if numel >= _JOB_NUMEL:
                yield partial(_write, group)
                group, numel = [], 0
    except Exception:
        yield partial(_write, group)  # what goes wrong there comes first
        raise
    if group:
        yield partial(_write, group)


def _write(pieces: Sequence[Piece | Cut]) -> None:
    for piece in pieces:
        piece.write()


def _scratch(dtype: torch.dtype, numel: int) -> Tensor:
    return scratch.tensor(f"cut {dtype}", CHUNK_NUMEL, dtype)[:numel]
