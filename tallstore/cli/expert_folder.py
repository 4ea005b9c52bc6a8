"""The folder of `--experts`: which experts it holds."""

from __future__ import annotations

import os
from pathlib import Path

from tallstore.checkpoints.directory import STANDARD_FILES
from tallstore.errors import InputError, OptionError

_SUFFIX = ".safetensors"
_STANDARD_NAMES = tuple(name for pair in STANDARD_FILES for name in pair)


def find_experts(directory: Path, base: str | os.PathLike[str] | None) -> dict[str, Path]:
    """The experts in a folder by name, in the order of their names.

    Every sub-directory that holds a checkpoint is an expert of its name, and so is every .safetensors file, without the
    suffix. The base is left out if it lies there, and so is whatever begins with a dot.

    Args:
        directory: the folder.
        base: the base, if it is a path; anything else is ignored. None where it is not known.

    Raises:
        InputError: *directory* cannot be read, is itself a checkpoint, or holds no expert.
        OptionError: a file and a sub-directory would have the same name.
    """
    where = str(directory)
    try:
        entries = sorted(directory.iterdir(), key=lambda path: path.name)
    except NotADirectoryError:
        raise InputError(where, "is a file; give a folder of experts, or a .toml file that lists them") from None
    except OSError as error:
        raise InputError(where, f"cannot be read ({error.strerror}); give a folder of experts") from None
    if any((directory / name).exists() for name in _STANDARD_NAMES):
        raise InputError(where, "is a checkpoint itself, not a folder of them; give the folder that it is in")
    found: dict[str, Path] = {}
    for path in entries:
        if path.name.startswith(".") or not _is_checkpoint(path) or (base is not None and _is_base(path, Path(base))):
            continue
        name = path.name if path.is_dir() else path.name.removesuffix(_SUFFIX)
        if name in found:
            raise OptionError(f"experts: {where} has two of the name {name!r}, a folder and a file; rename one of them")
        found[name] = path
    if not found:
        raise InputError(
            where, f"holds no expert: no folder with a checkpoint, and no {_SUFFIX} file, other than the base"
        )
    return found


def _is_checkpoint(path: Path) -> bool:
    if not path.is_dir():
        return path.suffix == _SUFFIX
    return any((path / name).exists() for name in _STANDARD_NAMES) or any(path.glob(f"*{_SUFFIX}"))


def _is_base(path: Path, base: Path) -> bool:
    """Whether *path* is the base, or the directory that the base's file is in."""
    try:
        return path.samefile(base) or (base.is_file() and path.samefile(base.parent))
    except OSError:  # a Hub id, or a path that `pack` will complain about
        return False
