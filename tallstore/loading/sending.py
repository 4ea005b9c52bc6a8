"""Pieces to a device, batch by batch: while one is decoded there, the next ones are read, checked and sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from tallstore.loading import parallel
from tallstore.loading.packed import Batch, Decode, Packed, Piece
from tallstore.loading.staging import Slot, Staging, staging_for

#: Of a batch: more than a chunk ever takes, and chunks for several threads to read and check at once.
_BATCH_NBYTES: Final = 32 << 20


class Sender:
    """Brings pieces to one device, through a ring of buffers that stay. One thread may use it."""

    def __init__(self, device: torch.device, decode: Decode) -> None:
        """Take no memory yet.

        Args:
            device: with its index, where it has one; the current one when pieces are sent.
            decode: for that device.
        """
        self._device, self._decode = device, decode
        self._ring: Staging | None = None

    def write(self, pieces: Iterable[Piece], elsewhere: Mapping[Hashable, Tensor] = MappingProxyType({})) -> None:
        """Write every piece to its destination. The device may still be at work on them, on its current stream.

        Args:
            pieces: any.
            elsewhere: sources that are on the device, by their keys; they are not read.

        Raises:
            TallstoreError: as the pieces' sources. Any part of the destinations may have been written then.
        """
        for batch, staged in self._sent(pieces, elsewhere):
            for packed in batch.packed(staged):
                self._decode(packed)

    def keep(self, pieces: Iterable[Piece], elsewhere: Mapping[Hashable, Tensor]) -> list[Packed]:
        """Bring pieces to memory of their own on the device, and decode none.

        Args:
            pieces: any.
            elsewhere: as for `write`.

        Raises:
            TallstoreError: as the pieces' sources.
        """
        kept: list[Packed] = []
        for batch, staged in self._sent(pieces, elsewhere):
            kept.extend(batch.packed(staged.clone()))
        return kept

    def _sent(self, pieces: Iterable[Piece], elsewhere: Mapping[Hashable, Tensor]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches, and where each lies on the device until the next one is asked for."""
        if self._ring is None:
            self._ring = staging_for(self._device)
        pending: deque[_Filling] = deque()
        try:
            for members in _batches(pieces, elsewhere):
                batch = Batch(members, elsewhere)
                if len(pending) == self._ring.ahead:
                    yield from _finished(pending.popleft(), self._ring)
                slot = self._ring.slot(batch.nbytes)
                pending.append(_Filling(batch, slot, parallel.begin(batch.fill(slot.host.numpy()))))
            while pending:
                yield from _finished(pending.popleft(), self._ring)
        finally:
            for filling in pending:
                filling.jobs.abandon()


class _Filling(NamedTuple):
    """A batch that is being read into a buffer."""

    batch: Batch
    slot: Slot
    jobs: parallel.Begun


def _finished(filling: _Filling, ring: Staging) -> Iterator[tuple[Batch, Tensor]]:
    filling.jobs.finish()
    yield filling.batch, ring.send(filling.slot, filling.batch.nbytes)
    ring.release(filling.slot)


def _batches(pieces: Iterable[Piece], elsewhere: Container[Hashable]) -> Iterator[list[Piece]]:
    """Pieces together, as many as a batch has room for."""
    members: list[Piece] = []
    total = 0
    for piece in pieces:
        nbytes = piece.nbytes(elsewhere)
        if members and total + nbytes > _BATCH_NBYTES:
            yield members
            members, total = [], 0
        members.append(piece)
        total += nbytes
    if members:
        yield members
