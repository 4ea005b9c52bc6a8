"""The command line itself: its commands, and what becomes of their errors.

Exit codes: 0 done, 1 an error, 2 usage, 130 Ctrl-C. An error is one line on stderr that says what, where and what to
do. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer

import tallstore
from tallstore.cli.commands import (
    add,
    compare,
    consensus,
    demo,
    export,
    inspect,
    pack,
    pull,
    push,
    remove,
    repack,
    report,
    statistics,
    stitch,
    verify,
)
from tallstore.cli.help import Command, Group
from tallstore.errors import TallstoreError

_FAILED, _MISUSED, _INTERRUPTED = 1, 2, 130
# The class of all usage errors, from wherever this version of typer has its click.
_UsageError: Final[type[Exception]] = typer.BadParameter.__bases__[0]

_EXAMPLES: Final = """\
# try it: six small experts are trained, packed and scored
tallstore demo
# a bundle from a folder of fine-tunes, and one of them back
tallstore pack --base bert --experts fine-tunes --out bundle
tallstore inspect bundle
tallstore add bundle --base bert --expert news=runs/news
tallstore export bundle spam --base bert --out bert-spam
# complete commands, options and tasks with the Tab key
tallstore --install-completion"""


class _Commands(Group):
    """All commands: what any of them raises becomes an exit code and one line."""

    def main(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - typer's
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a task's name is any text, whatever the terminal can show
        try:
            with _one_line_an_error():
                code = super().main(*args, **options | {"standalone_mode": False})
        except typer.Exit as stopped:
            code = stopped.exit_code
        sys.exit(code)

    def invoke(self, ctx: Any) -> object:  # noqa: ANN401 - typer's
        with warnings.catch_warnings(), _one_line_an_error(ctx):  # typer's own `main` would be silent about Ctrl-C
            warnings.showwarning = lambda message, *_args, **_options: _report_warning(str(message))
            result: object = super().invoke(ctx)
            sys.stdout.flush()  # a reader that went away is noticed here
            return result


@contextmanager
def _one_line_an_error(ctx: Any = None) -> Iterator[None]:  # noqa: ANN401 - typer's
    """Report what is raised inside, in the context of a command, unless it is a bug or a broken pipe.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        yield
    except KeyboardInterrupt:
        from tallstore.cli import terminal  # noqa: PLC0415 - as in `_report_error`

        terminal.report_interrupt()
        raise typer.Exit(_INTERRUPTED) from None
    except _UsageError as error:
        _report_misuse(
            error, "tallstore" if ctx is None else f"{ctx.command_path} {ctx.invoked_subcommand or ''}".strip()
        )
        raise typer.Exit(_MISUSED) from None
    except TallstoreError as error:
        _report_error(str(error))
        raise typer.Exit(_FAILED) from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "tallstore":
            raise
        _report_error(f"{error}; install it, or all of tallstore again: pip install tallstore")
        raise typer.Exit(_FAILED) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        _report_error(f"{where}{error.strerror or error}")
        raise typer.Exit(_FAILED) from None


def _report_error(message: str) -> None:
    from tallstore.cli import terminal  # noqa: PLC0415 - rich, which `--version` and completion do without

    terminal.report_error(message)


def _report_warning(message: str) -> None:
    from tallstore.cli import terminal  # noqa: PLC0415 - as in `_report_error`

    terminal.report_warning(message)


def _report_misuse(error: Any, command: str) -> None:  # noqa: ANN401 - of a class of typer's
    """Say what is wrong with the line that was typed, or missing in it, and where to look."""
    parameter, place = getattr(error, "param", None), getattr(error, "param_hint", None)
    if parameter is not None:
        is_option = parameter.param_type_name == "option"
        place = f"{parameter.opts[0]} {parameter.metavar or ''}".strip() if is_option else parameter.metavar
    if place is None:
        message = error.format_message().rstrip(".").replace(". Did", "; did")
        message = message[:1].lower() + message[1:]
    elif error.message:
        message = f"{place}: {error.message.rstrip('.').removeprefix('Value error, ')}"
    else:
        message = f"give {place}"
    _report_error(f"{message} (see {command} --help)")


app = typer.Typer(
    cls=_Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXAMPLES,
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


@app.callback(invoke_without_command=True)
def tallstore_command(
    ctx: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback acts
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Many fine-tunes of one model in one small bundle, and any of them back by name."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(_MISUSED)


def _add(command: Callable[..., None], usage: str, examples: str) -> None:
    app.command(cls=Command, options_metavar=usage, epilog=examples)(command)


_add(pack.pack, pack.USAGE, pack.EXAMPLES)
_add(add.add, add.USAGE, add.EXAMPLES)
_add(remove.remove, remove.USAGE, remove.EXAMPLES)
_add(repack.repack, repack.USAGE, repack.EXAMPLES)
_add(inspect.inspect, inspect.USAGE, inspect.EXAMPLES)
_add(statistics.statistics, statistics.USAGE, statistics.EXAMPLES)
_add(report.report, report.USAGE, report.EXAMPLES)
_add(verify.verify, verify.USAGE, verify.EXAMPLES)
_add(export.export, export.USAGE, export.EXAMPLES)
_add(compare.compare, compare.USAGE, compare.EXAMPLES)
_add(consensus.consensus, consensus.USAGE, consensus.EXAMPLES)
_add(stitch.stitch, stitch.USAGE, stitch.EXAMPLES)
_add(push.push, push.USAGE, push.EXAMPLES)
_add(pull.pull, pull.USAGE, pull.EXAMPLES)
_add(demo.demo, demo.USAGE, demo.EXAMPLES)
