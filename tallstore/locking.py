"""Who is writing to a place: a directory or a file that only one process may fill, and word of who that is."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tallstore.errors import OutputBusyError

if sys.platform != "win32":
    import fcntl

_HOLDER = ".holder"
_BINARY = getattr(os, "O_BINARY", 0)


def lock_directory(staging: Path, target: Path) -> int | None:
    """Make *staging* and lock the directory itself: the lock follows it through renames and dies with the process.

    Returns:
        an open descriptor of the directory; None where the system has no such locks.

    Raises:
        OutputBusyError: another process has it; says which, as far as it said so.
        OSError: the directory cannot be made.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            staging.mkdir()
        if sys.platform == "win32":
            return None
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its last writer put it in place between our two calls: make a new one
        try:
            if _flock(descriptor) and not is_held(staging, descriptor):
                os.close(descriptor)  # put in place before it was locked: make a new one
                continue
        except BlockingIOError:
            os.close(descriptor)
            raise OutputBusyError(
                f"{target}: {_holder(staging)} is writing it; wait, or choose another place"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def lock_file(staged: Path, path: Path) -> BinaryIO:
    """The file at *staged*, which will be *path*, open for writing, locked until it is closed.

    Raises:
        OutputBusyError: another process is writing it.
        OSError: it cannot be opened.
    """
    while True:
        descriptor = None
        try:
            descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | _BINARY, 0o666)
            if not _flock(descriptor) or is_held(staged, descriptor):
                return os.fdopen(descriptor, "wb")
        except BlockingIOError:
            _close(descriptor)
            raise OutputBusyError(f"{path}: somebody else is writing it; wait, or choose another place") from None
        except BaseException:  # an interruption reaches us once the file is there, before we know its descriptor
            _close(descriptor)
            with contextlib.suppress(OSError):
                to_its_end(partial(_remove_abandoned, staged))
            raise
        _close(descriptor)  # it was put in its place before it was locked: make a new one


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _remove_abandoned(staged: Path) -> None:
    """Remove a file that was made to be filled, unless somebody fills it.

    Raises:
        OSError: somebody does, there is none, or the system does not let it be removed.
    """
    descriptor = os.open(staged, os.O_WRONLY | _BINARY)
    try:
        if _flock(descriptor) and is_held(staged, descriptor):  # without locks, it may be another's
            staged.unlink()
    finally:
        os.close(descriptor)


def sign(staging: Path) -> None:
    """Leave word of who fills a directory, for whom it keeps away."""
    now = datetime.now(timezone.utc).astimezone()
    (staging / _HOLDER).write_text(f"{os.getpid()} {now:%Y-%m-%dT%H:%M:%S} {platform.node()}")


def unsign(staging: Path) -> None:
    """Take the word back."""
    (staging / _HOLDER).unlink()


def _holder(staging: Path) -> str:
    try:
        process, since, host = (staging / _HOLDER).read_text().split(" ", 2)
        return f"process {int(process)} on {host or 'this machine'} (since {since.replace('T', ' ')})"
    except (OSError, ValueError):
        return "another process"


def _flock(descriptor: int) -> bool:
    """Lock a file or a directory; whether its file system has locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def is_held(staging: Path, lock: int | None) -> bool:
    """Whether the file or directory that *lock* was taken on is still the one named *staging*."""
    if lock is None:
        return True
    try:
        return os.path.samestat(os.fstat(lock), staging.lstat())
    except FileNotFoundError:
        return False


def remove_held(staging: Path, lock: int | None) -> None:
    """Remove what was staged, or what it was exchanged for; never what another process is filling.

    What the system does not let be removed stays, for the next writer.
    """
    with contextlib.suppress(OSError):
        to_its_end(lambda: _remove_held(staging, lock))


def to_its_end(clean_up: Callable[[], object]) -> None:
    """Clean up; if somebody interrupts that, once more from the beginning, before the interruption goes on."""
    try:
        clean_up()
    except KeyboardInterrupt:
        clean_up()
        raise


def _remove_held(staging: Path, lock: int | None) -> None:
    if sys.platform == "win32" or (lock is not None and is_held(staging, lock)):
        shutil.rmtree(staging, ignore_errors=True)
        return
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # else nothing of ours is there
    try:
        if _flock(descriptor) and is_held(staging, descriptor):
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(descriptor)
