"""Where in a file of `torch.save` the bytes of its tensors are, so that they can be read as well as mapped.

torch maps the file whole and does not say where; the archive's directory does, and the two are the same but for one
distance, which all storages have in common.
"""

from __future__ import annotations

import mmap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final

import torch

_LOCAL_HEADER_NBYTES: Final = 30


def byte_offsets(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The first byte of each contiguous tensor in the file at *path*, by name.

    Args:
        path: an archive of `torch.save`.
        tensors: that were mapped from it, detached.

    Returns:
        nothing where that cannot be told for certain.

    Raises:
        OSError: the file cannot be read.
    """
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors.values() if tensor.device.type == "cpu")
        if storage.nbytes()
    }
    with path.open("rb") as file:
        records = _records(file)
    distance = _distance(storages, records)
    if distance is None:
        return {}
    return {
        name: tensor.data_ptr() - distance
        for name, tensor in tensors.items()
        if tensor.untyped_storage().data_ptr() in storages and _is_as_stored(tensor)
    }


def _is_as_stored(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _distance(storages: Mapping[int, int], records: Mapping[int, int]) -> int | None:
    """Between an address and its place in the file; None where there is not exactly one that fits all storages."""
    if not storages:
        return None
    address, nbytes = max(storages.items(), key=lambda item: item[1])
    fitting = [
        address - offset
        for offset, size in records.items()
        if size == nbytes
        and (address - offset) % mmap.ALLOCATIONGRANULARITY == 0
        and all(records.get(other - (address - offset)) == length for other, length in storages.items())
    ]
    return fitting[0] if len(fitting) == 1 else None


def _records(file: BinaryIO) -> dict[int, int]:
    """The first byte of everything that the archive stores as it is, and its length."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # torch may be more lenient
        return {}
    found = {}
    for entry in entries:
        if entry.compress_type == zipfile.ZIP_STORED:
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER_NBYTES)
            names_nbytes = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            found[entry.header_offset + _LOCAL_HEADER_NBYTES + names_nbytes] = entry.file_size
    return found
