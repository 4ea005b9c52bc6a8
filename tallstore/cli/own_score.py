"""A score of the user's own, by its place in Python: --evaluate MODULE:FUNCTION."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from tallstore.errors import OptionError

_OPTION = "--evaluate"

Score = Callable[[str, Any], float]


@contextlib.contextmanager
def own_score(place: str) -> Iterator[Score]:
    """Import the function at MODULE:FUNCTION; inside the block, Python finds the current directory's modules.

    Yields:
        the function. What it raises, and what it returns that is no number, becomes an OptionError that says where.

    Raises:
        typer.BadParameter: there is no such module, or no function in it.
        OptionError: the module's own code raised something.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise typer.BadParameter(f"{place!r} is not MODULE:FUNCTION", param_hint=_OPTION)
    if "/" in module or module.endswith(".py"):
        raise typer.BadParameter(
            f"{module!r} is a file; give the module's name, as in {Path(module).stem}:{name}", param_hint=_OPTION
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield _one_line_an_error(_find(module, name), name)
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(here)


def _find(module: str, name: str) -> Callable[..., object]:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise typer.BadParameter(
                f"there is no module {error.name!r}; give one that Python finds from here", param_hint=_OPTION
            ) from None
        raise _refusal(f"importing {module}", error) from error
    if found is None:
        raise typer.BadParameter(f"{module} has no function {name!r}", param_hint=_OPTION)
    if not callable(found):
        raise typer.BadParameter(f"{name!r} in {module} is no function: {_short(found)}", param_hint=_OPTION)
    function: Callable[..., object] = found
    return function


def _one_line_an_error(function: Callable[..., object], name: str) -> Score:
    def score(task: str, weights: Any) -> float:  # noqa: ANN401 - a state dict, without torch
        try:
            found: Any = function(task, weights)
        except Exception as error:
            raise _refusal(f"{name} on task {task!r}", error) from error
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError):  # torch's, for a tensor of several elements
            raise OptionError(
                f"{_OPTION}: {name} gave {_short(found)} for task {task!r}; return a number, larger where it is better"
            ) from None

    return score


def _refusal(doing: str, error: Exception) -> OptionError:
    """What went wrong in the user's code, and the innermost line of the module that was named."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    where = f" ({Path(frames[0].filename).name}, line {lines[-1]})" if frames else ""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return OptionError(f"{_OPTION}: {doing} raised {said}{where}")


def _is_ours(file: str) -> bool:
    """Whether a frame is of what calls the user's code: this module, or Python's own import."""
    return file in {__file__, importlib.__file__} or file.startswith("<frozen importlib")


def _short(value: object) -> str:
    """A value's beginning: a tensor's repr is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}…"
