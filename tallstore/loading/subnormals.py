"""Subnormal numbers, which torch may have been told to flush to zero."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Final

import torch

_SMALLEST_NORMAL: Final = sys.float_info.min


@contextlib.contextmanager
def subnormals_count() -> Iterator[None]:
    """A block in which they do, in this thread, whatever `torch.set_flush_denormal` said."""
    flushes = _SMALLEST_NORMAL * 0.5 == 0.0
    if flushes:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushes:
            torch.set_flush_denormal(True)
