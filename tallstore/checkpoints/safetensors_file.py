"""Checkpoints in safetensors files, read range by range."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from tallstore.checkpoints.checkpoint import Checkpoint, Origin
from tallstore.checkpoints.refusals import LFS_POINTER_NBYTES, refuse_lfs_pointer, refuse_unmerged_names
from tallstore.errors import DamagedCheckpointError, InputError
from tallstore.format.dtypes import DTYPES, TensorSpec
from tallstore.format.safetensors_header import Entry, HeaderProblem, UnknownDtypeProblem, header_nbytes, parse_header

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping
    from io import FileIO
    from pathlib import Path

    from numpy.typing import NDArray

_SHARED_NUMBERS: Final = 2  # of a file's version
_COPIED_NBYTES: Final = 1 << 17  # to map so few, and to be given their pages one by one, takes longer
_CHANGED: Final = "was changed while it was read; start again"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file.

    Attributes:
        tensors: where each is in the file.
        version: the file's when its header was read, as `_version` tells it, or the part of it that other machines
            share.
    """

    path: Path
    tensors: Mapping[str, Entry]
    version: tuple[int, ...]


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
            status = os.fstat(file.fileno())
            start = file.read(LFS_POINTER_NBYTES)
            refuse_lfs_pointer(path, start)
            file.seek(0)
            header = parse_header(file.read(header_nbytes(start, status.st_size)), status.st_size)
    except OSError as error:
        raise InputError(where, f"cannot be read: {error.strerror}") from None
    except UnknownDtypeProblem as problem:
        raise InputError(where, f"{problem.problem}; convert that tensor first") from None
    except HeaderProblem as problem:
        raise DamagedCheckpointError(where, f"{problem.problem}; copy or download the file again") from None
    refuse_unmerged_names(where, header.tensors)
    return Shard(path, header.tensors, _version(status))


class SafetensorsCheckpoint(Checkpoint):
    """Tensors in one safetensors file or several shards.

    A read copies its range, unless it is to be mapped and is not small: the system ends whoever looks at what was
    mapped of a file that somebody has shortened, and a copy is what was verified, whatever becomes of the file. No file
    is kept open: a hundred experts of ten shards are a thousand files. Mapping whole files, as torch and safetensors
    do, fails where a file is larger than memory.
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
        shards = {path: replace(shard, version=shard.version[:_SHARED_NUMBERS]) for path, shard in self._shards.items()}
        return {**super().__getstate__(), "_shards": shards}

    def version(self, name: str) -> Hashable:
        """As `Checkpoint.version`; of one file's two times of change nobody can set one back."""
        path = self._places[name]
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(str(path), f"cannot be read: {error.strerror}") from None
        return _version(status), status.st_ctime_ns

    def _flat_bytes(self, name: str, start: int, stop: int, *, mapped: bool) -> NDArray[np.uint8]:
        shard = self._shards[self._places[name]]
        entry = shard.tensors[name]
        if start == stop:
            return np.empty(0, np.uint8)
        width = DTYPES[entry.dtype]
        return _read(shard, entry.start + start * width, entry.start + stop * width, mapped=mapped)

    def _release(self) -> None:
        """Nothing is held."""


def _spec(entry: Entry) -> TensorSpec:
    return TensorSpec(entry.dtype, entry.shape)


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Numbers that change with the file. Machines that mount it number devices, and maybe files, as they like."""
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def _read(shard: Shard, first: int, end: int, *, mapped: bool) -> NDArray[np.uint8]:
    """Bytes [*first*, *end*) of the file, in memory of their own, or mapped as long as the array lives.

    Raises:
        DamagedCheckpointError: the file is not the one whose header was read.
        InputError: it cannot be read.
    """
    try:
        with open(shard.path, "rb", buffering=0) as file:  # noqa: PTH123 - twice as fast as the path's own method
            if _version(os.fstat(file.fileno()))[: len(shard.version)] != shard.version:
                raise DamagedCheckpointError(str(shard.path), _CHANGED)
            if not mapped or end - first <= _COPIED_NBYTES:
                return _copy(shard, file, first, end)
            # Private and writable: torch wants arrays that can be written to, and the file must not be.
            aligned = first - first % mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(file.fileno(), end - aligned, access=mmap.ACCESS_COPY, offset=aligned)
    except OSError as error:
        raise InputError(str(shard.path), f"cannot be read: {error.strerror}") from None
    return np.frombuffer(pages, np.uint8, offset=first - aligned)


def _copy(shard: Shard, file: FileIO, first: int, end: int) -> NDArray[np.uint8]:
    copied = np.empty(end - first, np.uint8)
    file.seek(first)
    done = 0
    while done < copied.size:
        count = file.readinto(copied[done:].data)
        if not count:
            raise DamagedCheckpointError(str(shard.path), _CHANGED)
        done += count
    return copied
