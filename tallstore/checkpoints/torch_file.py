"""Files of `torch.save`: .bin, .pt, .pth and .ckpt, of plain weights only."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch

from tallstore.checkpoints.refusals import LFS_POINTER_NBYTES, refuse_lfs_pointer
from tallstore.checkpoints.state_dict import plain_tensors
from tallstore.errors import DamagedCheckpointError, InputError, UnsafeCheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_ZIP_START: Final = b"PK\x03\x04"
_REFERS_TO: Final = re.compile(r"GLOBAL ([\w.]+)")
_SAVE_AGAIN: Final = "save the model's state_dict() with safetensors"


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
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
            start = file.read(LFS_POINTER_NBYTES)
    except OSError as error:
        raise InputError(where, f"cannot be read: {error.strerror}") from None
    refuse_lfs_pointer(path, start)
    is_zip = start.startswith(_ZIP_START)
    try:
        with warnings.catch_warnings():
            # Of unusual pickle protocols: the file loads, or the error says it better.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _unpickling_error(path, str(error), is_zip=is_zip) from None
    except Exception as error:  # noqa: BLE001 - a damaged file makes torch raise anything, from KeyError to OSError
        raise DamagedCheckpointError(
            where, f"is damaged, or was not written by torch.save ({_first_line(error)}); copy or download it again"
        ) from None
    if not isinstance(loaded, Mapping):
        raise InputError(where, f"holds an object of type {type(loaded).__name__}, not a state dict; {_SAVE_AGAIN}")
    return plain_tensors(where, loaded)


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
