"""Downloads of a bundle's files: several at a time, each checked as it comes in, the wrong ones removed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

from tallstore.errors import FormatError, IntegrityError, OutputError
from tallstore.files import hash_file
from tallstore.format import layout
from tallstore.format.manifest import FileEntry
from tallstore.hub.bars import StoppedError, bar_class
from tallstore.hub.changes import RemoteFile
from tallstore.hub.pinned import PinnedRepository, discard
from tallstore.meter import Meter, Progress
from tallstore.sizes import readable

MAX_WORKERS: Final = 8


def download(
    repository: PinnedRepository,
    entries: Sequence[FileEntry],
    room: Path,
    *,
    local_dir: Path | None = None,
    max_workers: int = MAX_WORKERS,
    progress: Progress | None = None,
) -> None:
    """Download files of the manifest into the Hub's cache, or under *local_dir*.

    One request for all of them comes first: sizes and hashes that the Hub has must be those of the manifest. Then two
    requests a file; every byte that arrives is hashed once. Where one file fails, the others are broken off; those that
    were finished stay.

    Args:
        repository: that has them.
        entries: of its manifest.
        room: where the disk must have room for them.
        local_dir: where to put them; None for the cache.
        max_workers: how many at a time.
        progress: is told bytes that arrived, and in all.

    Raises:
        IntegrityError: FILE-1 or FILE-2, the Hub has another file, or another one arrived; it was removed.
        FormatError: FILE-4, the Hub does not have it.
        OutputError: there is no room.
        HubError: the Hub refuses, or cannot be reached.
    """
    check_promises(repository.where, entries, repository.describe([entry.path for entry in entries]))
    check_room(repository.where, room, sum(entry.size for entry in entries))
    meter = Meter(progress, [sum(entry.size for entry in entries)])
    stop = threading.Event()
    bar = bar_class(stop, None if progress is None else meter.advance)
    pool = ThreadPoolExecutor(max_workers, "tallstore-download")
    try:
        running = [pool.submit(_download_one, repository, entry, bar, local_dir) for entry in entries]
        wait(running, return_when=FIRST_EXCEPTION)
        errors = [each.exception() for each in running if each.done()]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    for error in sorted(filter(None, errors), key=lambda each: isinstance(each, StoppedError)):
        raise error
    meter.end_phase()


def _download_one(repository: PinnedRepository, entry: FileEntry, bar: type[Any], local_dir: Path | None) -> None:
    place = repository.download(entry.path, bar, local_dir)
    problem = difference(place, entry)
    if problem is not None:
        discard(place)
        raise IntegrityError(
            problem[0], f"{repository.where}, {entry.path}", f"{problem[1]}; it was removed, try again"
        )


def difference(place: Path, entry: FileEntry) -> tuple[str, str] | None:
    """The rule that a file breaks, and how; None where it is the manifest's. Reads it, unless its size is wrong."""
    with layout.readable(entry.path):
        size = place.stat().st_size
        if size != entry.size:
            return "FILE-1", f"came with {size} bytes, the manifest says {entry.size}"
        sha256 = hash_file(place).sha256
    if sha256 != entry.sha256:
        return "FILE-2", "came with another sha256 than the manifest says"
    return None


def check_promises(where: str, entries: Sequence[FileEntry], told: Mapping[str, RemoteFile]) -> None:
    """Compare what the Hub says of files with what the manifest says.

    Raises:
        FormatError: FILE-1, FILE-2, FILE-4 or FILE-5: they are of two minds.
    """
    for entry in entries:
        problem = broken_promise(entry, told.get(entry.path))
        if problem is not None:
            kind = FormatError if problem[0] == "FILE-4" else IntegrityError
            raise kind(problem[0], f"{where}, {entry.path}", f"{problem[1]}; it was pushed by halves, or changed")


def broken_promise(entry: FileEntry, told: RemoteFile | None) -> tuple[str, str] | None:
    """The rule that a file of the Hub breaks, and how; None where it is the manifest's, as far as the Hub says."""
    if told is None:
        return "FILE-4", "is not in the repository"
    if told.size != entry.size:
        return "FILE-1", f"has {told.size} bytes on the Hub, the manifest says {entry.size}"
    if told.sha256 is not None:
        is_same = told.sha256 == entry.sha256
        return None if is_same else ("FILE-2", "has another sha256 on the Hub than the manifest says")
    if entry.git_oid not in {None, told.git_oid}:
        return "FILE-5", "has another git blob id on the Hub than the manifest says"
    return None


def check_room(where: str, directory: Path, nbytes: int) -> None:
    """Refuse what does not fit on the disk.

    Raises:
        OutputError: it does not.
    """
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise OutputError(
            f"{where}: {readable(nbytes)} are to be downloaded, and {readable(free)} are free in {directory}; "
            "make room there, or choose another place"
        )
