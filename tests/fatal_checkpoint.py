"""A checkpoint that kills whoever reads it in another process: what an executor's workers may come to."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from tallstore.checkpoints import open_checkpoint
from tallstore.checkpoints.checkpoint import Checkpoint, Origin

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class FatalCheckpoint(Checkpoint):
    """The weights of a file, until a worker reads *name*: it dies as of ``kill -9``, so many times in all."""

    def __init__(self, path: Path, name: str, deaths: Path, count: int) -> None:
        """Take what it reads.

        Args:
            path: of the weights.
            name: of the tensor; what comes before it in a unit of work has been written by then.
            deaths: an empty directory, where workers leave a trace.
            count: how many of them die.
        """
        self._file = open_checkpoint(path)
        super().__init__(Origin("a checkpoint that kills"), {key: self._file.spec(key) for key in self._file.names})
        self._home, self._name, self._deaths, self._count = os.getpid(), name, deaths, count

    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        if name == self._name and os.getpid() != self._home:
            for number in range(self._count):
                with contextlib.suppress(FileExistsError):
                    (self._deaths / str(number)).touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
        return self._file.read_bytes(name, start, stop)

    def _release(self) -> None:
        self._file.close()
