"""`tallstore compare`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

import tallstore
from tallstore.cli.inputs import (
    BaseInput,
    ExpertInput,
    ExpertsInput,
    KeyMappingInput,
    PrivateInput,
    find_inputs,
    read_pairs,
)
from tallstore.cli.options import JsonOption

USAGE: Final = "--base BASE (--experts DIR|FILE | --expert NAME=PATH …) [OPTIONS]"
EXAMPLES: Final = """\
# every method at a few settings, predicted on a sample
tallstore compare --base bert --experts fine-tunes
# by your own score on full weights: def accuracy(task, state_dict) -> float
tallstore compare --base bert --experts fine-tunes \\
    --evaluate my_scores:accuracy"""


def compare(
    *,
    base: BaseInput = None,
    expert: ExpertInput = None,
    experts: ExpertsInput = None,
    key_mapping: KeyMappingInput = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="Compare the settings of this method only; can be given again. All methods unless given.",
            rich_help_panel="Method",
            show_default=False,
        ),
    ] = None,
    private: PrivateInput = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Your own score of a task, called with its name and its state dict, larger is better. Every method is"
            " then packed whole and measured.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What each method would make of the same experts: sizes, and how true they stay. Writes nothing.

    Methods that no other beats in both are marked with a star.
    """
    given = read_pairs(expert, experts, key_mapping)
    source, named = find_inputs(base, experts, given)
    scorer = None if evaluate is None else _import(evaluate)

    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich
    from tallstore.packing.comparing import METHODS  # noqa: PLC0415 - torch

    methods = [method for method in METHODS if only is None or method.name in only]
    unknown = set(only or ()) - {method.name for method in METHODS}
    if unknown:
        known = ", ".join(dict.fromkeys(method.name for method in METHODS))
        raise typer.BadParameter(f"{min(unknown)!r} is none of {known}", param_hint="--method")
    with progress_bar.show("comparing", unit="pieces") as progress:
        comparison = tallstore.compare(
            source,
            named,
            methods=methods,
            private=private or (),
            key_mapping=given.key_mapping,
            evaluate=scorer,
            progress=progress,
        )
    if as_json:
        terminal.print_json(comparison.to_dict())
        return

    from tallstore.cli.views.compared import print_comparison  # noqa: PLC0415 - torch

    print_comparison(comparison)


def _import(place: str) -> Callable[[str, Any], float]:
    """The function at MODULE:FUNCTION, the current directory's modules included; a usage error where there is none."""
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise typer.BadParameter(f"{place!r} is not MODULE:FUNCTION", param_hint="--evaluate")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"{error}; give a module that Python finds from here", param_hint="--evaluate"
        ) from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise typer.BadParameter(f"{module} has no function {name!r}", param_hint="--evaluate")
    function: Callable[[str, Any], float] = found
    return function
