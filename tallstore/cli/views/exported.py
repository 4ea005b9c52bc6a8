"""`export`: what was written where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tallstore.cli import terminal
from tallstore.cli.figures import several
from tallstore.cli.tables import Column, print_table
from tallstore.exporting import Exported
from tallstore.sizes import readable


def print_exported(exported: Exported) -> None:
    """One expert, in a sentence."""
    companions = f", {', '.join(exported.companions)}" if exported.companions else ""
    terminal.output().print(
        f"exported {exported.task} to {exported.path}: {several(exported.tensors, 'tensor')},"
        f" {readable(exported.nbytes)} in {_describe_weights(exported)}{companions}"
    )


def print_all_exported(out: Path, exported: Sequence[Exported]) -> None:
    """Every expert, a row each, and how much they are together."""
    console = terminal.output()
    nbytes = sum(each.nbytes for each in exported)
    console.print(f"exported {several(len(exported), 'task')} to {out}: {readable(nbytes)}")
    print_table(
        console,
        [
            Column("task", [each.task for each in exported], "name"),
            Column("directory", [str(each.path) for each in exported], "name"),
            Column("tensors", [str(each.tensors) for each in exported], droppable=1),
            Column("size", [readable(each.nbytes) for each in exported]),
            Column("weights", [_describe_weights(each) for each in exported], "text", droppable=0),
        ],
    )


def _describe_weights(exported: Exported) -> str:
    return exported.weights[0] if len(exported.weights) == 1 else f"{len(exported.weights) - 1} shards"
