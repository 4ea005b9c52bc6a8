"""Packed codes to what they stand for: one table look-up for one or two packed bytes."""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.forking import cached_property
from tallstore.format.bits import Bytes, packed_nbytes
from tallstore.loading.scratch import scratch

_LARGEST_ITEM: Final = 8  # bytes of an entry: a table of pairs, 65,536 of them, still fits a core's cache
_PAIRED_NBYTES: Final = 1 << 12  # packed bytes from which on such a table is worth the cache that it takes
_MAX_ROOMS: Final = 64
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
        self._places, self._elements = f"places of {dtype}", f"looked up {dtype}"
        self._rooms = _Rooms()

    def __call__(self, packed: Bytes, first: int, last: int) -> Tensor:
        """The values of codes [first, last) of *packed*.

        Returns:
            [last - first], in scratch memory: valid until the next look-up of that dtype in this thread.
        """
        begin = first // self._per_byte
        packed = packed[begin : packed_nbytes(last, self._width)]
        room = self._room(packed.size)
        np.copyto(room.indices, packed.view(room.unit))
        torch.index_select(room.table, 0, room.places, out=room.items)
        skipped = first - begin * self._per_byte
        if not skipped and last - first == room.elements.numel():
            return room.elements
        return room.elements[skipped:][: last - first]

    def _room(self, nbytes: int) -> _Room:
        """This thread's, for so many packed bytes."""
        elements = scratch.tensor(self._elements, nbytes * self._per_byte, self._dtype)
        room = self._rooms.of_size.get(nbytes)
        if room is None or room.elements is not elements:
            by_pairs = self._has_pairs and nbytes >= _PAIRED_NBYTES and not nbytes % 2
            table = self._pairs if by_pairs else self._bytes
            places = scratch.tensor(self._places, nbytes // 2 if by_pairs else nbytes, torch.int32)
            with torch.inference_mode(mode=False):  # as the scratch memory was made
                items = elements.view(table.dtype)
            unit: np.dtype[np.unsignedinteger] = np.dtype("<u2" if by_pairs else np.uint8)
            room = _Room(unit, table, places, places.numpy(), items, elements)
            if len(self._rooms.of_size) >= _MAX_ROOMS:
                self._rooms.of_size.clear()
            self._rooms.of_size[nbytes] = room
        return room

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


class _Rooms(threading.local):
    """Each thread's, by packed bytes."""

    def __init__(self) -> None:
        self.of_size: dict[int, _Room] = {}


class _Room(NamedTuple):
    """Where one thread looks up the codes in so many packed bytes: views of its scratch memory.

    Attributes:
        unit: of what one entry of the table is for.
        table: of the entries.
        places, indices: which entries: int32, the same memory.
        items, elements: the entries, and the values in them: the same memory.
    """

    unit: np.dtype[np.unsignedinteger]
    table: Tensor
    places: Tensor
    indices: NDArray[np.int32]
    items: Tensor
    elements: Tensor


def _integers(rows: NDArray[np.generic]) -> Tensor:
    """Each row as one integer."""
    with torch.inference_mode(mode=False):
        raw = torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1))
        return raw.view(_INTEGERS[raw.shape[1]]).view(-1)
