"""The command line: options in, one call of the library, results out. What is printed is in `console`.

Exit codes: 0 done, 1 an error of one line on stderr, 2 usage, 130 Ctrl-C. Results go to stdout, everything else to
stderr. Each command imports what it needs: `inspect` answers before torch would be there.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import tallstore
from tallstore.errors import TallstoreError

if TYPE_CHECKING:
    from tallstore.fit import Method

_INTERRUPTED = 130


class MethodName(str, Enum):
    """Methods by their names on the command line."""

    SIGNED_MASK = "signed-mask"
    TALL_MASK = "tall-mask"
    TALL_MASK_PUBLISHED = "tall-mask-published"


class MergeName(str, Enum):
    """How task vectors become the merged vector of a TALL-mask."""

    SUM = "sum"
    TIES = "ties"
    MEAN = "mean"


class GainName(str, Enum):
    """How the reconstruction of a TALL-mask is scaled."""

    ONE = "one"
    PUBLISHED = "published"


class MergedDtype(str, Enum):
    """How the values of the shared vector are stored."""

    LOG4 = "log4"
    INT8 = "int8"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class _Commands(TyperGroup):
    """All commands: what any of them raises becomes an exit code and one line."""

    def invoke(self, ctx: Any) -> object:  # noqa: ANN401 - its type is where each version of typer has its click
        from tallstore.cli import console  # noqa: PLC0415 - rich, which `--version` does without

        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a task's name is any text, whatever the terminal can show
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_args, **_options: console.report_warning(str(message))
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()  # a reader that went away is noticed here
            except KeyboardInterrupt:
                console.report_interrupt()
                raise typer.Exit(_INTERRUPTED) from None
            except TallstoreError as error:
                console.report_error(str(error))
                raise typer.Exit(1) from None
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] == "tallstore":
                    raise
                console.report_error(f"{error}; install it, or all of tallstore again: pip install tallstore")
                raise typer.Exit(1) from None
            except BrokenPipeError:
                raise
            except OSError as error:
                where = "" if error.filename is None else f"{error.filename}: "
                console.report_error(f"{where}{error.strerror or error}")
                raise typer.Exit(1) from None
            else:
                return result


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: tallstore demo",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="tallstore")
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except KeyboardInterrupt:  # before the command began
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tallstore {tallstore.__version__}")
        raise typer.Exit


@app.callback()
def tallstore_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Many fine-tunes of one model in one small bundle, and any of them back by name."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's directory.", show_default=False)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one.")]

_INPUTS, _FIT, _OUTPUT = "Inputs", "Method", "Output"


@app.command(
    epilog="Examples:\n\ntallstore pack --base ./bert --experts ./fine-tunes --out ./bundle\n\n"
    "tallstore pack --base ./bert --expert spam=./bert-spam --expert film=./bert-film --out ./bundle --embed-base"
)
def pack(
    *,
    base: Annotated[
        str,
        typer.Option(
            metavar="BASE",
            help="What the experts were fine-tuned from: a Hugging Face directory, a .safetensors, .bin or .pt file,"
            " or a Hub id.",
            rich_help_panel=_INPUTS,
            show_default=False,
        ),
    ],
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="An expert by name; give one for each.", rich_help_panel=_INPUTS),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder of experts: each sub-directory with a checkpoint, and each .safetensors file, is one, named"
            " after it. A base that lies there is left out.",
            rich_help_panel=_INPUTS,
            show_default=False,
        ),
    ] = None,
    key_mapping: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=REPLACEMENT",
            help="From the experts' tensor names to the base's, where they differ.",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    method: Annotated[
        MethodName,
        typer.Option(
            metavar="METHOD",
            help="signed-mask: own signs over a shared magnitude. tall-mask: a 0/1 mask over the sum of the task"
            " vectors. tall-mask-published: the same as in the paper.",
            rich_help_panel=_FIT,
        ),
    ] = MethodName.SIGNED_MASK,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="signed-mask: larger is smaller and less true.",
            rich_help_panel=_FIT,
            show_default="1.2",
        ),
    ] = None,
    mask_lambda: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="tall-mask: larger gives thinner masks.",
            rich_help_panel=_FIT,
            show_default="1.0",
        ),
    ] = None,
    merge: Annotated[
        MergeName | None,
        typer.Option(help="tall-mask: how task vectors are merged.", rich_help_panel=_FIT, show_default="sum"),
    ] = None,
    gain: Annotated[
        GainName | None,
        typer.Option(
            help="tall-mask: one keeps each expert's full step, published is 1.",
            rich_help_panel=_FIT,
            show_default="one",
        ),
    ] = None,
    merged_dtype: Annotated[
        MergedDtype | None,
        typer.Option(
            metavar="DTYPE",
            help="How the shared vector is stored: log4 (signed-mask only), int8, float16, bfloat16 or float32.",
            rich_help_panel=_FIT,
            show_default="log4 for signed-mask, int8 for tall-mask",
        ),
    ] = None,
    private: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Tensors to store whole, bit for bit.", rich_help_panel=_FIT),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The bundle.", rich_help_panel=_OUTPUT, show_default=False)],
    embed_base: Annotated[
        bool, typer.Option("--embed-base", help="Put the base into the bundle.", rich_help_panel=_OUTPUT)
    ] = False,
    base_ref: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME@SHA",
            help="Where readers get the base on the Hub.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything, write nothing.", rich_help_panel=_OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle that is there.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Pack fine-tunes of one base into a bundle."""
    named = _pairs(expert or (), "--expert", "NAME=PATH")
    if not named and experts is None:
        raise typer.BadParameter("give --expert NAME=PATH for each expert, or --experts DIR")
    names = _pairs(key_mapping or (), "--key-mapping", "REGEX=REPLACEMENT", last=True)
    chosen = _method(method, threshold, mask_lambda, merge, gain)

    from tallstore.cli import console  # noqa: PLC0415 - what only this command needs
    from tallstore.cli.expert_sources import find_experts  # noqa: PLC0415

    found = {} if experts is None else find_experts(experts, base)
    for name in named.keys() & found.keys():
        raise typer.BadParameter(f"{name!r} is among --experts too", param_hint="--expert")
    with console.progress("packing") as progress:
        report = tallstore.pack(
            base,
            {**found, **named},
            out,
            method=chosen,
            merged_dtype=None if merged_dtype is None else merged_dtype.value,
            private=private or (),
            key_mapping=names,
            embed_base=embed_base,
            base_ref=base_ref,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        _print_json(report.to_dict())
    else:
        console.print_packed(report, embedded=embed_base)


@app.command(epilog="Example: tallstore inspect ./bundle --task spam")
def inspect(
    bundle: BundleArgument,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Show this task, tensor by tensor.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a bundle: sizes, methods, how true each task is. Decodes nothing."""
    from tallstore.cli import console  # noqa: PLC0415 - what only this command needs
    from tallstore.inspecting import summary as inspecting  # noqa: PLC0415 - what only this command needs

    if task is None:
        summary = inspecting.summarise(bundle)
        _print_json(summary.to_dict()) if as_json else console.print_bundle(summary)
        return

    from tallstore.inspecting.task_details import describe_task  # noqa: PLC0415 - numpy, which a summary does without

    details = describe_task(bundle, task)
    _print_json(details.to_dict()) if as_json else console.print_task(details)


@app.command(epilog="Example: tallstore verify ./bundle")
def verify(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Check every rule of the format and every byte; print each problem."""
    from tallstore.cli import console  # noqa: PLC0415 - what only this command needs
    from tallstore.inspecting import summary as inspecting  # noqa: PLC0415 - what only this command needs

    problems = tallstore.verify(bundle)
    if as_json:
        _print_json([{"rule": found.rule, "where": found.where, "message": found.message} for found in problems])
    elif problems:
        console.print_problems(problems)
    else:
        console.print_verified(inspecting.presence(bundle))
    if problems:
        count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
        console.report_error(f"{bundle}: {count}; fetch or pack the bundle again")
        raise typer.Exit(1)


@app.command(epilog="Example: tallstore export ./bundle spam --base ./bert --out ./bert-spam")
def export(
    bundle: BundleArgument,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The expert's name.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write it.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="The base that the bundle was packed from, if the bundle neither has it nor names it.",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write one expert as a Hugging Face directory that from_pretrained loads."""
    from tallstore import exporting  # noqa: PLC0415 - what only this command needs
    from tallstore.cli import console  # noqa: PLC0415 - what only this command needs

    with tallstore.open_bundle(bundle, base=base) as opened, console.progress("exporting") as progress:
        exported = exporting.export(
            opened, task, out, overwrite=overwrite, inputs=() if base is None else (base,), progress=progress
        )
    console.print_exported(exported)


@app.command(epilog="Example: tallstore demo --out ./tallstore-demo")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the bundle is left.")] = Path("tallstore-demo"),
) -> None:
    """Train six small experts, pack them, load each by name, score it. Under a minute."""
    from tallstore import demo as demonstration  # noqa: PLC0415 - what only this command needs

    demonstration.main(out)


def _method(
    name: MethodName,
    threshold: float | None,
    mask_lambda: float | None,
    merge: MergeName | None,
    gain: GainName | None,
) -> Method:
    """The method with the options that were given; a usage error for options of another one."""
    tall = {
        "mask_lambda": mask_lambda,
        "merge": None if merge is None else merge.value,
        "gain": None if gain is None else gain.value,
    }
    given = {option: value for option, value in tall.items() if value is not None}
    if name is not MethodName.TALL_MASK and given:
        _refuse_options(given, MethodName.TALL_MASK)
    if name is not MethodName.SIGNED_MASK and threshold is not None:
        _refuse_options(["threshold"], MethodName.SIGNED_MASK)
    if name is MethodName.SIGNED_MASK:
        return tallstore.SignedMask() if threshold is None else tallstore.SignedMask(threshold)
    if name is MethodName.TALL_MASK_PUBLISHED:
        return tallstore.TallMask.published()
    return tallstore.TallMask(**given)  # type: ignore[arg-type]


def _refuse_options(options: Iterable[str], method: MethodName) -> NoReturn:
    listed = ", ".join("--" + option.replace("_", "-") for option in options)
    raise typer.BadParameter(f"goes with --method {method.value}", param_hint=listed)


def _pairs(given: Iterable[str], option: str, form: str, *, last: bool = False) -> dict[str, str]:
    """Split each NAME=VALUE at the first equals sign, or at the last one."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.rpartition("=") if last else text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option)
        if name in pairs:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        pairs[name] = value
    return pairs


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
