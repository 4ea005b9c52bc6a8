"""What downloads that were killed left in the Hub's cache: its client starts them anew, and leaves the pieces there."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from pathlib import Path
from typing import Final

_A_MOMENT: Final = 60.0  # seconds
_PROBE: Final = re.compile(r"tmp[a-z0-9_]{8}")
_NEW_REF: Final = re.compile(r".+\.[0-9a-f]{8}\.tmp")


def remove_leftovers(snapshot: Path) -> None:
    """Remove files that never became whole from the repository of a snapshot in the cache, unless they are coming now.

    Who downloads a file holds its lock. What cannot be removed stays.
    """
    repository = snapshot.parent.parent
    for path in _momentary(repository):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _A_MOMENT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    pieces = list((repository / "blobs").glob("*.incomplete"))
    if not pieces:
        return
    from filelock import FileLock, Timeout  # noqa: PLC0415 - the Hub's client needs it, and has it

    locks = repository.parent / ".locks" / repository.name
    for piece in pieces:
        with contextlib.suppress(Timeout, OSError), FileLock(locks / f"{piece.name.split('.')[0]}.lock", timeout=0):
            piece.unlink(missing_ok=True)


def _momentary(repository: Path) -> list[Path]:
    """What the client makes for a moment.

    To see whether there are links, to see a mode, and to put a branch's commit in the place of the one before.
    """
    return [
        *(path for path in repository.glob("tmp*") if _PROBE.fullmatch(path.name) and path.is_dir()),
        *(path for path in (repository / "blobs").glob("tmp_*") if _nbytes(path) == 0),
        *(path for path in (repository / "refs").rglob("*.tmp") if _NEW_REF.fullmatch(path.name)),
    ]


def _nbytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
