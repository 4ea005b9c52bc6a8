"""Ranges of a shard that stays on the Hub, for a tensor that is a small part of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from tallstore import forking
from tallstore.errors import IntegrityError
from tallstore.format.bits import Bytes
from tallstore.format.manifest import FileEntry
from tallstore.hub.pinned import PinnedRepository

# A range costs three waits one after the other (header, index, tensor), a whole shard four and its bytes. With 50 ms to
# a loopback Hub and 125 MB/s, measured once, one tensor of 1/32 of a shard took 0.16 s by range and 0.23 s by shard of
# 4 MiB, 0.17 and 0.42 s of 16 MiB, 0.45 and 1.6 s of 64 MiB; one of 1/8 took 0.17 and 0.22, 0.20 and 0.48, 0.66 and
# 1.5 s. So a single tensor always comes sooner by range; but a shard is in the cache then, for the next tensor, the
# next process, and offline. It is left on the Hub where waiting for it is felt, for as much of it as costs less than
# half of the wait.
LARGE_NBYTES: Final = 32 << 20
LARGEST_SHARE: Final = 1 / 8

_FIRST_NBYTES: Final = 1 << 16  # most headers end in there
_PIECE_NBYTES: Final = 8 << 20
_MAX_HELD: Final = 8
_WORKERS: Final = 8


def is_worth_it(entry: FileEntry, nbytes: int) -> bool:
    """Whether to fetch *nbytes* of a shard by range, all in all, rather than the shard."""
    return entry.size >= LARGE_NBYTES and nbytes <= entry.size * LARGEST_SHARE


class RemoteShard:
    """A `RangeFile` on the Hub; what was read is not kept on the disk. Several threads may use it.

    Nothing of it is trusted: header, index and chunks have hashes in tables that were checked.
    """

    def __init__(self, repository: PinnedRepository, entry: FileEntry, tell: Callable[[int], object]) -> None:
        """Fetch nothing yet.

        Args:
            repository: that has it.
            entry: the manifest's.
            tell: is told the bytes that arrived.
        """
        self.where, self.nbytes = f"{repository.where}, {entry.path}", entry.size
        self._repository, self._path, self._tell = repository, entry.path, tell
        self._held = OrderedDict[tuple[int, int], Bytes]()
        self._lock = forking.lock()

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop), in memory of their own.

        Raises:
            IntegrityError: ST-2, the file is shorter.
            HubError: the Hub refuses, or cannot be reached.
        """
        found = self._find(start, stop)
        if found is None:
            last = max(stop, min(_FIRST_NBYTES, self.nbytes)) if start == 0 else stop
            found = self._fetch(start, last)[: stop - start]
        return found.copy()

    def expect(self, start: int, stop: int) -> None:
        """Fetch bytes [start, stop) now, in pieces at the same time; they stay until others take their place."""
        if self._find(start, stop) is None:
            self._fetch(start, stop)

    def version(self) -> None:
        """As `RangeFile.version`: it is a commit's, which never changes."""

    def close(self) -> None:
        """Let go of what was fetched."""
        with self._lock:
            self._held.clear()

    def _find(self, start: int, stop: int) -> Bytes | None:
        with self._lock:
            for (first, last), held in self._held.items():
                if first <= start and stop <= last:
                    return held[start - first : stop - first]
        return None

    def _fetch(self, start: int, stop: int) -> Bytes:
        if stop > self.nbytes:
            raise IntegrityError("ST-2", self.where, f"ends at byte {self.nbytes}, before byte {stop}")
        starts = range(start, stop, _PIECE_NBYTES)
        fetched = np.empty(stop - start, np.uint8)

        def fetch(first: int) -> None:
            last = min(first + _PIECE_NBYTES, stop)
            piece = self._repository.read_range(self._path, first, last)
            fetched[first - start : last - start] = np.frombuffer(piece, np.uint8)
            self._tell(len(piece))

        if len(starts) > 1:
            with ThreadPoolExecutor(min(_WORKERS, len(starts)), "tallstore-range") as pool:
                list(pool.map(fetch, starts))
        else:
            for first in starts:
                fetch(first)
        with self._lock:
            self._held[start, stop] = fetched
            while len(self._held) > _MAX_HELD:
                self._held.popitem(last=False)
        return fetched
