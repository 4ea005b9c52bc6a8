"""What may come out of hostile input: a result, or an error of tallstore's in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from tallstore.errors import TallstoreError

Result = TypeVar("Result")

#: Of a message: names in it have up to 1,024 bytes, and are escaped.
MAX_MESSAGE = 4_096
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Broken(AssertionError):  # noqa: N818 - a finding
    """What no input may cause."""


def typed(action: Callable[[], Result]) -> Result | TallstoreError:
    """The result of *action*, or the error that it was refused with; any other exception passes through.

    Raises:
        Broken: the error's message is not one line that a terminal can show, or endless.
    """
    try:
        return action()
    except TallstoreError as error:
        check_message(str(error))
        return error


def check_message(message: str) -> None:
    """Make sure that *message* is one line, bounded, and harmless to a terminal."""
    if not message or len(message) > MAX_MESSAGE:
        raise Broken(f"a message of {len(message)} characters: {message[:200]!r}…")
    if found := _UNPRINTABLE.search(message):
        raise Broken(f"a message with {found[0]!r} in it: {message[:400]!r}")
