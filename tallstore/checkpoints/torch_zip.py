"""What an archive of `torch.save` holds: its pickle, and where the bytes of its tensors are, to be read and not mapped.

torch maps the file whole and does not say where; the archive's directory does, and the two are the same but for one
distance, which all storages have in common.
"""

from __future__ import annotations

import mmap
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

import torch

_LOCAL_HEADER_NBYTES: Final = 30


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of an archive.

    Attributes:
        start: the first byte of its content in the file.
        nbytes: of the content; unpacked, if it is compressed.
    """

    name: str
    start: int
    nbytes: int
    is_compressed: bool

    @property
    def is_pickle(self) -> bool:
        """Whether torch may take it for the pickle that says what tensors there are."""
        return self.name.rpartition("/")[2] == "data.pkl"


def records(file: BinaryIO) -> tuple[Record, ...]:
    """Every entry of an archive.

    Raises:
        OSError: the file cannot be read.
        zipfile.BadZipFile, NotImplementedError, ValueError: it is no archive, or of an unknown kind.
    """
    found = []
    for entry in zipfile.ZipFile(file).infolist():
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER_NBYTES)
        names_nbytes = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER_NBYTES + names_nbytes
        found.append(Record(entry.filename, start, entry.file_size, entry.compress_type != zipfile.ZIP_STORED))
    return tuple(found)


def byte_offsets(records: Iterable[Record], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The first byte of each contiguous tensor in its file, by name.

    Args:
        records: of the archive; none is compressed.
        tensors: that were mapped from it, detached.

    Returns:
        nothing where that cannot be told for certain.
    """
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors.values() if tensor.device.type == "cpu")
        if storage.nbytes()
    }
    distance = _distance(storages, {record.start: record.nbytes for record in records})
    if distance is None:
        return {}
    return {
        name: tensor.data_ptr() - distance
        for name, tensor in tensors.items()
        if tensor.untyped_storage().data_ptr() in storages and _is_as_stored(tensor)
    }


def _is_as_stored(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _distance(storages: Mapping[int, int], sizes: Mapping[int, int]) -> int | None:
    """Between an address and its place in the file; None where there is not exactly one that fits all storages."""
    if not storages:
        return None
    address, nbytes = max(storages.items(), key=lambda item: item[1])
    fitting = [
        address - offset
        for offset, size in sizes.items()
        if size == nbytes
        and (address - offset) % mmap.ALLOCATIONGRANULARITY == 0
        and all(sizes.get(other - (address - offset)) == length for other, length in storages.items())
    ]
    return fitting[0] if len(fitting) == 1 else None
