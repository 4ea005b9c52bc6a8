"""Files of `torch.save`: .bin, .pt, .pth and .ckpt, of plain weights only; mapped, and read where that must be safe."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from tallstore.checkpoints.checkpoint import Origin
from tallstore.checkpoints.file_version import Version, check_version, read_range, settled_version, unreadable
from tallstore.checkpoints.pickle_cost import CostlyPickleError, refuse_costly
from tallstore.checkpoints.refusals import LFS_POINTER_NBYTES, refuse_lfs_pointer
from tallstore.checkpoints.state_dict import StateDictCheckpoint, plain_tensors
from tallstore.checkpoints.torch_zip import Record, byte_offsets, records
from tallstore.errors import DamagedCheckpointError, InputError, UnsafeCheckpointError
from tallstore.format.dtypes import DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_ZIP_START: Final = b"PK\x03\x04"
_OLD_PICKLES: Final = 5  # one after the other, in files of before torch 1.6; the storages follow
_REFERS_TO: Final = re.compile(r"GLOBAL ([\w.]+)")
_MAX_EXPANDED_NBYTES: Final = 16 << 20  # of a view that repeats its elements: buffers such as position ids
_SAVE_AGAIN: Final = "save the model's state_dict() with safetensors"


@dataclass(frozen=True)
class TorchFile:
    """A file that was loaded.

    Attributes:
        tensors: mapped, or in memory where the file is of before torch 1.6.
        version: the file's.
        offsets: the first byte in the file of those tensors that can be read.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    version: Version
    offsets: Mapping[str, int] = field(default_factory=dict)


class TorchFilesCheckpoint(StateDictCheckpoint):
    """Tensors in one file of `torch.save`, or in several shards."""

    def __init__(self, origin: Origin, files: Mapping[Path, TorchFile], places: Mapping[str, Path]) -> None:
        """Take what `load_file` returned for each file, and the file of each tensor."""
        super().__init__(origin, {name: files[path].tensors[name] for name, path in places.items()})
        self._files, self._places = files, places

    def part(self, names: Iterable[str]) -> TorchFilesCheckpoint:
        """The tensors *names* alone, tied or not."""
        return TorchFilesCheckpoint(self.origin, self._files, {name: self._places[name] for name in names})

    def check_unchanged(self) -> None:
        """As `Checkpoint.check_unchanged`."""
        for file in self._files.values():
            check_version(file.path, file.version)

    def __getstate__(self) -> dict[str, object]:
        """For `pickle`: the bytes of each tensor, and of no file."""
        return {**super().__getstate__(), "_files": {}, "_places": {}}

    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        if name not in self._places:  # it came by `pickle`
            return super()._flat_bytes(name, start, stop)
        file = self._files[self._places[name]]
        offset = file.offsets.get(name)
        if offset is not None:
            width = DTYPES[self.spec(name).dtype]
            return read_range(file.path, file.version, offset + start * width, offset + stop * width)
        copied = super()._flat_bytes(name, start, stop).copy()
        check_version(file.path, file.version)
        return copied

    def _mapped_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        return super()._flat_bytes(name, start, stop)

    def _release(self) -> None:
        super()._release()
        self._files = {}


def load_file(path: Path) -> TorchFile:
    """Map the tensors of a file that `torch.save` wrote; one of before torch 1.6 is read into memory whole.

    Nothing in the file is executed.

    Raises:
        UnsafeCheckpointError: the pickle has more than plain weights.
        DamagedCheckpointError: the file is truncated, or `torch.save` did not write it.
        InputError: as `plain_tensors`, or the file cannot be read.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            version = settled_version(path, file)
            start = file.read(LFS_POINTER_NBYTES)
    except OSError as error:
        raise unreadable(path, error) from None
    refuse_lfs_pointer(path, start)
    is_zip = start.startswith(_ZIP_START)
    archived = _refuse_unloaded(path, is_zip=is_zip)
    try:
        with warnings.catch_warnings():
            # Of unusual pickle protocols: the file loads, or the error says it better.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _unpickling_error(path, str(error), is_zip=is_zip) from None
    except Exception as error:  # noqa: BLE001 - a damaged file makes torch raise anything, from KeyError to OSError
        raise _damaged(path, error) from None
    if not isinstance(loaded, Mapping):
        raise InputError(where, f"holds an object of type {type(loaded).__name__}, not a state dict; {_SAVE_AGAIN}")
    tensors = plain_tensors(where, loaded)
    for name, tensor in tensors.items():
        if max(tensor.untyped_storage().nbytes(), _MAX_EXPANDED_NBYTES) < tensor.numel() * tensor.element_size():
            raise InputError(where, f"tensor {name!r} repeats its elements beyond what the file holds; {_SAVE_AGAIN}")
    check_version(path, version)
    return TorchFile(path, tensors, version, byte_offsets(archived, tensors))


def _refuse_unloaded(path: Path, *, is_zip: bool) -> tuple[Record, ...]:
    """Refuse what torch would load wrong, or without end.

    Returns:
        what an archive holds; nothing of other files.

    Raises:
        DamagedCheckpointError: it is an archive with compressed entries, whose bytes torch would map as if they were
            weights, or one that nothing but torch can read.
        UnsafeCheckpointError: a pickle in it would take any time or memory.
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            archived = records(file) if is_zip else ()
            if any(record.is_compressed for record in archived):
                raise DamagedCheckpointError(str(path), f"is compressed, as torch.save writes no file; {_SAVE_AGAIN}")
            for record in archived:
                if record.is_pickle:
                    file.seek(record.start)
                    refuse_costly(io.BytesIO(file.read(record.nbytes)))
            for _ in range(0 if is_zip else _OLD_PICKLES):
                refuse_costly(file)
    except CostlyPickleError as error:
        raise UnsafeCheckpointError(str(path), f"is a pickle that {error}; {_SAVE_AGAIN}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from None
    return archived


def _damaged(path: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        str(path), f"is damaged, or was not written by torch.save ({_first_line(error)}); copy or download it again"
    )


def _unpickling_error(path: Path, message: str, *, is_zip: bool) -> InputError:
    named = _REFERS_TO.search(message)
    if named:
        what = f"refers to {named[1]}, more than plain weights"
    elif is_zip or _is_pickle(path):
        what = "holds more than plain weights"
    else:
        return DamagedCheckpointError(str(path), "is not a file that torch.save wrote; copy or download it again")
    return UnsafeCheckpointError(str(path), f"is a pickle that {what}; it was not executed; {_SAVE_AGAIN}")


def _is_pickle(path: Path) -> bool:
    """Whether the file begins with a whole pickle of any protocol; parses without executing."""
    try:
        with path.open("rb") as file:
            for _ in pickletools.genops(file):
                pass
    except Exception:  # noqa: BLE001 - what is no pickle makes the parser raise anything, too
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:200]}" if lines else type(error).__name__
