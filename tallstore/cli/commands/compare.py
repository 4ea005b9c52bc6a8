"""`tallstore compare`."""

from __future__ import annotations

import contextlib
from typing import Annotated, Final

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
from tallstore.cli.methods import MethodName, as_options, check_compared, compared_settings
from tallstore.cli.options import JsonOption
from tallstore.cli.own_function import own_score

USAGE: Final = "--base BASE (--experts DIR|FILE | --expert NAME=PATH …) [OPTIONS]"
EXAMPLES: Final = """\
# every method at a few settings, predicted on a sample
tallstore compare --base bert --experts fine-tunes
# two of them, for scripts
tallstore compare --base bert --experts fine-tunes \\
    --method signed-mask --method sign --json
# by your own score, in my_scores.py here, on full weights
#   def accuracy(task, state_dict):
#       …
#       return right / count
tallstore compare --base bert --experts fine-tunes \\
    --method signed-mask --evaluate my_scores:accuracy"""


def compare(
    *,
    base: BaseInput = None,
    expert: ExpertInput = None,
    experts: ExpertsInput = None,
    key_mapping: KeyMappingInput = None,
    only: Annotated[
        list[MethodName] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="A method of `tallstore pack`, but auto, to compare at its settings; can be given again. All unless"
            " given.",
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
    check_compared(only or ())
    source, named = find_inputs(base, experts, given)

    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich

    with contextlib.ExitStack() as stack:
        score = None if evaluate is None else stack.enter_context(own_score(evaluate))
        progress = stack.enter_context(progress_bar.show("comparing", unit="pieces"))
        comparison = tallstore.compare(
            source,
            named,
            methods=compared_settings(only or ()),
            private=private or (),
            key_mapping=given.key_mapping,
            evaluate=score,
            progress=progress,
        )
    if as_json:
        terminal.print_json(comparison.to_dict())
        return

    from tallstore.cli.views.compared import print_comparison  # noqa: PLC0415 - torch

    print_comparison(comparison, [as_options(row.method) for row in comparison.rows])
