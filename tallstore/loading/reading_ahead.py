"""The expert that a switcher will need next: read in a thread of its own, and kept in memory until it came."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tallstore import forking
from tallstore.loading.resident import ResidentFiles


class ReadAhead:
    """One task at a time is expected; several threads may say which."""

    def __init__(self, files: ResidentFiles) -> None:
        """Expect none."""
        self._files = files
        self._reader: tuple[int, ThreadPoolExecutor] | None = None  # of which process
        self._kept = contextlib.ExitStack()
        self._task: str | None = None
        self._lock = forking.lock()

    @property
    def task(self) -> str | None:
        """The one that is expected."""
        return self._task

    def begin(self, task: str, read: Callable[[], None]) -> Future[None]:
        """Have *read* bring a task into memory, and expect it from then on.

        Returns:
            done when it is there; raises what *read* raises.
        """
        return self._own_reader().submit(self._bring, task, read)

    def expect(self, task: str | None) -> None:
        """Keep a task in memory, and no other one for that reason."""
        kept = contextlib.ExitStack()
        kept.enter_context(self._files.keep(task))
        with self._lock:
            kept, self._kept, self._task = self._kept, kept, task
        kept.close()

    def _bring(self, task: str, read: Callable[[], None]) -> None:
        with self._files.keep(task):
            read()
            self.expect(task)

    def _own_reader(self) -> ThreadPoolExecutor:
        """The thread: a forked process needs another one than its parent."""
        with self._lock:
            if self._reader is None or self._reader[0] != os.getpid():
                self._reader = os.getpid(), ThreadPoolExecutor(1, "tallstore-prefetch")
            return self._reader[1]
