"""The methods by their names on the command line, and which options go with which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import typer

import tallstore

if TYPE_CHECKING:
    from tallstore.fit import Method


class MethodName(str, Enum):
    """How task vectors are coded."""

    SIGNED_MASK = "signed-mask"
    TALL_MASK = "tall-mask"
    TALL_MASK_PUBLISHED = "tall-mask-published"
    LEAST_SQUARES = "least-squares"
    EMR = "emr"
    SIGN = "sign"
    UNIFORM = "uniform"
    LOCALIZE = "localize"
    AUTO = "auto"


class GainName(str, Enum):
    """How a reconstruction is scaled."""

    ONE = "one"
    LEAST_SQUARES = "least-squares"
    PUBLISHED = "published"


class ScaleName(str, Enum):
    """What has a scale of its own."""

    TENSOR = "tensor"
    ROW = "row"


class ValuesDtype(str, Enum):
    """How an expert's own values are stored."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class MergedDtype(str, Enum):
    """How the values of the shared vector are stored."""

    LOG4 = "log4"
    INT8 = "int8"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


# The class of each method in `tallstore`, and its arguments that are options here.
_METHODS: Final[Mapping[MethodName, tuple[str, frozenset[str]]]] = {
    MethodName.SIGNED_MASK: ("SignedMask", frozenset({"threshold", "scale", "gain"})),
    MethodName.TALL_MASK: ("TallMask", frozenset({"mask_lambda", "merge", "normalise", "gain"})),
    MethodName.TALL_MASK_PUBLISHED: ("TallMask", frozenset()),
    MethodName.LEAST_SQUARES: ("LeastSquares", frozenset({"levels", "scale", "gain"})),
    MethodName.EMR: ("Emr", frozenset({"gain"})),
    MethodName.SIGN: ("Sign", frozenset({"scale", "gain", "centre"})),
    MethodName.UNIFORM: ("Uniform", frozenset({"levels", "scale", "gain", "threshold", "centre"})),
    MethodName.LOCALIZE: ("Localize", frozenset({"density", "values_dtype", "gain"})),
    MethodName.AUTO: ("Auto", frozenset({"max_bits"})),
}
_NEEDED: Final = {MethodName.AUTO: "max_bits"}


def given_options(name: MethodName, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a method's options that were given; a usage error where one goes with others, or one is missing."""
    given = {option: value for option, value in options.items() if value is not None}
    foreign = given.keys() - _METHODS[name][1]
    if foreign:
        option = min(foreign)
        methods = [method.value for method, (_, known) in _METHODS.items() if option in known]
        raise typer.BadParameter(f"goes with --method {_either(methods)}, not {name.value}", param_hint=_flag(option))
    needed = _NEEDED.get(name)
    if needed is not None and needed not in given:
        raise typer.BadParameter(f"give it with --method {name.value}", param_hint=_flag(needed))
    return {option: value.value if isinstance(value, Enum) else value for option, value in given.items()}


def make_method(name: MethodName, options: Mapping[str, Any]) -> Method:
    """The method with *options*, as `given_options` gave them. Imports torch.

    Raises:
        OptionError: a value is outside its range.
    """
    method = getattr(tallstore, _METHODS[name][0])
    made: Method = method.published() if name is MethodName.TALL_MASK_PUBLISHED else method(**options)
    return made


def check_compared(names: Iterable[MethodName]) -> None:
    """A usage error where one has no settings to compare."""
    if MethodName.AUTO in names:
        raise typer.BadParameter("auto chooses among the others; give one of those", param_hint="--method")


def compared_settings(names: Collection[MethodName]) -> list[Method] | None:
    """What `compare` takes of the methods of *names*; None, which is all of it, without any. Imports torch."""
    if not names:
        return None
    from tallstore.packing.comparing import METHODS  # noqa: PLC0415 - torch

    return [method for method in METHODS if _name_of(method) in names or MethodName(method.name) in names]


def as_options(method: Method) -> str:
    """A method of `compare` as it is typed behind `tallstore pack --method`. Imports torch."""
    name = _name_of(method)
    words = [str(name.value)]
    for field in () if name is MethodName.TALL_MASK_PUBLISHED else fields(method):
        value = getattr(method, field.name)
        if value != field.default:
            words += [_flag(field.name)] if value is True else [_flag(field.name), str(value)]
    return " ".join(words)


def _name_of(method: Method) -> MethodName:
    is_published = method == tallstore.TallMask.published()
    return MethodName.TALL_MASK_PUBLISHED if is_published else MethodName(method.name)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _either(methods: Iterable[str]) -> str:
    *others, last = methods
    return f"{', '.join(others)} or {last}" if others else last
