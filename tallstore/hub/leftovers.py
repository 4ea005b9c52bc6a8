"""What downloads that were killed left in the Hub's cache: its client starts them anew, and leaves the pieces there."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Final

_A_MOMENT: Final = 60.0  # seconds


def remove_leftovers(snapshot: Path) -> None:
    """Remove files that never became whole from the repository of a snapshot in the cache, unless they are coming now.

    Who downloads a file holds its lock. What cannot be removed stays.
    """
    repository = snapshot.parent.parent
    for probe in (repository / "blobs").glob("tmp_*"):  # the client makes one for a moment, to see its mode
        with contextlib.suppress(OSError):
            status = probe.stat()
            if status.st_size == 0 and time.time() - status.st_mtime > _A_MOMENT:
                probe.unlink()
    pieces = list((repository / "blobs").glob("*.incomplete"))
    if not pieces:
        return
    from filelock import FileLock, Timeout  # noqa: PLC0415 - the Hub's client needs it, and has it

    locks = repository.parent / ".locks" / repository.name
    for piece in pieces:
        with contextlib.suppress(Timeout, OSError), FileLock(locks / f"{piece.name.split('.')[0]}.lock", timeout=0):
            piece.unlink(missing_ok=True)
