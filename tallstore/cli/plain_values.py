"""Texts and paths of the command line, without the library that typer converts every value with.

typer 0.29 and later hand each parameter, given or not, to pydantic, whose import takes as long as numpy's: half of the
time that `inspect` takes in all. What was not given needs no conversion, nor does a text; a path is made of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_MAKERS: Final[dict[Any, Callable[[Any], Any]]] = {
    str: str,
    Path: Path,
    list[str]: lambda values: [str(value) for value in values],
}


@dataclass(frozen=True)
class _Plain:
    """How a parameter's value is made of what was typed; *otherwise* gives typer's own way, for all other values."""

    otherwise: Callable[[], Any]

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ANN401 - typer's
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        make = _MAKERS.get(getattr(param.type_descriptor, "annotation", None))
        return self.otherwise().coerce(value, param=param, ctx=ctx) if make is None else make(value)


def spare_pydantic(parameter: Any) -> None:  # noqa: ANN401 - of a class of typer's
    """Let a parameter convert texts and paths itself; those of other typers, older or newer, stay as they are.

    A path is not looked at here: what is missing or must not be read is said by who opens it.
    """
    own = getattr(parameter, "get_runtime_param", None)
    if own is None or not hasattr(parameter, "type_descriptor"):
        return
    if "get_runtime_param" not in vars(parameter):  # once
        plain = _Plain(own)
        parameter.get_runtime_param = lambda: plain
