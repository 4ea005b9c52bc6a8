"""What downloads that were killed left in the Hub's cache: its client starts them anew, and leaves the pieces there."""

from __future__ import annotations

import contextlib
from pathlib import Path


def remove_leftovers(snapshot: Path) -> None:
    """Remove files that never became whole from the repository of a snapshot in the cache, unless they are coming now.

    Who downloads a file holds its lock. What cannot be removed stays.
    """
    repository = snapshot.parent.parent
    pieces = list((repository / "blobs").glob("*.incomplete"))
    if not pieces:
        return
    from filelock import FileLock, Timeout  # noqa: PLC0415 - the Hub's client needs it, and has it

    locks = repository.parent / ".locks" / repository.name
    for piece in pieces:
        with contextlib.suppress(Timeout, OSError), FileLock(locks / f"{piece.name.split('.')[0]}.lock", timeout=0):
            piece.unlink(missing_ok=True)
