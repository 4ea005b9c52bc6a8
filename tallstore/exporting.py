"""`export`: experts of a bundle as Hugging Face directories, their own companion files beside their weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tallstore import files
from tallstore.caller_warnings import warn
from tallstore.checkpoints import writer as checkpoint_writer
from tallstore.checkpoints.companion_names import SUFFIXES, is_companion
from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES
from tallstore.checkpoints.writer import MAX_SHARD_NBYTES
from tallstore.errors import IntegrityError, NotFetchedError, OutputExistsError, OutputInsideInputError
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL, TensorSpec
from tallstore.format.manifest import CompanionFile
from tallstore.format.owners import Task
from tallstore.loading.bundle import Bundle
from tallstore.meter import Meter, Progress
from tallstore.packing.companions import companions, is_pickle, reading

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_SHOWN_NAMES = 3
_PIECE_NUMEL = 8 * CHUNK_NUMEL  # rebuilt and written at a time: large tensors need no more memory than others


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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return asdict(self) | {"path": str(self.path)}


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
        Memory for 2^23 elements, whatever the tensors' sizes; each is rebuilt and written once.

    Raises:
        UnknownTaskError: *task* is not in the bundle.
        NotFetchedError: some of its files are not here.
        OutputError: *out* is there already, overlaps an input, or another process is writing it.
        IntegrityError: bytes of the bundle are not the ones that were written.
        BaseError: the base is missing, or another one.
    """
    target = Path(out)
    expert = _files(bundle).task(task)
    with files.writing(target):
        _check_output(target, (bundle.path, *map(Path, inputs)), overwrite=overwrite)
    return _write(bundle, expert, target, max_shard_nbytes, _meter([expert], progress))


def export_all(
    bundle: Bundle,
    out: str | os.PathLike[str],
    *,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    progress: Progress | None = None,
) -> tuple[Exported, ...]:
    """Write every expert of a bundle, each to the directory of its slug in *out*, one after the other.

    Nothing is written unless all tasks are here and all directories are free. Then each directory appears in one step;
    on an error, and on Ctrl-C, those that were finished stay.

    Args:
        bundle: the bundle, with its base.
        out: the directory of directories; what else is in it is left alone.
        max_shard_nbytes: as of `export`.
        overwrite: replace earlier exports in those directories.
        inputs: as of `export`.
        progress: called with bytes of tensors done, and in all, over all experts.

    Returns:
        what was written, in the order of the bundle's tasks.

    Raises:
        NotFetchedError: some tasks' files are not here.
        OutputError, IntegrityError, BaseError: as `export`.
    """
    entries = bundle.manifest.tasks
    tables = _files(bundle)
    absent = [entry.name for entry in entries if not tables.brings and not bundle.is_fetched(entry.name)]
    if absent:
        count = f"{len(absent)} of {len(entries)} tasks were not fetched"
        raise NotFetchedError(f"{bundle.path}: {count} ({_listed(absent)}); fetch them, or export the others by name")
    targets = [Path(out) / entry.slug for entry in entries]
    for target in targets:
        with files.writing(target):
            _check_output(target, (bundle.path, *map(Path, inputs)), overwrite=overwrite)
    experts = tables.tables_of(entry.name for entry in entries)
    meter = _meter(experts, progress)
    return tuple(
        _write(bundle, expert, target, max_shard_nbytes, meter) for expert, target in zip(experts, targets, strict=True)
    )


def export_merged(
    bundle: Bundle,
    merge: Callable[[], Mapping[str, torch.Tensor]],
    out: str | os.PathLike[str],
    *,
    name: str = "merged",
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Exported:
    """Write one merged model to *out*, as `Bundle.consensus` or `Bundle.stitch` makes it, with the base's own files.

    Args:
        bundle: that it was merged from, for the base's config and tokenizer.
        merge: makes the weights, by name; called once *out* is known to be free.
        out: the directory; it appears in one step, complete.
        name: of the result, for the report.
        max_shard_nbytes: as of `export`.
        overwrite: replace an earlier export that is at *out*.
        inputs: as of `export`.

    Raises:
        OutputError, BaseError: as `export`.
    """
    target = Path(out)
    with files.writing(target):
        _check_output(target, (bundle.path, *map(Path, inputs)), overwrite=overwrite)
    weights = merge()
    specs = {key: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in weights.items()}

    def read(key: str) -> Iterator[bytes]:
        yield from _pieces(weights[key])

    base = bundle.base_directory
    with contextlib.nullcontext() if base is None else reading(base, "the base"):
        carried = companions(base)
    with files.staged_directory(target) as staged, files.writing(Path(os.path.realpath(target))):
        written = checkpoint_writer.write_checkpoint(staged, specs, read, max_shard_nbytes=max_shard_nbytes)
        nbytes = sum(file.size for file in written.values())
        for file, source in carried.items():
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            with reading(source, "the base"):
                nbytes += files.write_file(staged / file, source).size
    return Exported(name, target, len(specs), nbytes, tuple(written), tuple(carried))


def _files(bundle: Bundle) -> BundleFiles:
    return bundle._files  # noqa: SLF001 - this package's


def _pieces(tensor: torch.Tensor) -> Iterator[bytes]:
    """The little-endian bytes of a tensor."""
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    for start in range(0, raw.size, CHUNK_NUMEL):
        yield raw[start : start + CHUNK_NUMEL].tobytes()


def _meter(experts: Iterable[Task], progress: Progress | None) -> Meter:
    """Of the bytes of all tensors of *experts*, a phase each."""
    return Meter(progress, [sum(spec.nbytes for spec in _specs(expert).values()) for expert in experts] or [0])


def _specs(expert: Task) -> dict[str, TensorSpec]:
    """What each tensor is, which must be known before the first of them is rebuilt."""
    return {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in expert.tensors.items()}


def _write(bundle: Bundle, expert: Task, target: Path, max_shard_nbytes: int, meter: Meter) -> Exported:
    """Write one expert to the directory *target*, which is free."""
    task = expert.entry.name
    specs = _specs(expert)
    _files(bundle).bring([expert])

    def read(name: str) -> Iterator[bytes]:
        numel = specs[name].numel
        for start in range(0, numel, _PIECE_NUMEL):
            part = bundle._range(task, name, start, min(start + _PIECE_NUMEL, numel))  # noqa: SLF001 - this package's
            yield part.view(torch.uint8).numpy().tobytes()
            meter.advance(part.nbytes)

    with files.staged_directory(target) as staged, files.writing(Path(os.path.realpath(target))):
        weights = checkpoint_writer.write_checkpoint(staged, specs, read, max_shard_nbytes=max_shard_nbytes)
        carried = copy_companions(bundle, expert, staged)
    meter.end_phase()
    return Exported(
        task=task,
        path=target,
        tensors=len(specs),
        nbytes=sum(file.size for file in weights.values()) + sum(file.size for file in carried),
        weights=tuple(weights),
        companions=tuple(file.name for file in carried),
    )


def copy_companions(
    bundle: Bundle, expert: Task, directory: Path, only: Collection[str] | None = None
) -> tuple[CompanionFile, ...]:
    """Copy a task's companion files to a directory, under their own names; their bytes are checked.

    Args:
        bundle: that has them.
        expert: the task, as its table has it.
        directory: is there.
        only: names of those that are wanted; all by default.

    Returns:
        those that were copied: files that are no plain data are left out, with a warning.

    Raises:
        NotFetchedError: one of them is not here.
        IntegrityError: one is not the one that was written.
    """
    carried = _companions(bundle, expert, only)
    for file, source in carried.items():
        _copy_companion(file, source, directory)
    return tuple(carried)


def _companions(bundle: Bundle, expert: Task, only: Collection[str] | None) -> dict[CompanionFile, Path]:
    """The companion files that are plain data: a bundle from elsewhere brings no code, no pickles, no other weights."""
    carried = {}
    for file in expert.table.files:
        if only is not None and file.name not in only:
            continue
        if not is_companion(file.name):
            warn(f"left out the companion file {file.name!r}: it is none of {', '.join(sorted(SUFFIXES))}")
            continue
        if _is_in_the_way(file.name):
            warn(f"left out the companion file {file.name!r}: it would lie where the weights are written")
            continue
        source = _files(bundle).companion(expert, file)
        if is_pickle(source):
            warn(f"left out the companion file {file.name!r}: it is a pickle or an archive by its content")
        else:
            carried[file] = source
    return carried


def _copy_companion(file: CompanionFile, source: Path, directory: Path) -> None:
    """Copy one companion file to its name; its bytes are checked against its sha256."""
    destination = directory / file.name
    destination.parent.mkdir(parents=True, exist_ok=True)
    path = layout.companion_path(file.sha256)
    try:
        written = files.write_file(destination, source)
    except OSError as error:
        if error.filename is not None and os.fsdecode(error.filename) == str(source):
            raise layout.unreadable(path, error) from None
        raise
    if (written.size, written.sha256) != (file.size, file.sha256):
        raise IntegrityError("FILE-2", path, "changed since it was written; fetch the file again")


def _check_output(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    resolved = target.resolve()
    for place in filter(os.path.exists, inputs):
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
        raise OutputExistsError(f"{target}: holds what no export wrote ({_listed(foreign)}); choose another place")
    if any(target.iterdir()) and not overwrite:
        raise OutputExistsError(f"{target}: is there already; choose another place, or give overwrite=True")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _foreign_files(directory: Path) -> list[str]:
    """The files of a directory that cannot be an earlier export's; all of them where there are no weights."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    if not any(name in _WEIGHTS for name in names):
        return names
    return [name for name in names if not is_companion(name) and not _is_weight_file(name)]


def _is_in_the_way(companion: str) -> bool:
    """Whether a folder of a companion file has the name of a weight file, or of one that is being written."""
    folders = companion.lower().split("/")[:-1]
    return any(_is_weight_file(folder) or folder.endswith(files.STAGED_SUFFIX) for folder in folders)


def _is_weight_file(name: str) -> bool:
    is_shard = name.startswith("model-") and name.endswith(".safetensors") and "/" not in name
    return is_shard or name in _WEIGHTS
