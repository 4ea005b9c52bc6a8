"""A function of the user's own, by its place in Python: --evaluate and --calibrate MODULE:FUNCTION."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import typer

from tallstore.errors import OptionError

_EVALUATE: Final = "--evaluate"
_CALIBRATE: Final = "--calibrate"

Score = Callable[[str, Any], float]
#: Of a task and its weights, which are torch's: a tensor of one number.
Loss = Callable[[str, Any], Any]


@contextlib.contextmanager
def own_score(place: str) -> Iterator[Score]:
    """Import the score at MODULE:FUNCTION; inside the block, Python finds the current directory's modules.

    Yields:
        the function. What it raises, and what it returns that is no number, becomes an OptionError that says where.

    Raises:
        typer.BadParameter: there is no such module, or no function in it.
        OptionError: the module's own code raised something.
    """
    with _own_function(_EVALUATE, place) as (function, name):
        yield lambda task, weights: _as_number(function(task, weights), name, task)


@contextlib.contextmanager
def own_loss(place: str) -> Iterator[Loss]:
    """Import the loss at MODULE:FUNCTION, as `own_score`; what it returns is for its caller to check."""
    with _own_function(_CALIBRATE, place) as (function, _):
        yield function


@contextlib.contextmanager
def _own_function(option: str, place: str) -> Iterator[tuple[Loss, str]]:
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise typer.BadParameter(f"{place!r} is not MODULE:FUNCTION", param_hint=option)
    if "/" in module or module.endswith(".py"):
        raise typer.BadParameter(
            f"{module!r} is a file; give the module's name, as in {Path(module).stem}:{name}", param_hint=option
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield _one_line_an_error(option, _find(option, module, name), name), name
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(here)


def _find(option: str, module: str, name: str) -> Callable[..., object]:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise typer.BadParameter(
                f"there is no module {error.name!r}; give one that Python finds from here", param_hint=option
            ) from None
        raise _refusal(option, f"importing {module}", error) from error
    if found is None:
        raise typer.BadParameter(f"{module} has no function {name!r}", param_hint=option)
    if not callable(found):
        raise typer.BadParameter(f"{name!r} in {module} is no function: {_short(found)}", param_hint=option)
    function: Callable[..., object] = found
    return function


def _one_line_an_error(option: str, function: Callable[..., object], name: str) -> Loss:
    def call(task: str, weights: Any) -> Any:  # noqa: ANN401 - a state dict, without torch
        try:
            return function(task, weights)
        except Exception as error:
            raise _refusal(option, f"{name} on task {task!r}", error) from error

    return call


def _as_number(found: Any, name: str, task: str) -> float:  # noqa: ANN401 - whatever the user's function gave
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):  # torch's, for a tensor of several elements
        raise OptionError(
            f"{_EVALUATE}: {name} gave {_short(found)} for task {task!r}; return a number, larger where it is better"
        ) from None


def _refusal(option: str, doing: str, error: Exception) -> OptionError:
    """What went wrong in the user's code, and the innermost line of the module that was named."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    where = f" ({Path(frames[0].filename).name}, line {lines[-1]})" if frames else ""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}" if str(error) else type(error).__name__
    return OptionError(f"{option}: {doing} raised {said}{where}")


def _is_ours(file: str) -> bool:
    """Whether a frame is of what calls the user's code: this module, or Python's own import."""
    return file in {__file__, importlib.__file__} or file.startswith("<frozen importlib")


def _short(value: object) -> str:
    """A value's beginning: a tensor's repr is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}…"
