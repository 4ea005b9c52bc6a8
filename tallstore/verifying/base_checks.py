"""An embedded base against base.json, without torch: its files, their headers, and the hash of every chunk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from tallstore.errors import FormatError, IntegrityError
from tallstore.format import layout
from tallstore.format.dtypes import TensorSpec, chunk_count, chunk_span, itemsize
from tallstore.format.manifest import BaseTensor
from tallstore.format.parsing import MAX_JSON_NBYTES
from tallstore.format.payloads import BaseTensors
from tallstore.format.safetensors_header import LENGTH_NBYTES, Entry, HeaderProblem, header_nbytes, parse_header
from tallstore.format.shard_reader import LocalFile
from tallstore.verifying.findings import OpenFile, Problems, attempt

_SINGLE = f"{layout.BASE_DIRECTORY}/model.safetensors"
_INDEX = f"{_SINGLE}.index.json"


@dataclass(frozen=True, slots=True)
class _Weights:
    """Tensors of the base's files.

    Attributes:
        tensors: by name, the file and the place in it.
        complete: whether every file could be read: only then is a tensor that is not here missing.
    """

    tensors: Mapping[str, tuple[LocalFile, Entry]]
    complete: bool


def check_base_files(
    tensors: BaseTensors,
    root: Path,
    listed: Iterable[str],
    places: Mapping[str, Path],
    open_file: OpenFile = LocalFile,
) -> Problems:
    """BASE-1, BASE-2, BASE-4, ST-1, ST-2: the embedded base is the one that base.json describes.

    Reads every byte of the tensors that base.json names; holds one chunk at a time.

    Args:
        tensors: those of base.json.
        root: the bundle's directory.
        listed: the files of the base that the manifest lists.
        places: the files that are here.
        open_file: opens one of them.
    """
    with contextlib.ExitStack() as files:
        index = yield from _find_index(root, set(listed), places)
        weights = yield from _open(index, places, open_file, files)
        tied = _tied_names(tensors)
        for tensor in tensors.values():
            if tensor.alias_of is None:
                yield from _check_tensor(tensor, tied.get(tensor.name, []), weights)


def _open(
    index: Mapping[str, str] | None, places: Mapping[str, Path], open_file: OpenFile, files: contextlib.ExitStack
) -> Generator[FormatError, None, _Weights]:
    """Open the files of an ordinary Hugging Face layout: those of the index, or the single one."""
    paths = [_SINGLE] if index is None else sorted(set(index.values()))
    tensors: dict[str, tuple[LocalFile, Entry]] = {}
    complete = bool(paths)
    for path in paths:
        file = (yield from attempt(path, partial(open_file, places[path], path))) if path in places else None
        entries = None
        if file is not None:
            files.callback(file.close)
            entries = yield from attempt(path, partial(_read_entries, file))
        if file is None or entries is None:
            complete = False
            continue
        for name in sorted(entries.keys() & tensors.keys()):
            yield FormatError("BASE-4", path, f"holds tensor {name[:200]!r}, which {tensors[name][0].where} holds too")
        tensors |= {name: (file, entry) for name, entry in entries.items()}
    for name, path in (index or {}).items() if complete else ():
        if name not in tensors or tensors[name][0].where != path:
            yield FormatError("BASE-4", _INDEX, f"places tensor {name[:200]!r} in {path}, which does not hold it")
    return _Weights(tensors, complete)


def _find_index(
    root: Path, listed: set[str], places: Mapping[str, Path]
) -> Generator[FormatError, None, Mapping[str, str] | None]:
    """Tensor name -> path, as the index has it, empty where it cannot be read; None without an index."""
    if _INDEX not in listed:
        if _SINGLE not in listed:
            problem = f"has neither {Path(_SINGLE).name} nor {Path(_INDEX).name}"
            yield FormatError("BASE-4", layout.BASE_DIRECTORY, problem)
        return None
    index = (yield from attempt(_INDEX, partial(_read_index, root))) if _INDEX in places else None
    for path in sorted(set((index or {}).values()) - listed):
        yield FormatError("BASE-4", _INDEX, f"places tensors in {path[:200]!r}, which the manifest does not list")
    return index or {}


def _read_index(root: Path) -> dict[str, str]:
    """Read the index: tensor name -> path in the bundle."""
    try:
        parsed = json.loads(layout.read_bounded(root, _INDEX, MAX_JSON_NBYTES).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError("BASE-4", _INDEX, f"is not JSON: {error}") from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise FormatError("BASE-4", _INDEX, "has no weight_map from tensors to files")
    return {name: f"{layout.BASE_DIRECTORY}/{file_name}" for name, file_name in weight_map.items()}


def _read_entries(file: LocalFile) -> Mapping[str, Entry]:
    try:
        nbytes = header_nbytes(file.read(0, min(LENGTH_NBYTES, file.nbytes)).tobytes(), file.nbytes)
        return parse_header(file.read(0, nbytes).tobytes(), file.nbytes).tensors
    except HeaderProblem as error:
        raise FormatError(error.rule, file.where, error.problem) from None


def _tied_names(tensors: BaseTensors) -> dict[str, list[str]]:
    """The aliases of each tensor: files keep one of several tied names."""
    tied: dict[str, list[str]] = {}
    for tensor in tensors.values():
        if tensor.alias_of is not None:
            tied.setdefault(tensor.alias_of, []).append(tensor.name)
    return tied


def _check_tensor(tensor: BaseTensor, aliases: list[str], weights: _Weights) -> Problems:
    name = next((name for name in [tensor.name, *aliases] if name in weights.tensors), None)
    if name is None:
        if weights.complete:
            where = f"{layout.BASE_DIRECTORY}, tensor {tensor.name[:200]!r}"
            yield FormatError("BASE-1", where, "is missing from the embedded base")
        return
    file, entry = weights.tensors[name]
    where = f"{file.where}, tensor {name[:200]!r}"
    spec = TensorSpec(tensor.dtype, tensor.shape)
    if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
        problem = f"is {entry.dtype} {list(entry.shape)}, where {spec.dtype} {list(spec.shape)} is due"
        yield FormatError("BASE-1", where, problem)
        return
    if len(tensor.chunks) == chunk_count(spec.numel):  # else base.json itself is wrong, and reported
        for index, start, stop in _chunk_ranges(entry, spec):
            chunk = yield from attempt(file.where, partial(file.read, start, stop))
            if chunk is not None and xxhash.xxh3_128_hexdigest(chunk.data) != tensor.chunks[index]:
                yield IntegrityError("BASE-2", f"{where}, chunk {index}", f"is not what {layout.BASE_TABLE} says")


def _chunk_ranges(entry: Entry, spec: TensorSpec) -> Iterator[tuple[int, int, int]]:
    """Index of each chunk, and where it is in the file."""
    width = itemsize(spec.dtype)
    for index in range(chunk_count(spec.numel)):
        first, last = chunk_span(spec.numel, index)
        yield index, entry.start + first * width, entry.start + last * width
