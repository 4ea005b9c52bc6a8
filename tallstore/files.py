"""Files written whole or not at all, and directories that appear in one step.

Nothing here knows about bundles. A file is staged beside its place, flushed to the disk and renamed; a directory is filled
under another name and renamed, or exchanged with the one it replaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tallstore.errors import OutputBusyError, OutputError

_COPY_NBYTES = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_HOLDER = ".holder"


@dataclass(frozen=True)
class Written:
    """What was written: its size, and its hashes as the Hub counts them."""

    size: int
    sha256: str
    git_oid: str


def write_file(path: Path, *parts: bytes | Path) -> Written:
    """Write *parts* (bytes, or files to copy) to *path*: staged, flushed to the disk, renamed.

    Mode 0644 less the umask, as any other program would write it.
    """
    size = sum(part.stat().st_size if isinstance(part, Path) else len(part) for part in parts)
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    staged = path.with_name(path.name + ".partial")
    try:
        with staged.open("wb") as file:
            for piece in _pieces(parts):
                sha256.update(piece)
                sha1.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return Written(size, sha256.hexdigest(), sha1.hexdigest())


def hash_file(path: Path) -> Written:
    """Size and hashes of the file at *path*, read once."""
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for piece in _pieces((path,)):
        sha256.update(piece)
        sha1.update(piece)
    return Written(size, sha256.hexdigest(), sha1.hexdigest())


def _pieces(parts: tuple[bytes | Path, ...]) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while piece := file.read(_COPY_NBYTES):
                    yield piece
        else:
            yield part


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of *target* in one step when the block ends without an error.

    On an error, and on Ctrl-C, it is removed and *target* is as it was. What a killed process left behind is removed by
    the next one that writes to the same *target*.

    Raises:
        OutputBusyError: another process is filling it.
        OutputError: the directory cannot be made.
    """
    parent = target.parent
    staging = parent / f".{target.name}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(staging, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot write beside it ({error.strerror}); choose another place") from None
    try:
        _clear(staging)
        (staging / _HOLDER).write_text(str(os.getpid()))
        yield staging
        (staging / _HOLDER).unlink()
        for directory, _, _ in os.walk(staging):
            sync_directory(Path(directory))
        _put_in_place(staging, target)
        sync_directory(parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(staging: Path, target: Path) -> int | None:
    """Make *staging* and lock the directory itself: the lock follows it through renames and dies with the process."""
    while True:
        staging.mkdir(exist_ok=True)
        if os.name != "posix":
            return None
        import fcntl

        descriptor = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            holder = staging / _HOLDER
            who = f"process {holder.read_text()}" if holder.exists() else "another process"
            raise OutputBusyError(f"{target}: {who} is writing it; wait, or choose another place") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), staging.stat()):
                return descriptor
        os.close(descriptor)  # its last writer put it in place between our two calls: make a new one


def _clear(staging: Path) -> None:
    for entry in staging.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        staging.replace(target)  # over an empty directory too
        return
    if _exchange(staging, target):
        shutil.rmtree(staging)
        return
    # Without an atomic exchange the old directory steps aside; a crash between the two leaves it under this name.
    aside = target.with_name(f".{target.name}.replaced")
    if aside.exists():
        shutil.rmtree(aside)
    target.replace(aside)
    staging.replace(target)
    shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two directories in one step, where the system can (Linux: renameat2)."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    failed = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if not failed:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS):  # the file system cannot
        return False
    raise OSError(ctypes.get_errno(), "cannot exchange the directories", str(second))
