"""How experts are packed: the options of every command that packs some, and what the library takes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import tallstore
from tallstore.cli.inputs import KeyMappingInput, PrivateInput
from tallstore.cli.methods import (
    GainName,
    MergedDtype,
    MethodName,
    ScaleName,
    ValuesDtype,
    given_options,
    make_method,
)
from tallstore.cli.own_function import own_loss

if TYPE_CHECKING:
    from concurrent.futures import Executor

_METHOD, _OUTPUT = "Method", "Output"
_OF_METHODS: Final = (
    "threshold",
    "mask_lambda",
    "merge",
    "normalise",
    "gain",
    "levels",
    "scale",
    "density",
    "values_dtype",
    "centre",
    "max_bits",
)


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """How packing goes to work."""

    no_compress: Annotated[
        bool,
        typer.Option(
            "--no-compress",
            help="Compress nothing: a larger bundle that has nothing to decompress when it is loaded.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Do everything and report it, but write nothing.", rich_help_panel=_OUTPUT),
    ] = False
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Pack on so many processes instead of this one's threads: the same bundle.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """The method and its options; None for what was not given."""

    method: Annotated[
        MethodName | None,
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
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of signed-mask, 1.2 unless given, and of uniform with 3 levels: larger is smaller and less true.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    mask_lambda: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of tall-mask: larger gives thinner masks; 1.0 unless given.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="MERGE",
            help="Of tall-mask: how task vectors are merged: sum, the default, ties or mean; or a merged checkpoint.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    normalise: Annotated[
        bool | None,
        typer.Option(
            "--normalise",
            help="Of tall-mask: bring the experts' tensors to one size before they are merged.",
            rich_help_panel=_METHOD,
        ),
    ] = None
    gain: Annotated[
        GainName | None,
        typer.Option(
            metavar="GAIN",
            help="Of all methods but auto: one keeps each expert's full step along its task vector, least-squares makes"
            " the error smallest, published is the paper's; one unless given, but published for emr.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    levels: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of least-squares, 1 or 2 shared vectors; of uniform, 3, 4, 8 or 16.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    scale: Annotated[
        ScaleName | None,
        typer.Option(
            metavar="SCALE",
            help="Of signed-mask, least-squares, sign and uniform: what has a scale of its own, a tensor or a row.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    density: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of localize: the share of all parameters to keep; 0.01 unless given.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    values_dtype: Annotated[
        ValuesDtype | None,
        typer.Option(
            metavar="DTYPE",
            help="Of localize: how values are stored: float16, the default, bfloat16 or float32.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    centre: Annotated[
        bool | None,
        typer.Option(
            "--centre",
            help="Of sign and uniform: share the mean of the task vectors, and code what is left.",
            rich_help_panel=_METHOD,
        ),
    ] = None
    max_bits: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of auto: what a coded parameter may cost, its share of the shared vectors included.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Refine the gains on your own loss: a function of a task and its state dict that gives a tensor of one"
            " number, how far its outputs are from the true expert's; see tallstore.Calibration.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    merged_dtype: Annotated[
        MergedDtype | None,
        typer.Option(
            metavar="DTYPE",
            help="How shared vectors are stored: log4 (signed-mask only, and its default), int8 (the others'"
            " default), float16, bfloat16 or float32.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None
    private: PrivateInput = None
    key_mapping: KeyMappingInput = None

    def given(self) -> dict[str, Any]:
        """The method's options that were given; a usage error where they do not go together."""
        options = {name: getattr(self, name) for name in _OF_METHODS}
        return given_options(self.method or MethodName.SIGNED_MASK, options)

    @contextlib.contextmanager
    def arguments(self, doing: str, work: WorkOptions) -> Iterator[dict[str, Any]]:
        """What `tallstore.pack` and those like it take of these, while they run. Imports torch.

        Args:
            doing: what stands beside the progress bar.
            work: how it goes to work.

        Raises:
            TallstoreError: an option is outside its range, or the user's function cannot be had.
        """
        from tallstore.cli import progress_bar  # noqa: PLC0415 - rich

        options = self.given()
        with contextlib.ExitStack() as stack:
            loss = None if self.calibrate is None else stack.enter_context(own_loss(self.calibrate))
            executor = stack.enter_context(_processes(work.workers))
            progress = stack.enter_context(progress_bar.show(doing))
            is_chosen = self.method is not None or bool(options)
            yield {
                "method": make_method(self.method or MethodName.SIGNED_MASK, options) if is_chosen else None,
                "merged_dtype": None if self.merged_dtype is None else self.merged_dtype.value,
                "private": self.private or (),
                "calibrate": None if loss is None else tallstore.Calibration(loss),
                "compress": not work.no_compress,
                "dry_run": work.dry_run,
                "executor": executor,
                "progress": progress,
            }


def _processes(workers: int | None) -> contextlib.AbstractContextManager[Executor | None]:
    """So many processes to pack on; None where none are asked for."""
    if workers is None:
        return contextlib.nullcontext()

    import multiprocessing  # noqa: PLC0415 - what is seldom asked for is loaded where it is
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415

    # Begun anew: a forked process would inherit torch's state, but not its threads.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
