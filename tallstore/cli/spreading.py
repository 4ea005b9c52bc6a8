"""Options that several commands declare once: the fields of a dataclass become options of the command that takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its parameters that are dataclasses in their places, as typer reads it.

    A field's annotation is that of an option, and its default the option's.
    """
    parameters: list[inspect.Parameter] = []
    bundled: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        options = parameter.annotation
        if not is_dataclass(options) or not isinstance(options, type):
            parameters.append(parameter)
            continue
        bundled[parameter.name] = options
        hints = get_type_hints(options, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(options)
        ]

    @wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401 - what the options say
        for name, options in bundled.items():
            given[name] = options(**{field.name: given.pop(field.name) for field in fields(options)})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
