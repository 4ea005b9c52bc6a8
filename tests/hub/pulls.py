"""Bundles of a Hub opened and pulled in a client's process: what became of each, and all that was said meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import re
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tallstore
from tallstore.cli import completion
from tallstore.hub import ranges, retrying
from tests import command_line
from tests.hub.listening import listening

NAMES = [f"task {letter}" for letter in "abcdefghijklmnopqrst"]


@dataclass
class Outcome:
    """What a call returned or raised.

    Attributes:
        value: what was returned.
        error, problem: the class and message of what was raised.
        warnings: their texts.
        said: log records down to DEBUG, and the traceback.
    """

    value: Any = None
    error: str | None = None
    problem: str = ""
    warnings: list[str] = field(default_factory=list)
    said: str = ""


def call(process: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any, **options: Any) -> Outcome:
    """Call a function of a module in the *process*, and wait for it."""
    return start(process, function, *arguments, **options).result(timeout=120)


def start(
    process: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Future[Outcome]:
    return process.submit(_call, function, arguments, options)


def _call(function: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]) -> Outcome:
    retrying._WAITS = (0.001,) * 4
    outcome = Outcome()
    with listening() as records, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            outcome.value = function(*arguments, **options)
        except tallstore.TallstoreError as error:
            outcome.error, outcome.problem = type(error).__name__, str(error)
            outcome.said = traceback.format_exc()
    outcome.warnings = [str(warning.message) for warning in warned]
    outcome.said += "\n".join(records)
    return outcome


def name_of(request: pytest.FixtureRequest) -> str:
    """A name for a repository that no other test has."""
    return re.sub(r"[\W_]+", "-", request.node.name)[:80].strip("-")


def contents(path: Path) -> dict[str, bytes]:
    """All files below a directory, by path."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- what is called ---


def digests(source: str | Path, tasks: Sequence[str], **options: Any) -> dict[str, str]:
    """A hash of each expert's tensors."""
    with tallstore.open_bundle(source, **options) as bundle:
        return {task: _digest(bundle.state_dict(task)) for task in tasks}


def _digest(state: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + bytes(tensor.reshape(-1).view(dtype=tensor.dtype).numpy().tobytes()))
    return digest.hexdigest()


def model(source: str, task: str, before: str | None = None, **options: Any) -> tuple[str, str, list[int]]:
    """The class of a task's model, a hash of its tensors, what its tokenizer makes of a text; or of one that switched.

    Args:
        source: the bundle.
        task: the expert's name.
        before: the expert that the model is first.
        options: of `open_bundle`; without any, nothing opens the bundle before.
    """
    from tallstore.transformers import from_bundle, tokenizer_from_bundle  # noqa: PLC0415 - needs the client's settings

    opened = tallstore.open_bundle(source, **options) if options else contextlib.nullcontext(source)
    with opened as bundle:
        found = from_bundle(bundle, before or task)
        if before is not None:
            bundle.attach(found).set_expert(task)
        return (
            type(found).__name__,
            _digest(found.state_dict()),
            tokenizer_from_bundle(bundle, task)("a film").input_ids,
        )


def shown(source: str, **options: Any) -> tuple[str, str, Path, dict[str, bool]]:
    """A bundle's repr and str, its path, and which of its tasks are here."""
    with tallstore.open_bundle(source, **options) as bundle:
        return repr(bundle), str(bundle), bundle.path, {task: bundle.is_fetched(task) for task in bundle.tasks}


def tensor(source: str, task: str, name: str, **options: Any) -> list[float]:
    """One tensor of an expert."""
    with tallstore.open_bundle(source, **options) as bundle:
        return list(bundle.tensor(task, name).reshape(-1).tolist())


def command(*arguments: object, code: int = 0) -> tuple[str, str]:
    """What a command printed, to stdout and stderr."""
    result = command_line.run(*arguments, code=code)
    return result.stdout, result.stderr


def pull_with_progress(repo_id: str, **options: Any) -> list[tuple[int, int]]:
    """What a pull told."""
    told: list[tuple[int, int]] = []
    tallstore.pull(repo_id, progress=lambda *step: told.append(step), **options)
    return told


def completed(source: str, incomplete: str) -> list[str]:
    """The tasks that a shell would offer."""
    context = types.SimpleNamespace(params={"bundle": source}, args=[])
    return completion.task_names(context, incomplete)


def ranged(source: str, task: str, names: Sequence[str], **options: Any) -> tuple[list[str], int]:
    """Hashes of single tensors where every shard counts as large, and the bytes that were read."""
    before = ranges.LARGE_NBYTES, ranges._FIRST_NBYTES
    ranges.LARGE_NBYTES, ranges._FIRST_NBYTES = 0, 512
    try:
        with tallstore.open_bundle(source, **options) as bundle:
            found = [_digest({name: bundle.tensor(task, name)}) for name in names]
            return found, bundle.bytes_read
    finally:
        ranges.LARGE_NBYTES, ranges._FIRST_NBYTES = before


def by_other_ways(source: str, tasks: Sequence[str], **options: Any) -> list[str]:
    """Hashes of three experts: one whose tensors come one by one, one loaded into a model, one switched to."""
    from torch import nn  # noqa: PLC0415 - what most calls do without

    with tallstore.open_bundle(source, **options) as bundle:
        first = dict(bundle.items(tasks[0]))
        model = nn.Module()
        for name, tensor in first.items():
            model.register_buffer(name.replace(".", "_"), tensor.clone())
        state = {name: getattr(model, name.replace(".", "_")) for name in first}
        model.state_dict = lambda *_, **__: state  # type: ignore[assignment,method-assign]
        hashes = [_digest(first)]
        bundle.load_into(model, tasks[1])
        hashes.append(_digest(state))
        bundle.attach(model).set_expert(tasks[2])
        return [*hashes, _digest(state)]


def density(source: str, tasks: Sequence[str] | None, **options: Any) -> float | None:
    """Of the masks of some tasks."""
    with tallstore.open_bundle(source, **options) as bundle:
        return bundle.statistics(tasks).density
