"""Tables for notebooks: HTML that stands alone and takes the notebook's own colours, light or dark.

No style sheet, script or id, so that nothing leaks into the page and a sanitiser has nothing to remove; every text is
escaped, since names in a bundle are whatever its author wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

MAX_ROWS: Final = 20
"""How many tasks are shown; the others are counted."""

# A table inherits neither colour nor font in a page without a doctype.
_TABLE: Final = "border-collapse: collapse; color: inherit; font: inherit"
_LINE: Final = "border-bottom: 1px solid currentColor"
_CELL: Final = "padding: 0.15em 0.8em 0.15em 0; vertical-align: top"
_NAME: Final = f"text-align: left; overflow-wrap: anywhere; max-width: 40em; {_CELL}"
_NUMBER: Final = f"text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; {_CELL}"


def html_table(
    facts: Iterable[str], headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()
) -> str:
    """Lines above a table, the table, and lines below it, as one ``<div>``.

    Args:
        facts: plain text, a line each; the first is bold.
        headings: of the columns. The first column holds names, the others numbers.
        rows: cells of plain text, as many as there are headings.
        notes: plain text, a line each.
    """
    first, *more = facts
    lines = [f"<div><strong>{escape(first)}</strong></div>", *(f"<div>{escape(fact)}</div>" for fact in more)]
    head = _row("th", headings, f"; {_LINE}")
    body = "".join(_row("td", row) for row in rows)
    lines.append(f'<table style="{_TABLE}"><thead>{head}</thead><tbody>{body}</tbody></table>')
    lines.extend(f"<div>{escape(note)}</div>" for note in notes)
    return f"<div>{''.join(lines)}</div>"


def number(value: float | None, digits: int) -> str:
    """A cell for a number; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _row(tag: str, cells: Sequence[str], more: str = "") -> str:
    styles = (_NAME, *(_NUMBER for _ in cells[1:]))
    filled = (f'<{tag} style="{style}{more}">{escape(cell)}</{tag}>' for style, cell in zip(styles, cells, strict=True))
    return f"<tr>{''.join(filled)}</tr>"
