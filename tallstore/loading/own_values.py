"""The values of a sparse tensor: which ones belong to which of its bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tallstore.format import bits
from tallstore.format.bits import Bytes
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL, chunk_count
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded, sparse_values_of
from tallstore.format.shard_reader import PayloadReader


@dataclass(frozen=True, slots=True)
class OwnValues:
    """The values of a sparse tensor.

    Attributes:
        bits: the tensor's, which say where its values belong.
        payload: of the values; None where no bit is set.
        count: of the values.
    """

    bits: PayloadReader
    payload: PayloadReader | None
    count: int

    @classmethod
    def open(cls, files: BundleFiles, task: Task, coded: Coded, bits: PayloadReader) -> OwnValues:
        """Those of a sparse tensor.

        Raises:
            TallstoreError: they are not there, or break a rule.
        """
        stored = sparse_values_of(coded)
        if stored is None:
            return cls(bits, None, 0)
        return cls(bits, files.payload(task, stored), stored.numel)

    def span(self, index: int) -> tuple[int, int]:
        """The values of a chunk of bits: the first one, and the one behind the last."""
        is_last = index + 1 == chunk_count(self.bits.numel)
        return self.bits.rank(index), self.count if is_last else self.bits.rank(index + 1)

    def within(self, index: int, packed: Bytes, start: int, stop: int) -> tuple[int, int]:
        """The values of bits [start, stop) of a chunk, *packed*."""
        first, last = self.span(index)
        if start:
            first += _set_count(packed, start)
        if 8 * packed.size > stop + 7:
            last = first + _set_count(packed, stop) - _set_count(packed, start)
        return first, last

    def read(self, first: int, last: int) -> Bytes:
        """The bytes of values [first, last).

        Raises:
            TallstoreError: as `PayloadReader.chunk`.
        """
        if self.payload is None or first == last:
            return np.empty(0, np.uint8)
        width = self.payload.encoding.itemsize
        pieces = []
        for index in range(first // CHUNK_NUMEL, (last - 1) // CHUNK_NUMEL + 1):
            begin = index * CHUNK_NUMEL
            chunk = self.payload.chunk(index)
            pieces.append(chunk[max(0, first - begin) * width : (last - begin) * width])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _set_count(packed: Bytes, count: int) -> int:
    """How many of the first *count* bits are set."""
    return int(np.count_nonzero(np.unpackbits(packed[: bits.packed_nbytes(count, 1)], count=count, bitorder="little")))
