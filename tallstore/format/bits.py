"""Fields of 1, 2 and 4 bits, packed least significant bit first: element i sits at bit i * width of the byte string.

All arrays are numpy uint8. The last byte's unused high bits are zero: one sequence of codes has one encoding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_PAIRED_NBYTES = 1 << 13  # packed bytes from which on a table of pairs is worth what it takes to fill the cache with it
_LARGEST_ITEM = 8  # bytes an entry of such a table: 65,536 of them leave room in a core's cache

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
    return look_up(packed, numel, width, tuple(range(1 << width)), np.dtype(np.uint8))


def look_up(packed: Bytes, numel: int, width: int, values: tuple[float, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The value of each code: ``values[code]`` as *dtype*, by one table look-up for two packed bytes, or one.

    Returns:
        a 1-D array of *numel* elements, in memory of its own.
    """
    packed = packed[: packed_nbytes(numel, width)]
    per_byte = 8 // width
    looked_up = np.empty(packed.size * per_byte, dtype)
    done = 0
    # No index is out of range. Where numpy is to look for one, it does so in a copy of the result.
    if packed.size >= _PAIRED_NBYTES and 2 * per_byte * dtype.itemsize <= _LARGEST_ITEM:
        pairs, done = _pair_table(width, values, dtype), packed.size // 2 * 2
        pairs.take(packed[:done].view("<u2"), out=looked_up[: done * per_byte].view(pairs.dtype), mode="clip")
    if done < packed.size:
        table = _byte_table(width, values, dtype)
        table.take(packed[done:], out=looked_up[done * per_byte :].view(table.dtype), mode="clip")
    return looked_up[:numel]


@cache
def _byte_table(width: int, values: tuple[float, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """For each of the 256 bytes, the values of its fields side by side, as one item."""
    per_byte = 8 // width
    byte = np.arange(256)[:, None]
    codes = (byte >> (np.arange(per_byte) * width)) & ((1 << width) - 1)
    fields = np.ascontiguousarray(np.asarray(values, dtype)[codes])
    return fields.view(f"V{per_byte * dtype.itemsize}").reshape(256)


@cache
def _pair_table(width: int, values: tuple[float, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The same for each two bytes as a little-endian number."""
    fields = _byte_table(width, values, dtype)
    pairs = np.empty((256, 256, 2), fields.dtype)
    pairs[:, :, 0], pairs[:, :, 1] = fields[None, :], fields[:, None]
    return pairs.view(f"V{2 * fields.itemsize}").reshape(-1)


def padding_is_zero(packed: Bytes, numel: int, width: int) -> bool:
    """Whether the bits behind the last of *numel* fields are all zero."""
    used = numel * width % 8
    return used == 0 or packed.size == 0 or int(packed[-1]) >> used == 0


def has_code_three(packed: Bytes) -> bool:
    """Whether any 2-bit field of *packed* is 3, which not every 2-bit encoding uses."""
    whole = packed.size // 8 * 8
    words = packed[:whole].view(np.uint64)  # processors shift words several at a time, and bytes one by one
    pairs = words & (words >> np.uint64(1)) & np.uint64(0x5555_5555_5555_5555)
    rest = packed[whole:]
    return bool(pairs.max(initial=0)) or bool(np.any(rest & (rest >> np.uint8(1)) & np.uint8(0x55)))


def has_code_above_seven(packed: Bytes) -> bool:
    """Whether any 4-bit field of *packed* is 8 or more."""
    return bool(np.any(packed & np.uint8(0x88)))


def set_count(packed: Bytes) -> int:
    """How many bits of *packed* are set."""
    return int(np.count_nonzero(np.unpackbits(packed)))
