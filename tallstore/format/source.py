"""Where the files of a bundle come from that are not in its directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tallstore.format.manifest import FileEntry
from tallstore.format.shard_reader import RangeFile


class Source(Protocol):
    """Brings files of one bundle; several threads may ask.

    Attributes:
        where: what messages call the bundle.
        opened_as: its id, and the commit that it is pinned to.
    """

    where: str
    opened_as: tuple[str, str]

    def fetch(self, entries: Sequence[FileEntry]) -> None:
        """Have *entries* of the manifest in their places; those that are there, and right, are not brought again.

        What is about to be needed together should be asked for together: it comes at the same time.

        Raises:
            NotFetchedError: one is not here, and nothing may be brought.
            IntegrityError: what came is not what the manifest says; it was removed again.
            TallstoreError: anything else that keeps one from coming.
        """

    def is_better_read_there(self, entry: FileEntry, nbytes: int) -> bool:
        """Whether it is better to read *nbytes*, all in all, of a file where it is than to bring it."""

    def read_there(self, entry: FileEntry, tell: Callable[[int], object]) -> RangeFile:
        """A file to be read where it is; *tell* is told the bytes that were."""
