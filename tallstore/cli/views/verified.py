"""`verify`: each problem, or how much was checked."""

from __future__ import annotations

from collections.abc import Sequence

from tallstore.cli import terminal
from tallstore.cli.figures import listed, several
from tallstore.inspecting.summary import Presence
from tallstore.sizes import readable
from tallstore.verifying import Problem


def print_problems(problems: Sequence[Problem]) -> None:
    """Each problem that was found, a line."""
    console = terminal.output()
    for problem in problems:
        console.print(str(problem), soft_wrap=True)


def print_compared(where: str) -> None:
    """That what the Hub says of all files is what the manifest says."""
    terminal.output().print(f"no problems: the Hub's hashes and sizes of {where} are those of its manifest")


def print_verified(present: Presence) -> None:
    """How much was checked."""
    console = terminal.output()
    console.print(f"no problems: {several(present.files, 'file')} checked, {readable(present.nbytes)}")
    if present.not_fetched:
        console.print(f"not fetched, so not checked: {listed(present.not_fetched)}")
