"""`export`: one expert of a bundle as a Hugging Face directory, its own companion files beside its weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from tallstore import files
from tallstore.checkpoints import writer as checkpoint_writer
from tallstore.checkpoints.writer import MAX_SHARD_NBYTES
from tallstore.errors import IntegrityError, NotFetchedError, OutputExistsError, OutputInsideInputError
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL, TensorSpec
from tallstore.format.manifest import CompanionFile
from tallstore.loading.bundle import Bundle
from tallstore.packing.companions import SUFFIXES

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        task: its name.
        path: the directory.
        tensors: how many, ties counted each.
        nbytes: of all files.
        weights, companions: names of the files.
    """

    task: str
    path: Path
    tensors: int
    nbytes: int
    weights: tuple[str, ...]
    companions: tuple[str, ...]


def export(
    bundle: Bundle,
    task: str,
    out: str | os.PathLike[str],
    *,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    progress: Progress | None = None,
) -> Exported:
    """Write one expert to *out* as ``from_pretrained`` reads it: weights in safetensors, config, tokenizer, labels.

    The directory appears in one step, complete; on any error, and on Ctrl-C, *out* is as it was. Tied tensors are
    written under each of their names.

    Args:
        bundle: the bundle, with its base.
        task: the expert's name.
        out: the directory.
        max_shard_nbytes: weights beyond this go to several files under one index.
        overwrite: replace an earlier export that is at *out*; never anything that holds other files than an export's.
        inputs: further places that must not be replaced, such as the base's; those that are no path are ignored.
        progress: called with bytes of tensors done, and in all.

    Cost:
        One tensor in memory at a time; each is rebuilt and written once.

    Raises:
        UnknownTaskError: *task* is not in the bundle.
        NotFetchedError: some of its files are not here.
        OutputError: *out* is there already, overlaps an input, or another process is writing it.
        IntegrityError: bytes of the bundle are not the ones that were written.
        BaseError: the base is missing, or another one.
    """
    # The tables once more: what each tensor is must be known before the first of them is rebuilt.
    opened = BundleFiles(bundle.path).task(task)
    specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()}
    target = Path(out)
    _check_output(target, (bundle.path, *map(Path, inputs)), overwrite=overwrite)
    total = sum(spec.nbytes for spec in specs.values())
    done = 0

    def read(name: str) -> Iterator[bytes]:
        nonlocal done
        raw = bundle.tensor(task, name).reshape(-1).view(torch.uint8).numpy()
        for start in range(0, raw.size, CHUNK_NUMEL):
            piece = raw[start : start + CHUNK_NUMEL].tobytes()
            yield piece
            done += len(piece)
            if progress is not None:
                progress(done, total)

    if progress is not None:
        progress(done, total)
    with files.staged_directory(target) as staged, files.writing(Path(os.path.realpath(target))):
        weights = checkpoint_writer.write_checkpoint(staged, specs, read, max_shard_nbytes=max_shard_nbytes)
        carried = [file for file in opened.table.files if _may_be_carried(file.name)]
        for file in carried:
            _copy_companion(bundle.path, task, file, staged)
    return Exported(
        task=task,
        path=target,
        tensors=len(specs),
        nbytes=sum(file.size for file in weights.values()) + sum(file.size for file in carried),
        weights=tuple(weights),
        companions=tuple(file.name for file in carried),
    )


def _may_be_carried(name: str) -> bool:
    """Whether a companion file is plain data: a bundle from elsewhere brings no code, and no other weights."""
    if _is_companion_of_an_export(name):
        return True
    warnings.warn(f"left out the companion file {name!r}: it is none of {', '.join(sorted(SUFFIXES))}", stacklevel=3)
    return False


def _is_companion_of_an_export(name: str) -> bool:
    return PurePosixPath(name).suffix in SUFFIXES and not name.lower().endswith(_INDEX_SUFFIXES)


def _copy_companion(root: Path, task: str, file: CompanionFile, staged: Path) -> None:
    """Copy one companion file to its name; its bytes are checked against its sha256."""
    path = layout.companion_path(file.sha256)
    try:
        source = layout.resolve(root, path)
    except FileNotFoundError:
        raise NotFetchedError(
            f"{root}: the file {file.name!r} of task {task!r} was not fetched ({path} is not here);"
            f" copy it from where the bundle came from"
        ) from None
    destination = staged / file.name
    destination.parent.mkdir(parents=True, exist_ok=True)
    written = files.write_file(destination, source)
    if (written.size, written.sha256) != (file.size, file.sha256):
        raise IntegrityError("FILE-2", path, "changed since it was written; fetch the file again")


def _check_output(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    resolved = target.resolve()
    for place in filter(Path.exists, inputs):
        other = place.resolve()
        if resolved == other or other in resolved.parents:
            raise OutputInsideInputError(f"{target}: lies inside the input {place}; choose another place")
        if resolved in other.parents:
            raise OutputInsideInputError(f"{target}: holds the input {place}; choose another place")
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(f"{target}: is a file; choose another place")
    foreign = _foreign_files(target)
    if foreign:
        more = f" and {len(foreign) - _SHOWN_NAMES} more" if len(foreign) > _SHOWN_NAMES else ""
        listed = ", ".join(foreign[:_SHOWN_NAMES]) + more
        raise OutputExistsError(f"{target}: holds what no export wrote ({listed}); choose another place")
    if any(target.iterdir()) and not overwrite:
        raise OutputExistsError(f"{target}: is there already; choose another place, or give overwrite=True")


def _foreign_files(directory: Path) -> list[str]:
    """The files of a directory that cannot be an earlier export's; all of them where there are no weights."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    if not any(name in _WEIGHTS for name in names):
        return names
    return [name for name in names if not _is_companion_of_an_export(name) and not _is_weight_file(name)]


def _is_weight_file(name: str) -> bool:
    is_shard = name.startswith("model-") and name.endswith(".safetensors") and "/" not in name
    return is_shard or name in _WEIGHTS
