"""Fields of 1, 2 and 4 bits, packed least significant bit first: element i sits at bit i * width of the byte string.

All arrays are numpy uint8. The last byte's unused high bits are zero: one sequence of codes has one encoding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# One packed byte holds as many fields as this word has bytes.
_WORDS: dict[int, np.dtype[Any]] = {2: np.dtype("<u4"), 4: np.dtype("<u2")}


def packed_nbytes(numel: int, width: int) -> int:
    """Bytes that *numel* fields of *width* bits take."""
    return -(-numel * width // 8)


def pack(codes: Bytes, width: int) -> Bytes:
    """Pack one code a byte, each under 2**width, into fields of *width* bits (1, 2 or 4)."""
    if width == 1:
        return np.packbits(codes, bitorder="little")
    per_byte = 8 // width
    tail = -codes.size % per_byte
    if tail:
        codes = np.concatenate([codes, np.zeros(tail, np.uint8)])
    words = np.ascontiguousarray(codes).view(_WORDS[width])
    gathered = words.copy()
    for field in range(1, per_byte):  # byte `field` of the word moves down to bit field * width
        gathered |= words >> words.dtype.type(field * (8 - width))
    low: Bytes = (gathered & words.dtype.type(0xFF)).astype(np.uint8)
    return low


def unpack(packed: Bytes, numel: int, width: int) -> Bytes:
    """The *numel* codes of *packed*, one a byte. The inverse of `pack`."""
    if width == 1:
        return np.unpackbits(packed, count=numel, bitorder="little")
    codes: Bytes = _codes_of_byte(width)[packed[: packed_nbytes(numel, width)]].reshape(-1)[:numel]
    return codes


@cache
def _codes_of_byte(width: int) -> Bytes:
    """The codes in each of the 256 bytes: [256, 8 / width]."""
    byte = np.arange(256, dtype=np.uint8)[:, None]
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    codes: Bytes = (byte >> shifts) & np.uint8((1 << width) - 1)
    return codes


def padding_is_zero(packed: Bytes, numel: int, width: int) -> bool:
    """Whether the bits behind the last of *numel* fields are all zero."""
    used = numel * width % 8
    return used == 0 or packed.size == 0 or int(packed[-1]) >> used == 0


def has_code_three(packed: Bytes) -> bool:
    """Whether any 2-bit field of *packed* is 3, which not every 2-bit encoding uses."""
    whole = packed.size // 8 * 8
    words = packed[:whole].view(np.uint64)  # processors shift words several at a time, and bytes one by one
    both = int(np.bitwise_or.reduce(words & (words >> np.uint64(1)))) & 0x5555_5555_5555_5555
    if both or whole == packed.size:
        return both != 0
    rest = packed[whole:]
    return bool(np.any(rest & (rest >> np.uint8(1)) & np.uint8(0x55)))


def has_code_above_seven(packed: Bytes) -> bool:
    """Whether any 4-bit field of *packed* is 8 or more."""
    return bool(np.any(packed & np.uint8(0x88)))


def set_count(packed: Bytes) -> int:
    """How many bits of *packed* are set."""
    return int(np.count_nonzero(np.unpackbits(packed)))
