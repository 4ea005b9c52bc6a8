"""HTML that is right by construction: text is escaped unless it is markup already."""

from __future__ import annotations

from html import escape
from typing import Final

_VOID: Final = frozenset({"meta", "link"})


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


def tag(element: str, /, *children: str, **attributes: str | None) -> Markup:
    """An element.

    Args:
        element: its name.
        children: text, which is escaped, and markup, which is not.
        attributes: by name; ``class_`` is class, other underscores are dashes; None is none.
    """
    head = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if element in _VOID:
        return Markup(f"<{element}{head}>")
    return Markup(f"<{element}{head}>{join(*children)}</{element}>")


def join(*children: str) -> Markup:
    """Children beside each other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child, quote=False) for child in children))


def name(text: str) -> Markup:
    """A name that somebody chose, in whatever script: its direction is its own affair."""
    return tag("bdi", text)


def _attribute(key: str, value: str) -> str:
    return f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
