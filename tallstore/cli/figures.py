"""Numbers and names as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from tallstore.sizes import count, several

__all__ = ["NOTHING", "count", "listed", "number", "percent", "several", "significant", "spread"]

NOTHING = "–"
_SHOWN_NAMES = 3


def number(value: float | None, digits: int) -> str:
    """A number with so many digits after the point."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """A number to four significant digits."""
    return NOTHING if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share of a whole: ``"12.3 %"``."""
    return NOTHING if share is None else f"{100 * share:.1f} %"


def listed(names: Sequence[str]) -> str:
    """The first few of *names*, and how many there are beyond them."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def spread(low: float, high: float, digits: int) -> str:
    """A range of numbers, or the one that both ends round to."""
    first, last = number(low, digits), number(high, digits)
    return first if first == last else f"{first} to {last}"
