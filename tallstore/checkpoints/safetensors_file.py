"""Checkpoints in safetensors files, each range read, or mapped, when it is asked for."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from tallstore.checkpoints.checkpoint import Checkpoint, Origin
from tallstore.checkpoints.file_version import (
    SHARED_NUMBERS,
    Version,
    check_open,
    check_version,
    read_range,
    settled_version,
    unreadable,
    version_of,
)
from tallstore.checkpoints.refusals import LFS_POINTER_NBYTES, refuse_lfs_pointer, refuse_unmerged_names
from tallstore.errors import DamagedCheckpointError, InputError
from tallstore.format.dtypes import DTYPES, TensorSpec
from tallstore.format.safetensors_header import Entry, HeaderProblem, UnknownDtypeProblem, header_nbytes, parse_header

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_POPULATE_READ: Final = 22  # Linux's MADV_POPULATE_READ, which Python has no name for
_COPIED_NBYTES: Final = 1 << 17  # to map so few, and to be given their pages one by one, takes longer


@dataclass(frozen=True, slots=True)
class Shard:
    """One file.

    Attributes:
        tensors: where each is in the file.
        version: the file's when its header was read, or the part of it that other machines share.
    """

    path: Path
    tensors: Mapping[str, Entry]
    version: Version


def read_shard(path: Path) -> Shard:
    """Parse the header of the file at *path*; reads no tensor.

    Raises:
        DamagedCheckpointError: the file is truncated or breaks the format.
        AdapterCheckpointError, QuantizedCheckpointError: its names say that it is not a model's.
        InputError: it cannot be read, or holds a dtype that cannot be stored.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            version = settled_version(path, file)
            size = version[0]
            start = file.read(LFS_POINTER_NBYTES)
            refuse_lfs_pointer(path, start)
            file.seek(0)
            header = parse_header(file.read(header_nbytes(start, size)), size)
            check_open(path, file, version)
    except OSError as error:
        raise unreadable(path, error) from None
    except UnknownDtypeProblem as problem:
        raise InputError(where, f"{problem.problem}; convert that tensor first") from None
    except HeaderProblem as problem:
        raise DamagedCheckpointError(where, f"{problem.problem}; copy or download the file again") from None
    refuse_unmerged_names(where, header.tensors)
    return Shard(path, header.tensors, version)


class SafetensorsCheckpoint(Checkpoint):
    """Tensors in one safetensors file or several shards.

    A read copies its range, or maps it where that was asked for and it is not small: the system ends whoever looks at
    what was mapped of a file that somebody has shortened, and a copy is what was verified, whatever becomes of the
    file. No file is kept open: a hundred experts of ten shards are a thousand files. Mapping whole files, as torch and
    safetensors do, fails where a file is larger than memory.
    """

    def __init__(self, origin: Origin, shards: Mapping[Path, Shard], places: Mapping[str, Path]) -> None:
        """Take what `read_shard` returned for each file, and the file of each tensor."""
        self._shards = shards
        self._places = places
        super().__init__(origin, {name: _spec(shards[path].tensors[name]) for name, path in places.items()})

    def part(self, names: Iterable[str]) -> SafetensorsCheckpoint:
        """The same files, with the headers' entries of *names* alone."""
        places = {name: self._places[name] for name in names}
        held: dict[Path, dict[str, Entry]] = {}
        for name, path in places.items():
            held.setdefault(path, {})[name] = self._shards[path].tensors[name]
        shards = {path: replace(self._shards[path], tensors=tensors) for path, tensors in held.items()}
        return SafetensorsCheckpoint(self.origin, shards, places)

    def __getstate__(self) -> dict[str, object]:
        """Without what only this machine calls the files by."""
        shards = {path: replace(shard, version=shard.version[:SHARED_NUMBERS]) for path, shard in self._shards.items()}
        return {**super().__getstate__(), "_shards": shards}

    def check_unchanged(self) -> None:
        """As `Checkpoint.check_unchanged`."""
        for shard in self._shards.values():
            check_version(shard.path, shard.version)

    def version(self, name: str) -> Hashable:
        """As `Checkpoint.version`; of one file's two times of change nobody can set one back."""
        path = self._places[name]
        try:
            status = path.stat()
        except OSError as error:
            raise unreadable(path, error) from None
        return version_of(status), status.st_ctime_ns

    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        shard, first, end = self._range(name, start, stop)
        return read_range(shard.path, shard.version, first, end)

    def _mapped_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        shard, first, end = self._range(name, start, stop)
        return _map(shard, first, end) if end - first > _COPIED_NBYTES else self._flat_bytes(name, start, stop)

    def _range(self, name: str, start: int, stop: int) -> tuple[Shard, int, int]:
        """A tensor's file, and the first byte and the end of some of its elements there."""
        shard = self._shards[self._places[name]]
        entry = shard.tensors[name]
        width = DTYPES[entry.dtype]
        return shard, entry.start + start * width, entry.start + stop * width

    def _release(self) -> None:
        """Nothing is held."""


def _spec(entry: Entry) -> TensorSpec:
    return TensorSpec(entry.dtype, entry.shape)


def _map(shard: Shard, first: int, end: int) -> NDArray[np.uint8]:
    """Bytes [*first*, *end*) of the file, mapped as long as the array lives.

    Raises:
        DamagedCheckpointError: the file is not the one whose header was read.
        InputError: it cannot be read.
    """
    aligned = first - first % mmap.ALLOCATIONGRANULARITY
    try:
        with open(shard.path, "rb", buffering=0) as file:  # noqa: PTH123 - twice as fast as the path's own method
            check_open(shard.path, file, shard.version)
            # Private and writable: torch wants arrays that can be written to, and the file must not be.
            mapped = mmap.mmap(file.fileno(), end - aligned, access=mmap.ACCESS_COPY, offset=aligned)
        _populate(mapped)
    except OSError as error:
        raise unreadable(shard.path, error) from None
    return np.frombuffer(mapped, np.uint8, offset=first - aligned)


def _populate(mapped: mmap.mmap) -> None:
    """Have all pages come now: where one cannot be read, that is an error here, and would later end the process.

    Raises:
        OSError: EIO.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mapped.madvise(_POPULATE_READ)
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
        # Linux of before 5.14 does not know it.
