"""Tables that fit the terminal: columns are left out, and names folded, rather than cells cut short."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Literal

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

_NARROWEST_NAME = 12
_GAP = 2
_WORDS = re.compile(r"\S*\s*")
_PARTS = re.compile(r"[^\s./_-]*[\s./_-]*")
_FIRST_NEEDED = 7


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading, cells: from the top.
        holds: "number" is aligned to the right; "name" gives way to the others where the terminal is narrow.
        widest: where a name is longer, it is folded before a column is left out.
        droppable: columns are left out in this order where the terminal is too narrow; None stays. Those below 7 are
            left out before a name is folded.
    """

    heading: str
    cells: Sequence[str]
    holds: Literal["name", "text", "number"] = "number"
    droppable: int | None = None
    widest: int = 28

    @cached_property
    def whole_width(self) -> int:
        """What it takes with no cell folded."""
        return max(map(cell_len, (self.heading, *self.cells)))

    @property
    def width(self) -> int:
        """What it takes at its best."""
        return min(self.whole_width, self.widest) if self.holds == "name" else self.whole_width

    @property
    def least_width(self) -> int:
        """What it takes at least: a name can be folded."""
        return min(self.width, _NARROWEST_NAME) if self.holds == "name" else self.width


def print_table(console: Console, columns: Sequence[Column | None]) -> list[str]:
    """Print the columns that fit, None being none; their headings.

    Rows are laid out here: `rich.table` takes longer for two hundred of them than reading a bundle's tables does.
    """
    shown = _fitting([column for column in columns if column is not None], console.width)
    widths = _widths(shown, console.width)
    heading = _row(shown, widths, [column.heading for column in shown])
    console.print(Text(f"\n{heading}", "bold"), soft_wrap=True)
    console.print("─" * (sum(widths) + _GAP * (len(widths) - 1)), soft_wrap=True)
    rows = zip(*(column.cells for column in shown), strict=True)
    console.print("\n".join(_row(shown, widths, row) for row in rows), soft_wrap=True)
    return [column.heading for column in shown]


def fits(columns: Sequence[Column], width: int) -> bool:
    """Whether all of them do, with no name folded shorter than it may be at its best."""
    return sum(column.width + _GAP for column in columns) - _GAP <= width


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """What each column takes of *width*: numbers all they need; of the others the widest gives way first."""
    widths = [column.whole_width for column in columns]
    foldable = [position for position, column in enumerate(columns) if column.holds != "number"]
    while foldable and sum(widths) + _GAP * (len(widths) - 1) > width:
        widest = max(foldable, key=widths.__getitem__)
        if widths[widest] == 1:
            break
        widths[widest] -= 1
    return widths


def _row(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    """One row; several lines where a cell is folded."""
    folded = [_folded(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return "\n".join(_line(columns, widths, line) for line in zip_longest(*folded, fillvalue=""))


def _folded(text: str, width: int) -> list[str]:
    """Lines of at most *width*, broken behind blanks; in words that are longer, behind dots and dashes if possible."""
    if cell_len(text) <= width:
        return [text]
    lines = [""]
    for part in _breakable(text, width):
        word = part.rstrip()
        if cell_len(lines[-1] + word) <= width:
            lines[-1] += part
        else:
            lines += chop_cells(word, width)
            lines[-1] += part[len(word) :]
    return [line.rstrip() for line in lines if line.strip()]


def _breakable(text: str, width: int) -> Iterator[str]:
    """The parts of *text* that a line may end behind, blanks after them included."""
    for word in _WORDS.findall(text):
        if cell_len(word.rstrip()) <= width:
            yield word
        else:
            yield from _PARTS.findall(word)


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    padded = []
    for column, width, cell in zip(columns, widths, cells, strict=True):
        blank = " " * (width - cell_len(cell))
        padded.append(blank + cell if column.holds == "number" else cell + blank)
    return (" " * _GAP).join(padded).rstrip()


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Leave out what can be spared while names are folded, and more while they are too narrow to be read."""
    shown = list(columns)

    def leave_out(ranks: range, taken: Callable[[Column], int]) -> None:
        while sum(taken(column) + _GAP for column in shown) - _GAP > width:
            droppable = [column for column in shown if column.droppable in ranks]
            if not droppable:
                break
            shown.remove(min(droppable, key=lambda column: column.droppable or 0))

    leave_out(range(_FIRST_NEEDED), lambda column: column.width)
    leave_out(range(100), lambda column: column.least_width)
    return shown


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print a label and a fact a line; facts that are too long are folded beside their labels."""
    column = max(len(label) for label, _ in facts) + _GAP
    for label, fact in facts:
        for position, line in enumerate(Text(fact).wrap(console, max(1, console.width - column), overflow="fold")):
            margin = f"{label if position == 0 else '':<{column}}"
            console.print(Text.assemble((margin, "bold"), line.plain.rstrip()), soft_wrap=True)
