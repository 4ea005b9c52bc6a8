"""`tallstore add`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

import tallstore
from tallstore.cli.inputs import ExpertInput, ExpertsInput, KnownBaseInput, find_experts, read_pairs
from tallstore.cli.options import JsonOption, LocalBundleArgument
from tallstore.cli.packing_options import PackingOptions, WorkOptions
from tallstore.cli.spreading import spread

USAGE: Final = "BUNDLE (--experts DIR|FILE | --expert NAME=PATH …) [OPTIONS]"
EXAMPLES: Final = """\
# one more task; a bundle that has its base, or names it, needs no --base
tallstore add bundle --base bert --expert news=runs/news
# a folder of them, which share a vector with each other
tallstore add bundle --base bert --experts more-runs
# a task that was trained again
tallstore add bundle --base bert --expert mood=runs/mood --replace
# then send what is new
tallstore push bundle org/name"""


@spread
def add(
    bundle: LocalBundleArgument,
    *,
    base: KnownBaseInput = None,
    expert: ExpertInput = None,
    experts: ExpertsInput = None,
    options: PackingOptions,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Put them in the place of tasks that have the same names.", rich_help_panel="Output"
        ),
    ] = False,
    work: WorkOptions,
    as_json: JsonOption = False,
) -> None:
    """Add fine-tunes to a bundle that is there, as one group; tasks that are there stay as they are, byte for byte.

    The bundle changes in one step, when all is written; who reads it meanwhile reads on. One or two experts are coded
    with --method uniform, which shares nothing, unless a method is given.
    """
    given = read_pairs(expert, experts, options.key_mapping)
    options.given()
    source, named = find_experts(base, experts, given)
    with options.arguments("adding", work) as arguments:
        report = tallstore.add(bundle, named, base=source, key_mapping=given.key_mapping, replace=replace, **arguments)
    if as_json:
        from tallstore.cli import terminal  # noqa: PLC0415 - rich

        terminal.print_json(report.to_dict())
        return

    from tallstore.cli.views.packed import print_packed  # noqa: PLC0415 - torch

    print_packed(report)
