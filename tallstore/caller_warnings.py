"""Warnings that show the line of the user's that led to them."""

from __future__ import annotations

import inspect
import warnings
from types import FrameType
from typing import Final

_PACKAGE: Final = __name__.partition(".")[0]
# What stands between two lines of the package: cached properties, up to Python 3.11, are computed in functools.
_BETWEEN: Final = {_PACKAGE, "functools"}


class NewerFormatWarning(UserWarning):
    """A bundle of a newer minor version of the format has keys that this reader does not know, and ignores."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the innermost line outside this package.

    However deep in the package the cause is found, what is shown, and what a filter on modules sees, is the call that
    the user wrote.
    """
    # From Python 3.12 on, warnings.warn can skip a package by itself.
    frame: FrameType | None = inspect.currentframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)
