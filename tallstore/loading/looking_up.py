"""Packed codes to what they stand for: one table look-up for one or two packed bytes."""

from __future__ import annotations

from functools import cached_property
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


class LookUp:
    """What the codes of one kind stand for. Threads may share it."""

    def __init__(self, width: int, values: tuple[float, ...], dtype: torch.dtype) -> None:
        """Build no table yet.

        Args:
            width: bits a code: 1, 2 or 4, least significant first.
            values: one a code.
            dtype: holds them exactly: int8, or float32 for codes of 4 bits.
        """
        self._width, self._values, self._dtype = width, values, dtype
        self._per_byte = 8 // width
        self._has_pairs = 2 * self._per_byte * dtype.itemsize <= _LARGEST_ITEM
        self._name, self._places = f"looked up {dtype}", f"places of {dtype}"

    def __call__(self, packed: Bytes, first: int, last: int) -> Tensor:
        """The values of codes [first, last) of *packed*.

        Returns:
            [last - first], in scratch memory: valid until the next look-up of that dtype in this thread.
        """
        begin = first // self._per_byte
        packed = packed[begin : packed_nbytes(last, self._width)]
        by_pairs = self._has_pairs and packed.size >= _PAIRED_NBYTES and not packed.size % 2
        table, indices = (self._pairs, packed.view("<u2")) if by_pairs else (self._bytes, packed)
        places = scratch.tensor(self._places, indices.size, torch.int32)
        found = scratch.tensor(self._name, packed.size * self._per_byte, self._dtype)
        np.copyto(places.numpy(), indices)
        torch.index_select(table, 0, places, out=found.view(table.dtype))
        return found[first - begin * self._per_byte :][: last - first]

    @cached_property
    def _bytes(self) -> Tensor:
        """For each of the 256 bytes, the values of its fields side by side, as one integer."""
        return _integers(self._fields())

    @cached_property
    def _pairs(self) -> Tensor:
        """The same for each two bytes as a little-endian number."""
        fields = self._fields()
        count = self._per_byte
        pairs = np.empty((256, 256, 2 * count), fields.dtype)
        pairs[:, :, :count], pairs[:, :, count:] = fields[None, :], fields[:, None]
        return _integers(pairs.reshape(1 << 16, 2 * count))

    def _fields(self) -> NDArray[np.generic]:
        byte = np.arange(256)[:, None]
        codes = (byte >> (np.arange(self._per_byte) * self._width)) & ((1 << self._width) - 1)
        fields: NDArray[np.generic] = np.array(self._values, _DTYPES[self._dtype])[codes]
        return fields


def _integers(rows: NDArray[np.generic]) -> Tensor:
    """Each row as one integer."""
    with torch.inference_mode(mode=False):
        raw = torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1))
        return raw.view(_INTEGERS[raw.shape[1]]).view(-1)
