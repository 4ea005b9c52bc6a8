"""Progress of downloads: drawn by the Hub's client where there is a terminal, or told; and how they are stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class StoppedError(Exception):
    """A download was stopped, since another one failed or the user does not want to wait."""


def bar_class(stop: threading.Event | None = None, tell: Callable[[int], object] | None = None) -> type[Any]:
    """A class of bars for the client, which breaks a download off when *stop* is set.

    Args:
        stop: looked at whenever bytes arrive; None never stops.
        tell: is told how many, by whatever thread downloads, and nothing is drawn; None draws, in a terminal only.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined] # noqa: PLC0415 - takes long to import

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - whatever tqdm takes
            if tell is not None:
                options["disable"] = True
            options.setdefault("disable", None)  # tqdm: show nothing where the output is not a terminal
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if stop is not None and stop.is_set():
                raise StoppedError
            if tell is not None:
                tell(int(n or 0))
            return super().update(n)  # type: ignore[no-any-return]

    return Bar
