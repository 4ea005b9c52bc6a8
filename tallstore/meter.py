"""How far a long piece of work has come, over every pass that it makes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Meter:
    """Bytes done of bytes in all; never goes back, ends at all of them. Threads may share it."""

    def __init__(self, progress: Progress | None, phases: Sequence[int]) -> None:
        """Begin the first phase.

        Args:
            progress: is told, by one thread at a time; None tells nobody.
            phases: the bytes that each phase will read, about.
        """
        self._progress, self._left = progress, list(phases)
        self._done, self._total = 0, sum(phases)
        self._end = self._left.pop(0)
        self._lock = threading.Lock()
        self._tell()

    def advance(self, nbytes: int) -> None:
        """So many more bytes of this phase are done."""
        with self._lock:
            self._done = min(self._done + nbytes, self._end)
            self._tell()

    def end_phase(self) -> None:
        """This phase is done, whatever it counted."""
        with self._lock:
            self._done = self._end
            self._end += self._left.pop(0) if self._left else 0
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)
