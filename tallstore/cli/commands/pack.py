"""`tallstore pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

import tallstore
from tallstore.cli.inputs import BaseInput, ExpertInput, ExpertsInput, find_inputs, read_pairs
from tallstore.cli.packing_options import PackingOptions, WorkOptions
from tallstore.cli.spreading import spread

USAGE: Final = "--base BASE (--experts DIR|FILE | --expert NAME=PATH …) --out DIR [OPTIONS]"
EXAMPLES: Final = """\
# a folder of experts, each of the name of its directory
tallstore pack --base bert --experts fine-tunes --out bundle
# experts by name, and the base in the bundle too
tallstore pack --base bert --embed-base --out bundle \\
    --expert spam=fine-tunes/spam --expert mood=fine-tunes/mood
# experts from a file; paths in it start at the file
tallstore pack --experts experts.toml --out bundle
#   base = "bert"
#   [experts]
#   spam = "fine-tunes/spam"
#   mood = "hub:org/bert-mood@main"
# how small and how true it would be
tallstore pack --base bert --experts fine-tunes --out bundle \\
    --threshold 1.5 --dry-run"""

_OUTPUT = "Output"


@spread
def pack(
    *,
    base: BaseInput = None,
    expert: ExpertInput = None,
    experts: ExpertsInput = None,
    options: PackingOptions,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the bundle goes.", rich_help_panel=_OUTPUT, show_default=False),
    ],
    embed_base: Annotated[
        bool,
        typer.Option(
            "--embed-base",
            help="Put the base into the bundle, so that it needs no other.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    base_ref: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME@SHA",
            help="Where readers get the base on the Hub: its name, and the 40 digits of a commit.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    work: WorkOptions,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the bundle that is there.", rich_help_panel=_OUTPUT),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for scripts.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Pack fine-tunes of one base into a bundle."""
    given = read_pairs(expert, experts, options.key_mapping)
    options.given()
    source, named = find_inputs(base, experts, given)
    with options.arguments("packing", work) as arguments:
        report = tallstore.pack(
            source,
            named,
            out,
            key_mapping=given.key_mapping,
            embed_base=embed_base,
            base_ref=base_ref,
            overwrite=overwrite,
            **arguments,
        )
    if as_json:
        from tallstore.cli import terminal  # noqa: PLC0415 - rich

        terminal.print_json(report.to_dict())
        return

    from tallstore.cli.views.packed import print_packed  # noqa: PLC0415 - torch

    print_packed(report, embedded=embed_base)
