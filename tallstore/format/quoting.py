"""Text from a file as messages show it: on one line, nothing in it that a terminal acts on, and not much of it."""

from __future__ import annotations

import re
from typing import Final

_MAX_SHOWN: Final = 80
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


def quoted(text: str, limit: int = _MAX_SHOWN) -> str:
    """Text in quotes, cut behind *limit* characters; what is no printable character is escaped."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}…"


def key_place(parent: str, key: str) -> str:
    """The place of a key in a JSON document."""
    return f"{parent}.{key}" if _PLAIN_KEY.fullmatch(key) else f"{parent}[{quoted(key)}]"
