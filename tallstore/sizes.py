"""Sizes for people."""

from __future__ import annotations


def readable(nbytes: float) -> str:
    """A number of bytes in units of 1000, such as ``"19.8 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
