"""How checks go on behind a problem: what cannot be read is one, and the next thing is looked at."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

from tallstore.errors import FormatError
from tallstore.format.layout import unreadable
from tallstore.format.shard_reader import LocalFile

Problems = Iterator[FormatError]
OpenFile = Callable[[Path, str], LocalFile]  # of a path, and of what messages call it
Result = TypeVar("Result")


def attempt(where: str, action: Callable[[], Result]) -> Generator[FormatError, None, Result | None]:
    """Do *action*; where it is refused, yield the reason, and go on. To be driven by ``yield from``.

    Args:
        where: the file, for a system that cannot read it (FILE-4).
        action: raises FormatError or OSError.

    Returns:
        what *action* returned; None where it was refused.
    """
    try:
        return action()
    except FormatError as error:
        yield error
    except ConnectionError:  # a broken pipe: who showed the progress went away
        raise
    except OSError as error:
        yield unreadable(where, error)
    return None
