"""Files that stay mapped: writing to one changes what was read of it, and shortening one ends the process."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from pathlib import Path

from tallstore.errors import DamagedCheckpointError


class WatchedFiles:
    """Whether files are as they were. Where another was put in the place of one, what is mapped of it stays as it was.

    Keeps none of them open.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Begin to watch."""
        self._seen = [(path, _status(path)) for path in paths]

    def check(self) -> None:
        """Refuse what was changed; a few microseconds a file.

        Raises:
            DamagedCheckpointError: somebody wrote to one of the files.
        """
        for path, before in self._seen:
            now = _status(path)
            if (
                before is not None
                and now is not None
                and _place(now) == _place(before)
                and _written(now) != _written(before)
            ):
                raise DamagedCheckpointError(str(path), "was changed while it was in use; open it again")

    def version(self) -> Hashable:
        """What is another one after somebody wrote to one of the files, whatever times he set."""
        found = [_status(path) for path, _ in self._seen]
        return tuple(status and (_place(status), _written(status), status.st_ctime_ns) for status in found)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # removed: what is mapped of it stays
        return None


def _place(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _written(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
