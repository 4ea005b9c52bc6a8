"""Whether a file is still the one that was opened, and bytes of it that are those of one version."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tallstore.errors import DamagedCheckpointError, InputError

Version: TypeAlias = tuple[int, ...]
"""Numbers that change with the file: its size, its time, which all machines that mount it agree on, and its inode."""

SHARED_NUMBERS: Final = 2
"""How many of a version's numbers, from the first, other machines share: they number devices as they like."""

# File systems stamp files with a clock that goes in steps of up to 10 ms: two writes in one step look like one.
_CLOCK_STEP_NS: Final = 20_000_000


def version_of(status: os.stat_result) -> Version:
    """The version of a file of that status."""
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def settled_version(path: Path, file: IO[bytes]) -> Version:
    """The version of an open file, once every later one will be another; waits a moment for a file that is brand-new.

    Raises:
        InputError: it is still being written.
    """
    status = os.fstat(file.fileno())
    age = time.time_ns() - status.st_mtime_ns
    if 0 <= age < _CLOCK_STEP_NS:
        time.sleep((_CLOCK_STEP_NS - age) / 1e9)
        if version_of(os.fstat(file.fileno())) != version_of(status):
            raise InputError(str(path), "is still being written; try again when it is complete")
    return version_of(status)


def check_version(path: Path, version: Version) -> None:
    """Make sure that the file at *path* is of that version, or of the part of it that machines share.

    Raises:
        DamagedCheckpointError: it is of another.
        InputError: it cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    _compare(path, status, version)


def read_range(path: Path, version: Version, first: int, end: int) -> NDArray[np.uint8]:
    """Bytes [*first*, *end*) of that version of a file, in memory of their own: no later change of it can reach them.

    Raises:
        DamagedCheckpointError: the file is of another version, or was changed while it was read.
        InputError: it cannot be read.
    """
    raw = np.empty(end - first, np.uint8)
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - twice as fast as the path's own method
            file.seek(first)
            done = 0
            while done < raw.size and (count := file.readinto(raw[done:].data)):  # a large read may come in parts
                done += count
            _compare(path, os.fstat(file.fileno()), version)
    except OSError as error:
        raise unreadable(path, error) from None
    if done < raw.size:
        raise DamagedCheckpointError(str(path), f"ends at byte {first + done}; copy or download it again")
    return raw


def check_open(path: Path, file: IO[bytes], version: Version) -> None:
    """As `check_version`, of a file that is open."""
    _compare(path, os.fstat(file.fileno()), version)


def unreadable(path: Path, error: OSError) -> InputError:
    """The error of an input that the system cannot read."""
    return InputError(str(path), f"cannot be read: {error.strerror}")


def _compare(path: Path, status: os.stat_result, version: Version) -> None:
    if version_of(status)[: len(version)] != version:
        raise DamagedCheckpointError(str(path), "was changed while it was read; start again")
