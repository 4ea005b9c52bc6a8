"""`tallstore pack`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

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
from tallstore.cli.methods import GainName, MergedDtype, MethodName, ScaleName, ValuesDtype, given_options, make_method
from tallstore.cli.own_function import own_loss

if TYPE_CHECKING:
    from concurrent.futures import Executor

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

_METHOD, _OUTPUT = "Method", "Output"


def pack(
    *,
    base: BaseInput = None,
    expert: ExpertInput = None,
    experts: ExpertsInput = None,
    key_mapping: KeyMappingInput = None,
    method: Annotated[
        MethodName,
        typer.Option(
            metavar="METHOD",
            help="signed-mask, the default: own signs over a shared magnitude\n"
            "tall-mask: a 0/1 mask over the sum of the task vectors\n"
            "tall-mask-published: the same as in the paper\n"
            "least-squares: masks of least squared error over one or two shared vectors\n"
            "emr: elected signs and masks\n"
            "sign: signs alone, a bit a parameter\n"
            "uniform: own values on a few levels\n"
            "localize: own values of the largest moves\n"
            "auto: the truest of them for each tensor, under a budget",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = MethodName.SIGNED_MASK,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of signed-mask, 1.2 unless given, and of uniform with 3 levels: larger is smaller and less true.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    mask_lambda: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of tall-mask: larger gives thinner masks; 1.0 unless given.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="MERGE",
            help="Of tall-mask: how task vectors are merged: sum, the default, ties or mean; or a merged checkpoint.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    normalise: Annotated[
        bool | None,
        typer.Option(
            "--normalise",
            help="Of tall-mask: bring the experts' tensors to one size before they are merged.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    gain: Annotated[
        GainName | None,
        typer.Option(
            metavar="GAIN",
            help="Of all methods but auto: one keeps each expert's full step along its task vector, least-squares makes"
            " the error smallest, published is the paper's; one unless given, but published for emr.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of least-squares, 1 or 2 shared vectors; of uniform, 3, 4, 8 or 16.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        ScaleName | None,
        typer.Option(
            metavar="SCALE",
            help="Of signed-mask, least-squares, sign and uniform: what has a scale of its own, a tensor or a row.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of localize: the share of all parameters to keep; 0.01 unless given.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    values_dtype: Annotated[
        ValuesDtype | None,
        typer.Option(
            metavar="DTYPE",
            help="Of localize: how values are stored: float16, the default, bfloat16 or float32.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    centre: Annotated[
        bool | None,
        typer.Option(
            "--centre",
            help="Of sign and uniform: share the mean of the task vectors, and code what is left.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    max_bits: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of auto: what a coded parameter may cost, its share of the shared vectors included.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Refine the gains on your own loss: a function of a task and its state dict that gives a tensor of one"
            " number, how far its outputs are from the true expert's; see tallstore.Calibration.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    merged_dtype: Annotated[
        MergedDtype | None,
        typer.Option(
            metavar="DTYPE",
            help="How shared vectors are stored: log4 (signed-mask only, and its default), int8 (the others'"
            " default), float16, bfloat16 or float32.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    private: PrivateInput = None,
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
    no_compress: Annotated[
        bool,
        typer.Option(
            "--no-compress",
            help="Compress nothing: a larger bundle that has nothing to decompress when it is loaded.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Do everything and report it, but write no bundle.", rich_help_panel=_OUTPUT),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the bundle that is there.", rich_help_panel=_OUTPUT),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Pack on so many processes instead of this one's threads: the same bundle.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for scripts.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Pack fine-tunes of one base into a bundle."""
    given = read_pairs(expert, experts, key_mapping)
    options = given_options(
        method,
        {
            "threshold": threshold,
            "mask_lambda": mask_lambda,
            "merge": merge,
            "normalise": normalise,
            "gain": gain,
            "levels": levels,
            "scale": scale,
            "density": density,
            "values_dtype": values_dtype,
            "centre": centre,
            "max_bits": max_bits,
        },
    )
    source, named = find_inputs(base, experts, given)

    from tallstore.cli import progress_bar, terminal  # noqa: PLC0415 - rich

    with contextlib.ExitStack() as stack:
        loss = None if calibrate is None else stack.enter_context(own_loss(calibrate))
        executor = stack.enter_context(_processes(workers))
        progress = stack.enter_context(progress_bar.show("packing"))
        report = tallstore.pack(
            source,
            named,
            out,
            method=make_method(method, options),
            merged_dtype=None if merged_dtype is None else merged_dtype.value,
            private=private or (),
            key_mapping=given.key_mapping,
            calibrate=None if loss is None else tallstore.Calibration(loss),
            embed_base=embed_base,
            base_ref=base_ref,
            compress=not no_compress,
            overwrite=overwrite,
            dry_run=dry_run,
            executor=executor,
            progress=progress,
        )
    if as_json:
        terminal.print_json(report.to_dict())
        return

    from tallstore.cli.views.packed import print_packed  # noqa: PLC0415 - torch

    print_packed(report, embedded=embed_base)


def _processes(workers: int | None) -> contextlib.AbstractContextManager[Executor | None]:
    """So many processes to pack on; None where none are asked for."""
    if workers is None:
        return contextlib.nullcontext()

    import multiprocessing  # noqa: PLC0415 - what is seldom asked for is loaded where it is
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415

    # Begun anew: a forked process would inherit torch's state, but not its threads.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
