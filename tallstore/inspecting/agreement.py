"""How many of several masks are set at each weight, counted on packed bits: nothing is unpacked.

Masks are rows of 64-bit words, [masks, words], whose bits stand for the same weights in the same order; the bits behind
the last weight are zero. Word by word, a handful of operations adds 64 weights at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_BLOCK = 4096  # words of each mask that are compared at once: what stays in a processor's cache


def popcount(words: Words) -> int:
    """How many bits are set."""
    return int(np.bitwise_count(words).sum())


def tally(masks: Words | Sequence[Words]) -> list[Words]:
    """How many of *masks* have each bit set.

    Three masks at a time become a sum and a carry (a full adder), and carries are added up likewise: about five
    operations a mask.

    Args:
        masks: rows of equally many words.

    Returns:
        The counts in binary, a row a digit, the lowest first; as many as the largest count that there can be needs.
    """
    column, digits = list(masks), []
    while column:
        carries = []
        while len(column) >= 3:
            first, second, third = column.pop(), column.pop(), column.pop()
            either = first ^ second
            carries.append((first & second) | (either & third))
            column.append(either ^ third)
        if len(column) == 2:
            first, second = column
            carries.append(first & second)
            column = [first ^ second]
        digits.append(column[0])
        column = carries
    return digits


def at_least(digits: Sequence[Words], k: int) -> Words:
    """Where the counts of `tally` are *k* or more: as a mask; for k = 0, bits behind the last weight are set too."""
    if k >> len(digits):
        return np.zeros_like(digits[0])
    # From the lowest digit up: a digit that differs from k's decides, and a higher one overrules it.
    reached = np.full_like(digits[0], ~np.uint64(0))
    for place, digit in enumerate(digits):
        reached = digit & reached if k >> place & 1 else digit | reached
    return reached


def profile(digits: Sequence[Words], masks: int, numel: int) -> NDArray[np.int64]:
    """How many weights have each count of `tally`.

    Args:
        digits: the counts.
        masks: how many were counted, which is the largest count.
        numel: weights that the words stand for.

    Returns:
        int64 [masks + 1]: of count 0, 1, …
    """
    found = np.zeros(masks + 1, np.int64)

    def divide(count: int, place: int, among: Words | None, number: int) -> None:
        """Divide *number* weights, whose digits above *place* make *count*, by their digit there."""
        if not number:
            return
        if place < 0:
            found[count] = number
            return
        ones = digits[place] if among is None else digits[place] & among
        ones_number = popcount(ones)
        divide(count | 1 << place, place - 1, ones, ones_number)
        divide(count, place - 1, ~ones if among is None else among ^ ones, number - ones_number)

    divide(0, len(digits) - 1, None, numel)
    return found


def overlaps(masks: Words) -> NDArray[np.int64]:
    """How many weights each two masks have in common, and each with itself: int64 [masks, masks]."""
    count, length = masks.shape
    found = np.zeros((count, count), np.int64)
    for begin in range(0, length, _BLOCK):
        block = masks[:, begin : begin + _BLOCK]
        for row in range(count):
            found[row, : row + 1] += np.bitwise_count(block[: row + 1] & block[row]).sum(axis=1, dtype=np.int64)
    return np.maximum(found, found.T)  # what stands above the diagonal is zero so far
