"""A progress bar for whoever calls the library: drawn in a notebook, in a terminal, or as plain lines."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal


def progress_bar(doing: str = "", unit: Literal["bytes", "pieces"] = "bytes") -> Callable[[int, int], None]:
    """A bar, for the *progress* of one call.

        tallstore.pack(base, experts, "bundle", progress=tallstore.progress_bar("packing"))

    It is tqdm's, on stderr or as a widget; without ipywidgets, a notebook shows it as text. It appears when it is first
    told something, and stays when all is done.

    Args:
        doing: what stands before it.
        unit: what is counted: bytes, or, for `compare`, methods.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a widget needs ipywidgets: the text is as good
        from tqdm.auto import tqdm  # noqa: PLC0415 - what asks for a bar alone needs it

    bar: tqdm[None] | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            counted = {"unit": "B", "unit_scale": True} if unit == "bytes" else {}
            bar = tqdm(total=total, desc=doing or None, **counted)
        if bar.total != total:
            bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show
