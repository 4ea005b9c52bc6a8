"""`tallstore repack`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

import tallstore
from tallstore.cli.inputs import ExpertInput, ExpertsInput, KnownBaseInput, Pairs, find_experts, read_pairs
from tallstore.cli.options import JsonOption, LocalBundleArgument, TasksOption
from tallstore.cli.packing_options import PackingOptions, WorkOptions
from tallstore.cli.spreading import spread

USAGE: Final = "BUNDLE (--experts DIR|FILE | --expert NAME=PATH … | --reconstructions) [OPTIONS]"
EXAMPLES: Final = """\
# after many an add: one group again, from the original fine-tunes
tallstore repack bundle --base bert --experts fine-tunes
# two of the tasks, with another method
tallstore repack bundle --base bert --experts fine-tunes \\
    --task spam --task mood --method sign
# without the originals: what was lost stays lost, and more comes on top
tallstore repack bundle --base bert --reconstructions"""


@spread
def repack(
    bundle: LocalBundleArgument,
    *,
    task: TasksOption = None,
    base: KnownBaseInput = None,
    expert: ExpertInput = None,
    experts: ExpertsInput = None,
    reconstructions: Annotated[
        bool,
        typer.Option(
            "--reconstructions",
            help="Pack what the bundle rebuilds of tasks whose original is not given; errors add up.",
            rich_help_panel="Inputs",
        ),
    ] = False,
    options: PackingOptions,
    work: WorkOptions,
    as_json: JsonOption = False,
) -> None:
    """Pack tasks of a bundle again, as one group: those that were added one by one then share vectors.

    The originals are needed, unless --reconstructions allows to do without; of a folder of experts, those of the
    tasks' names are taken. The bundle changes in one step, and groups that lose all their tasks go.
    """
    given = read_pairs(expert, experts, options.key_mapping, needed=not reconstructions)
    options.given()
    source, found = find_experts(base, experts, Pairs({}, {}))
    with options.arguments("repacking", work) as arguments:
        if found:
            with tallstore.open_bundle(bundle) as opened:
                wanted = set(task or opened.tasks)
            found = {name: path for name, path in found.items() if name in wanted}
        report = tallstore.repack(
            bundle,
            {**found, **given.experts},
            tasks=task or None,
            base=source,
            key_mapping=given.key_mapping,
            reconstructions=reconstructions,
            **arguments,
        )
    if as_json:
        from tallstore.cli import terminal  # noqa: PLC0415 - rich

        terminal.print_json(report.to_dict())
        return

    from tallstore.cli.views.packed import print_packed  # noqa: PLC0415 - torch

    print_packed(report)
