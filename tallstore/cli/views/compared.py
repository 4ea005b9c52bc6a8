"""`compare`: a row a method, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from tallstore.cli import terminal
from tallstore.cli.figures import number, significant, spread
from tallstore.cli.hints import in_options
from tallstore.cli.tables import Column, print_table
from tallstore.fit import described
from tallstore.packing import Compared, Comparison
from tallstore.sizes import readable


def print_comparison(comparison: Comparison, names: Sequence[str]) -> None:
    """The smallest first.

    Args:
        comparison: of some methods.
        names: of them, in the order of its rows.
    """
    console = terminal.output()
    named = sorted(zip(comparison.rows, names, strict=True), key=lambda pair: pair[0].bundle_nbytes)
    rows = [row for row, _ in named]
    has_scores = any(row.score for row in rows)
    print_table(
        console,
        [
            Column("", ["*" if row.is_best else "" for row in rows], "text"),
            Column("--method", [name for _, name in named], "name", widest=40),
            Column("bundle", [readable(row.bundle_nbytes) for row in rows]),
            Column("ratio", [_ratio(comparison, row) for row in rows], droppable=1),
            Column("bits", [number(row.bits, 2) for row in rows], droppable=3),
            Column("cosine", [number(row.mean_cosine, 4) for row in rows], droppable=9 if has_scores else None),
            Column("by task", [_spread(row) for row in rows], droppable=2),
            Column("score", [significant(row.mean_score) for row in rows]) if has_scores else None,
        ],
    )
    truer = "of a better score" if has_scores else "truer"
    console.print(Text(f"* no other is both smaller and {truer}", "dim"))
    is_measured = all(row.measured for row in rows)
    how = "measured on whole packs" if is_measured else "predicted on a sample of the weights"
    nbytes = readable(comparison.checkpoints_nbytes)
    console.print(Text(f"{nbytes} of checkpoints; bundles with the base by reference, {how}", "dim"))
    for advice in comparison.advice:
        console.print(Text(_in_options(advice, named), "yellow"))


def _in_options(advice: str, named: Sequence[tuple[Compared, str]]) -> str:
    """A line about methods with the names that they have here."""
    for row, name in named:
        advice = advice.replace(described(row.method), name)
    return in_options(advice)


def _ratio(comparison: Comparison, row: Compared) -> str:
    return f"{comparison.checkpoints_nbytes / max(1, row.bundle_nbytes):.1f}"


def _spread(row: Compared) -> str:
    found = [value for value in row.cosine.values() if value is not None]
    return spread(min(found), max(found), 3) if found else ""
