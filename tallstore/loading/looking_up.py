"""Packed codes to what they stand for: one table look-up for one or two packed bytes."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.format.bits import Bytes, packed_nbytes
from tallstore.loading.scratch import scratch

_LARGEST_ITEM: Final = 8  # bytes of an entry: a table of pairs, 65,536 of them, still fits a core's cache
_PAIRED_NBYTES: Final = 1 << 12  # packed bytes from which on such a table is worth the cache that it takes
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES: Final[dict[torch.dtype, type[np.generic]]] = {torch.int8: np.int8, torch.float32: np.float32}


def look_up(
    packed: Bytes, first: int, last: int, *, width: int, values: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """``values[code]`` for codes [first, last) of *packed*, as *dtype*: int8, or float32 of 4-bit fields.

    Args:
        packed: fields of *width* bits (1, 2 or 4), least significant first.
        first: any.
        last: behind the last one.
        width: bits a code.
        values: one a code.
        dtype: holds them exactly.

    Returns:
        [last - first], in scratch memory: valid until the next look-up of that dtype in this thread.
    """
    per_byte = 8 // width
    begin = first // per_byte
    packed = packed[begin : packed_nbytes(last, width)]
    found = scratch.tensor(f"looked up {dtype}", packed.size * per_byte, dtype)
    done = 0
    if packed.size >= _PAIRED_NBYTES and 2 * per_byte * dtype.itemsize <= _LARGEST_ITEM:
        done = packed.size // 2 * 2
        _select(_pair_table(width, values, dtype), packed[:done].view("<u2"), found[: done * per_byte])
    if done < packed.size:
        _select(_byte_table(width, values, dtype), packed[done:], found[done * per_byte :])
    return found[first - begin * per_byte :][: last - first]


def _select(table: Tensor, indices: NDArray[np.unsignedinteger], destination: Tensor) -> None:
    """Entries of *table*, each of several elements of *destination* in one integer."""
    places = scratch.tensor("places", indices.size, torch.int32)
    np.copyto(places.numpy(), indices)
    torch.index_select(table, 0, places, out=destination.view(table.dtype))


@cache
def _byte_table(width: int, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """For each of the 256 bytes, the values of its fields side by side, as one integer."""
    return _integers(_fields(width, values, dtype))


@cache
def _pair_table(width: int, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The same for each two bytes as a little-endian number."""
    fields = _fields(width, values, dtype)
    count = fields.shape[1]
    pairs = np.empty((256, 256, 2 * count), fields.dtype)
    pairs[:, :, :count], pairs[:, :, count:] = fields[None, :], fields[:, None]
    return _integers(pairs.reshape(1 << 16, 2 * count))


def _fields(width: int, values: tuple[float, ...], dtype: torch.dtype) -> NDArray[np.generic]:
    byte = np.arange(256)[:, None]
    codes = (byte >> (np.arange(8 // width) * width)) & ((1 << width) - 1)
    fields: NDArray[np.generic] = np.array(values, _DTYPES[dtype])[codes]
    return fields


def _integers(rows: NDArray[np.generic]) -> Tensor:
    """Each row as one integer."""
    with torch.inference_mode(mode=False):
        raw = torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1))
        return raw.view(_INTEGERS[raw.shape[1]]).view(-1)
