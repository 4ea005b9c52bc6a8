"""Trying again what may go well the next time."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from tallstore.hub.refusals import may_pass

Result = TypeVar("Result")

_WAITS: Final = (0.5, 1.0, 2.0, 4.0)  # seconds
_LONGEST_WAIT: Final = 30.0  # whatever the Hub asks for
_NOBODY_THERE: Final = frozenset({"ConnectError", "ConnectTimeout"})  # most often there is no network at all


def patiently(
    action: Callable[[], Result],
    waits: Sequence[float] | None = None,
    passes: Callable[[Exception], bool] | None = None,
) -> Result:
    """Do *action*; where the Hub is busy, or a connection breaks, wait and do it again.

    The client tries some requests again itself, and raises another error when it gives them up: those are not tried
    again here.

    Args:
        action: may be done several times.
        waits: seconds before each further time, unless the Hub asks for others; four times by default.
        passes: whether an error may not come the next time; by default `is_passing`.

    Raises:
        Exception: the last one that *action* raised.
    """
    for wait in _WAITS if waits is None else waits:
        try:
            return action()
        except Exception as error:
            if not (passes or is_passing)(error):
                raise
            asked_for = _retry_after(error)
        time.sleep(wait if asked_for is None else min(asked_for, _LONGEST_WAIT))
    return action()


def is_passing(error: Exception) -> bool:
    """Whether what failed may go well the next time, and the client has not found out yet."""
    kind = type(error).__name__
    if kind in _NOBODY_THERE or (kind == "LocalEntryNotFoundError" and _client_has_tried()):
        return False
    # A body that ended early is an OSError without a number to the client, and what Xet lost a RuntimeError.
    is_short = type(error) is OSError and error.errno is None
    return may_pass(error) or is_short or type(error) is RuntimeError


def _client_has_tried() -> bool:
    """Whether the client itself asks again where it cannot find out what a file is; older ones do not."""
    from huggingface_hub import get_hf_file_metadata  # noqa: PLC0415 - takes long to import

    return "retry_on_errors" in inspect.signature(get_hf_file_metadata).parameters


def _retry_after(error: Exception) -> float | None:
    """The seconds that the Hub asks to wait, where it does."""
    response = getattr(error, "response", None)
    try:
        return None if response is None else max(0.0, float(response.headers.get("Retry-After")))
    except (TypeError, ValueError):
        return None
