"""Companion files: what makes weights a model (config, tokenizer, labels, licence), carried verbatim beside them.

Only plain data, by name and by its first bytes; no weights, no code, no pickles. Files beside the weights are carried,
and those of the few folders that belong to a model; what a trainer leaves there (checkpoints, logs, results) is not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tallstore.caller_warnings import warn
from tallstore.checkpoints import Checkpoint
from tallstore.checkpoints.companion_names import is_companion
from tallstore.checkpoints.refusals import LFS_POINTER_NBYTES, MAX_JSON_NBYTES, refuse_lfs_pointer
from tallstore.errors import InputError
from tallstore.format.layout import clashes, is_companion_name
from tallstore.sizes import readable

MAX_NBYTES: Final = 1_000_000_000
"""Far beyond any tokenizer: what is larger is a data set."""

_MODULES: Final = "modules.json"
_CONFIGS: Final = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_MODEL_FOLDER: Final = re.compile(r"additional_chat_templates|(?:[a-z0-9_]+_)?tokenizer")  # as transformers names them
_OF_TRAINING: Final = re.compile(r"trainer_state\.json|(?:[a-z]+_)*(?:results|predictions)(?:_[^.]*)?\.(?:json|txt)")
_WEIGHT_SUFFIXES: Final = frozenset({".safetensors", ".bin", ".pt", ".pth"})
_PICKLE: Final = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # protocols 2 to 5, and the zip that torch puts them in
_SHOWN: Final = 3


def companions(directory: Path | None) -> dict[str, Path]:
    """The companion files of a Hugging Face directory, by the name that they will have beside the expert's weights.

    Folders count where ``modules.json`` names them (sentence-transformers' ``1_Pooling``), or transformers makes them
    (``additional_chat_templates``, a processor's further tokenizers). Links are followed, as the Hub's cache needs.

    Raises:
        DamagedCheckpointError: one is a Git LFS pointer.
        OSError: a folder cannot be read.
    """
    found = {}
    for name, path in _plain_files(directory):
        if is_companion_name(name) and path.stat().st_size <= MAX_NBYTES and not is_pickle(path):
            refuse_lfs_pointer(path, _start(path))
            found[name] = path
    for name in clashes(found):
        del found[name]
    return found


def is_pickle(path: Path) -> bool:
    """Whether a file begins as binary pickles and torch's files do, whatever its name. Reads a few bytes."""
    return _PICKLE.match(_start(path)) is not None


def _start(path: Path) -> bytes:
    """The first bytes of a regular file; none of what cannot be read, which is said where it is copied."""
    with contextlib.suppress(OSError):
        if path.is_file():  # a pipe would be waited for
            with path.open("rb") as file:
                return file.read(LFS_POINTER_NBYTES)
    return b""


def companions_of(checkpoint: Checkpoint, where: str) -> Mapping[str, Path]:
    """The companion files of a checkpoint: those that it says it has, or those of its directory.

    Raises:
        DamagedCheckpointError: as `companions`.
        InputError: of the input *where*, its directory cannot be read.
    """
    own = checkpoint.origin.companions
    if own is not None or checkpoint.directory is None:
        return own or {}
    with reading(checkpoint.directory, where):
        return companions(checkpoint.directory)


def look_through(directories: Mapping[str, Path | None]) -> tuple[str, ...]:
    """See what experts rely on and a bundle will not have; *directories* are theirs, by task.

    Warns of weights that a bundle does not carry: an export will be without a part of the expert.

    Returns:
        lines for the report: code that a model needs, and files that were left out though they look like companions.

    Raises:
        DamagedCheckpointError: a companion file is a Git LFS pointer.
        InputError: one cannot be read.
    """
    lost: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for task, directory in directories.items():
        if directory is None:
            continue
        with reading(directory, f"expert {task!r} ({directory})"):
            companions(directory)  # what it refuses, it refuses before the work
            for problem in _uncarried_weights(directory):
                lost.setdefault(problem, []).append(task)
            for problem in (*_uncarried_code(directory), *_left_out(directory)):
                missing.setdefault(problem, []).append(task)
    for problem, tasks in lost.items():
        warn(f"{_experts(tasks)}: {problem}")
    return tuple(f"{_experts(tasks)}: {problem}" for problem, tasks in missing.items())


@contextlib.contextmanager
def reading(source: Path, where: str) -> Iterator[None]:
    """Where the system refuses to read *source*, or what is in it, the error is one of the input *where*.

    Raises:
        InputError: in the place of an OSError that names *source*, or a file in it.
    """
    try:
        yield
    except OSError as error:
        refused = None if error.filename is None else Path(os.fsdecode(error.filename))
        if refused is None or source not in (refused, *refused.parents):
            raise
        raise InputError(where, f"{refused} cannot be read: {error.strerror}") from None


def _plain_files(directory: Path | None) -> Iterator[tuple[str, Path]]:
    """Every file that is a companion by its name, its size and its content aside, with its path from *directory*."""
    if directory is None:
        return
    places = [directory.glob("*"), *(_inside(directory / folder) for folder in _folders(directory))]
    for path in sorted(itertools.chain.from_iterable(places)):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if is_companion(path.name) and not hidden and not _OF_TRAINING.fullmatch(path.name) and path.is_file():
            yield relative.as_posix(), path


def _inside(folder: Path) -> Iterator[Path]:
    """What a module keeps there, and in one more level; a name in a bundle has no more."""
    yield from folder.glob("*")
    yield from folder.glob("*/*")


def _folders(directory: Path) -> list[str]:
    """Names of the folders that belong to the model."""
    named = {str(module.get("path")) for module in _modules(directory)}
    return sorted(
        path.name
        for path in directory.iterdir()
        if (path.name in named or _MODEL_FOLDER.fullmatch(path.name)) and is_companion_name(path.name) and path.is_dir()
    )


def _modules(directory: Path) -> list[dict[str, Any]]:
    """The entries of sentence-transformers' modules.json; none where it is not there, or another tool's."""
    parsed = _parsed(directory / _MODULES)
    return [entry for entry in parsed if isinstance(entry, dict)] if isinstance(parsed, list) else []


def _parsed(path: Path) -> object:
    """What a JSON file holds; None where it is not there, too large, or not JSON."""
    try:
        return json.loads(_bytes_of(path)) if path.is_file() and path.stat().st_size <= MAX_JSON_NBYTES else None
    except (ValueError, RecursionError):
        return None


def _bytes_of(path: Path) -> bytes:
    """What a file holds. An error says of which one: what fails in the middle of a read does not."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _uncarried_weights(directory: Path) -> Iterator[str]:
    """Modules of sentence-transformers behind the encoder that have weights."""
    for module in _modules(directory):
        folder = module.get("path")
        if not isinstance(folder, str) or not is_companion_name(folder):
            continue
        held = any(path.suffix in _WEIGHT_SUFFIXES for path in _inside(directory / folder))
        # A Dense always has weights, and of a model on the Hub those of modules are not downloaded.
        if held or str(module.get("type")).endswith(".Dense"):
            yield f"a bundle does not carry the weights of the module {folder!r}; copy that folder's into each export"


def _uncarried_code(directory: Path) -> Iterator[str]:
    code = {f"{module}.py" for module in _code_of_configs(directory)}
    types = {str(entry.get("type")).partition(".")[0] for entry in _modules(directory)}
    code |= {f"{name}.py" for name in types if (directory / f"{name}.py").is_file()}
    if code:
        yield (
            f"a bundle carries no code, and the model needs {_listed(sorted(code))}; copy it into each export, and load"
            " with trust_remote_code=True"
        )


def _code_of_configs(directory: Path) -> Iterator[str]:
    """The modules beside the weights that an auto_map names; not those of other repositories (``org/name--module``)."""
    for name in _CONFIGS:
        config = _parsed(directory / name)
        auto_map = config.get("auto_map") if isinstance(config, dict) else None
        for classes in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in classes if isinstance(classes, list) else [classes]:
                module = str(reference).partition(".")[0]
                if isinstance(reference, str) and module.isidentifier():
                    yield module


def _left_out(directory: Path) -> Iterator[str]:
    plain = dict(_plain_files(directory))
    for name, other in clashes(filter(is_companion_name, plain)).items():
        yield f"left out {name!r}: where case does not count, it cannot lie beside {other!r}; rename it"
    for name, path in plain.items():
        if not is_companion_name(name):
            yield f"left out {name!r}: a bundle's files have names of letters, digits and '._-'; rename it"
        elif path.stat().st_size > MAX_NBYTES:
            yield f"left out {name!r}: it is larger than {readable(MAX_NBYTES)}"
        elif is_pickle(path):
            yield f"left out {name!r}: it is a pickle or an archive by its content"


def _experts(tasks: list[str]) -> str:
    return f"expert{'s' if len(tasks) > 1 else ''} {_listed([repr(task) for task in tasks])}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
