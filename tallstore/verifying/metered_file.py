"""Files of a bundle whose reading can be watched."""

from __future__ import annotations

from pathlib import Path

from tallstore.format.bits import Bytes
from tallstore.format.shard_reader import LocalFile
from tallstore.meter import Meter


class MeteredFile(LocalFile):
    """A file on disk; what is read of it advances a meter."""

    def __init__(self, path: Path, where: str, *, meter: Meter) -> None:
        super().__init__(path, where)
        self._meter = meter

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop), in memory of their own.

        Raises:
            IntegrityError: ST-2, the file is shorter.
        """
        found = super().read(start, stop)
        self._meter.advance(stop - start)
        return found
