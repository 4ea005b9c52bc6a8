"""The command line as tests call it: in this process, its streams kept apart."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner, Result

from tallstore.cli import app


def run(*arguments: object, code: int = 0, columns: int | None = 200, **environment: str | None) -> Result:
    """Run a command in a terminal so wide, None being a pipe; its result, once its exit code is the expected one."""
    env = {"COLUMNS": None if columns is None else str(columns), "NO_COLOR": "1", **environment}
    result = CliRunner().invoke(app.app, [str(argument) for argument in arguments], env=env, prog_name="tallstore")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object, code: int = 1, **environment: Any) -> str:
    """The one line that a command ends with, and nothing on stdout."""
    result = run(*arguments, code=code, **environment)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def misused(*arguments: object, **environment: Any) -> str:
    """The one line of a usage error."""
    line = refused(*arguments, code=2, **environment)
    assert " --help)" in line
    return line
