"""Sizes, counts and shares for people."""

from __future__ import annotations


def readable(nbytes: float) -> str:
    """A number of bytes in units of 1000, such as ``"19.8 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def count(number: int) -> str:
    """A number of parameters, such as ``"22.6 M"``."""
    value = float(number)
    for unit in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:.0f}" if not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f} T"


def several(count: int, noun: str) -> str:
    """So many of a thing: ``"1 task"``, ``"3 tasks"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
