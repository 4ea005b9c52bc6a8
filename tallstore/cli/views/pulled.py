"""`pull`: what is where now."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from tallstore.cli import terminal
from tallstore.cli.figures import listed, several
from tallstore.inspecting.summary import Presence
from tallstore.sizes import readable


def print_pulled(path: Path, present: Presence) -> None:
    """The directory, and what of the bundle is in it."""
    console = terminal.output()
    console.print(f"{path}: {several(present.files, 'file')}, {readable(present.nbytes)}", soft_wrap=True)
    if present.not_fetched:
        console.print(Text(f"not fetched: {listed(present.not_fetched)}", "yellow"))
