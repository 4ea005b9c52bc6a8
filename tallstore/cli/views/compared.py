"""`compare`: a row a method, and which of them no other beats."""

from __future__ import annotations

from rich.text import Text

from tallstore.cli import terminal
from tallstore.cli.figures import number, significant, spread
from tallstore.cli.tables import Column, print_table
from tallstore.fit import described
from tallstore.packing import Compared, Comparison
from tallstore.sizes import readable


def print_comparison(comparison: Comparison) -> None:
    """The smallest first."""
    console = terminal.output()
    rows = sorted(comparison.rows, key=lambda row: row.bundle_nbytes)
    scores = any(row.score for row in rows)
    measured = all(row.measured for row in rows)
    print_table(
        console,
        [
            Column("", ["*" if row.is_best else "" for row in rows], "text"),
            Column("method", [described(row.method) for row in rows], "name", widest=52),
            Column("bundle", [readable(row.bundle_nbytes) for row in rows]),
            Column(
                "ratio",
                [f"{comparison.checkpoints_nbytes / max(1, row.bundle_nbytes):.1f}" for row in rows],
                droppable=1,
            ),
            Column("bits", [number(row.bits, 2) for row in rows], droppable=9),
            Column("cosine", [number(row.mean_cosine, 4) for row in rows]),
            Column("by task", [_spread(row) for row in rows], droppable=2),
            Column("score", [significant(row.mean_score) for row in rows]) if scores else None,
        ],
    )
    console.print(Text("* no other is both smaller and truer", "dim"))
    how = "measured on whole packs" if measured else "predicted on a sample of the weights; the base by reference"
    console.print(Text(f"{readable(comparison.checkpoints_nbytes)} of checkpoints; {how}", "dim"))


def _spread(row: Compared) -> str:
    found = [value for value in row.cosine.values() if value is not None]
    return spread(min(found), max(found), 3) if found else ""
