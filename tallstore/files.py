"""Files written whole or not at all, and directories that appear in one step.

Nothing here knows about bundles. A file is staged beside its place, flushed to the disk and renamed; a directory is
filled under another name and renamed, or exchanged with the one it replaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tallstore.errors import OutputError
from tallstore.locking import lock_directory, lock_file, remove_held, sign, unsign

if sys.platform != "win32":
    import fcntl

_COPY_NBYTES = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
#: Of a file that is being written, behind its name.
STAGED_SUFFIX = ".partial"


@dataclass(frozen=True)
class Written:
    """What was written: its size, and its hashes as the Hub counts them."""

    size: int
    sha256: str
    git_oid: str


def write_file(path: Path, *parts: bytes | Path) -> Written:
    """Write *parts* (bytes, or files to copy) to *path*: staged, flushed to the disk, renamed.

    Mode 0666 less the umask, as any other program would write it.
    """
    size = sum(part.stat().st_size if isinstance(part, Path) else len(part) for part in parts)
    return write_stream(path, size, _pieces(parts))


def write_stream(path: Path, size: int, pieces: Iterable[bytes]) -> Written:
    """Write *pieces*, *size* bytes together, to *path*: staged, flushed to the disk, renamed.

    Raises:
        OutputBusyError: somebody else is writing to *path*.
        OutputError: *pieces* are not as many bytes.
    """
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with _staged_file(path) as file:
        for piece in pieces:
            sha256.update(piece)
            sha1.update(piece)
            file.write(piece)
        if file.tell() != size:
            raise OutputError(f"{path}: {file.tell()} bytes came where {size} were due; did an input change?")
    return Written(size, sha256.hexdigest(), sha1.hexdigest())


@contextlib.contextmanager
def _staged_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill beside *path*, which takes its place when the block ends without an error; else it is removed.

    It is locked meanwhile; what a killed process left there is used again.

    Raises:
        OutputBusyError: somebody else is filling it.
    """
    staged = _staged(path)
    keeps_open = sys.platform != "win32"  # which neither renames nor removes what is open
    with contextlib.ExitStack() as later, lock_file(staged, path) as file:
        try:
            os.truncate(file.fileno(), 0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if keeps_open:
                staged.replace(path)
            else:
                later.callback(staged.replace, path)
        except BaseException:
            if keeps_open:
                staged.unlink(missing_ok=True)
            else:
                later.callback(staged.unlink, missing_ok=True)
            raise


def _staged(path: Path) -> Path:
    return path.with_name(path.name + STAGED_SUFFIX)


def hash_file(path: Path, advance: Callable[[int], None] | None = None) -> Written:
    """Size and hashes of the file at *path*, read once; *advance* is told the bytes of each piece."""
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for piece in _pieces((path,)):
        sha256.update(piece)
        sha1.update(piece)
        if advance is not None:
            advance(len(piece))
    return Written(size, sha256.hexdigest(), sha1.hexdigest())


def hash_bytes(raw: bytes) -> Written:
    """Size and hashes of *raw*."""
    blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False)
    return Written(len(raw), hashlib.sha256(raw).hexdigest(), blob.hexdigest())


def _pieces(parts: tuple[bytes | Path, ...]) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while piece := _read_piece(file, part):
                    yield piece
        else:
            yield part


def sync_file(path: Path) -> None:
    """Flush a file that somebody else wrote to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _read_piece(file: BinaryIO, path: Path) -> bytes:
    """The next bytes of a file. An error says of which one: as it comes from the system, it could be of an output."""
    try:
        return file.read(_COPY_NBYTES)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


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
def writing(target: Path) -> Iterator[None]:
    """What the system refuses inside the block, a full disk most often, becomes an error of *target*.

    Raises:
        OutputError: in the place of an OSError, unless that names a file elsewhere, or whom a callback talked to.
    """
    try:
        yield
    except ConnectionError:  # a broken pipe among them: who showed the progress went away
        raise
    except OSError as error:
        if error.filename is not None:
            place = Path(os.fsdecode(error.filename))
            own = (target, _staging(target), _aside(target), _staged(target))
            if place not in target.parents and not any(path in (place, *place.parents) for path in own):
                raise
        reason = error.strerror or str(error)
        raise OutputError(f"{target}: cannot be written ({reason}); make room there, or choose another place") from None


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of *target* in one step when the block ends without an error.

    On an error, and on Ctrl-C, it is removed and *target* is as it was. What a killed process left behind is removed by
    the next one that writes to the same *target*. Where *target* is a link, what it leads to is replaced.

    Raises:
        OutputBusyError: another process is filling it.
        OutputError: the directory cannot be made, or not be put in its place.
    """
    target = Path(os.path.realpath(target))
    staging = _staging(target)
    with writing(target):
        made = _absent(target.parent)
    lock = None
    try:
        lock = _hold(staging, target)
        with writing(target):
            _take_back(target)
            refuse_read_only(target)
            _clear(staging)
            sign(staging)
        yield staging
        with writing(target):
            unsign(staging)
            replace_directory(staging, target)
    except BaseException:
        remove_held(staging, lock)
        _remove_empty(made)
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def gathered_files(target: Path) -> Iterator[Path]:
    """A directory beside *target* for files that will be moved into it, gathered over several runs, if need be.

    It is removed when the block ends without an error. On an error, and on Ctrl-C, it stays as it is for the next run,
    if there is anything in it but hidden files. Whoever replaces *target* as a whole removes it.

    Raises:
        OutputBusyError: another process is writing to *target*.
        OutputError: the directory cannot be made.
    """
    target = Path(os.path.realpath(target))
    staging = _staging(target)
    with writing(target):
        made = _absent(target.parent)
    lock, is_ours = None, False
    try:
        lock, is_ours = _hold(staging, target), True
        with writing(target):
            _take_back(target)
            sign(staging)
        yield staging
        remove_held(staging, lock)
    except BaseException:
        if is_ours and _is_bare(staging):
            remove_held(staging, lock)
        _remove_empty(made)
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def room_beside(target: Path, ready: Callable[[], None]) -> Iterator[Path]:
    """An empty directory beside *target*, on its file system, for what will be moved into it; removed at the end.

    Args:
        target: that nobody else writes to meanwhile.
        ready: called when that is so, before anything is done: what it raises, leaves all as it was.

    Raises:
        OutputBusyError: another process is writing to *target*.
        OutputError: the directory cannot be made.
    """
    target = Path(os.path.realpath(target))
    staging = _staging(target)
    lock, is_ours = None, False
    try:
        lock = _hold(staging, target)
        with writing(target):
            _take_back(target)
            ready()
            is_ours = True
            _clear(staging)
            sign(staging)
        yield staging
    finally:
        if is_ours or _is_bare(staging):
            remove_held(staging, lock)
        if lock is not None:
            os.close(lock)


def move_in(source: Path, target: Path, paths: Iterable[str]) -> None:
    """Move files and directories of *source*, which are on the disk, to the same relative *paths* of *target*.

    They are in their places, and those on the disk, when this returns; until then, any of them may be.

    Raises:
        OutputError: a link is on the way.
        OSError: the system refuses.
    """
    changed = dict.fromkeys([target])
    for path in paths:
        folder = target
        for part in PurePosixPath(path).parent.parts:
            folder /= part
            if folder.is_symlink():
                raise OutputError(f"{folder}: is a link; remove it, or choose another place")
            folder.mkdir(exist_ok=True)
            changed[folder] = None
        (source / path).replace(target / path)
    for folder in reversed(changed):
        sync_directory(folder)


def _absent(directory: Path) -> list[Path]:
    """Which of a directory and those above it are not there, the innermost first."""
    return [folder for folder in (directory, *directory.parents) if not folder.exists()]


def _remove_empty(made: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty: something else is there by now
        for folder in made:
            folder.rmdir()


def _hold(staging: Path, target: Path) -> int | None:
    """As `lock_directory`; what the system refuses becomes an error of *target*."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return lock_directory(staging, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot write beside it ({error.strerror}); choose another place") from None


def _delete(directory: Path) -> None:
    """Remove a directory, as far as the system lets; what is left, the next writer removes."""
    for _ in range(2):  # where something passed, the second time does what the first did not
        if os.path.lexists(directory):
            shutil.rmtree(directory, ignore_errors=True)


def _is_bare(staging: Path) -> bool:
    """Whether nothing was put into a directory: only hidden files are in it, or it is not there."""
    try:
        return all(entry.name.startswith(".") for entry in staging.iterdir())
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _clear(staging: Path) -> None:
    for entry in staging.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def refuse_read_only(target: Path) -> None:
    """Refuse to write to a directory, or to replace it, that could not be changed or removed; it need not be there.

    Raises:
        OutputError: it, or one in it, may not be written to.
    """
    for directory, _, _ in os.walk(target):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise OutputError(f"{target}: may not be written to (see {directory}); allow that, or choose another place")


def replace_directory(staged: Path, target: Path) -> None:
    """Put a directory in the place of *target*, which is removed, in one step. Who calls it keeps other writers away.

    Raises:
        OSError: the system refuses.
    """
    for directory, _, _ in os.walk(staged):
        sync_directory(Path(directory))
    _put_in_place(staged, target)
    sync_directory(target.parent)


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        staging.replace(target)  # over an empty directory too
        return
    # The old directory is removed under the staging name: locked, so that no other writer takes it for its own.
    with _locked(target):
        if _exchange(staging, target):
            _delete(staging)
        else:
            _step_aside(staging, target)


def _step_aside(staging: Path, target: Path) -> None:
    """Replace *target* in two steps; who is killed between them leaves the old directory for the next to take back."""
    aside = _aside(target)
    try:
        target.replace(aside)
        staging.replace(target)
        _delete(aside)
    except BaseException:
        _take_back(target)
        raise


def _take_back(target: Path) -> None:
    """Undo a step aside that was not finished; where it was, remove what is left of the old directory."""
    aside = _aside(target)
    if not aside.is_dir() or aside.is_symlink():
        return
    if target.exists():
        _delete(aside)
    else:
        aside.replace(target)


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
