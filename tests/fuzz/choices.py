"""Decisions read off bytes: whoever chooses the bytes, a seeded generator or libFuzzer, makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Choices:
    """A string of bytes as a row of decisions. Once it is used up, every number is 0."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        """Whether there is something left."""
        return self._at < len(self._data)

    def raw(self, nbytes: int) -> bytes:
        """The next bytes, followed by zeros where there are too few."""
        taken = self._data[self._at : self._at + nbytes]
        self._at += nbytes
        return taken.ljust(nbytes, b"\0")

    def rest(self) -> bytes:
        """All that is left."""
        taken = self._data[self._at :]
        self._at = len(self._data)
        return taken

    def below(self, limit: int) -> int:
        """A number from 0 to *limit* - 1; 0 where there is none."""
        return int.from_bytes(self.raw(1 if limit <= 1 << 8 else 3), "little") % limit if limit > 1 else 0

    def pick(self, items: Sequence[Item]) -> Item:
        """One of *items*."""
        return items[self.below(len(items))]

    def one_in(self, count: int) -> bool:
        """True once in *count* times."""
        return self.below(count) == count - 1
