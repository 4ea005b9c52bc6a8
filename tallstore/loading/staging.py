"""Bytes on their way to a device: a ring of buffers, so that one is read into while others are copied and decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

_AHEAD: Final = 2  # batches that are read at once, so that no thread waits for the slowest of one
_SLOTS: Final = _AHEAD + 2  # one more is copied, one decoded


@dataclass(slots=True)
class Slot:
    """One buffer of the ring.

    Attributes:
        host: uint8 on the CPU, to be written to.
        staged: as large, where the device has one of its own for each.
        decoded: when the work on what it held last is done.
    """

    host: Tensor
    staged: Tensor | None = None
    decoded: torch.cuda.Event | None = None


class Staging(Protocol):
    """The ring. One thread uses it.

    Attributes:
        ahead: how many buffers may be asked for before the first of them is sent.
    """

    ahead: int

    def slot(self, nbytes: int) -> Slot:
        """The next buffer, of at least *nbytes*; waits until what it held before was decoded."""

    def send(self, slot: Slot, nbytes: int) -> Tensor:
        """The first *nbytes* of a buffer on the device, uint8, for work on the device's current stream."""

    def release(self, slot: Slot) -> None:
        """Say that the work on a buffer was handed to the current stream."""


def staging_for(device: torch.device) -> Staging:
    """Buffers in pinned memory and a copy stream for CUDA and ROCm; plain copies for other devices."""
    return CudaStaging(device) if device.type == "cuda" else PlainStaging(device)


class PlainStaging:
    """One buffer, which is copied before the next step begins."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slot = Slot(_memory(0, torch.device("cpu")))

    def slot(self, nbytes: int) -> Slot:
        """As `Staging.slot`."""
        if self._slot.host.numel() < nbytes:
            self._slot = Slot(_memory(nbytes, torch.device("cpu")))
        return self._slot

    def send(self, slot: Slot, nbytes: int) -> Tensor:
        """As `Staging.send`."""
        return slot.host[:nbytes].to(self._device, copy=True)

    def release(self, slot: Slot) -> None:
        """As `Staging.release`."""


class CudaStaging:
    """Pinned buffers, each with one on the device, and a stream of its own for the copies."""

    ahead = _AHEAD

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots: list[Slot] = []
        self._turn = 0

    def slot(self, nbytes: int) -> Slot:
        """As `Staging.slot`."""
        index = self._turn % _SLOTS
        self._turn += 1
        if index == len(self._slots):
            self._slots.append(self._new(nbytes))
        slot = self._slots[index]
        if slot.decoded is not None:
            slot.decoded.synchronize()
        if slot.host.numel() < nbytes:
            self._slots[index] = slot = self._new(nbytes)
        return slot

    def send(self, slot: Slot, nbytes: int) -> Tensor:
        """As `Staging.send`."""
        if slot.staged is None:
            raise AssertionError("a slot of another ring")
        compute = torch.cuda.current_stream(self._device)
        staged = slot.staged[:nbytes]
        with torch.cuda.stream(self._copies):
            staged.copy_(slot.host[:nbytes], non_blocking=True)
        compute.wait_stream(self._copies)
        slot.staged.record_stream(compute)  # it may be another one than that of the allocation
        return staged

    def release(self, slot: Slot) -> None:
        """As `Staging.release`."""
        slot.decoded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        slot.decoded.record(torch.cuda.current_stream(self._device))

    def _new(self, nbytes: int) -> Slot:
        slot = Slot(_memory(nbytes, torch.device("cpu"), pinned=True), _memory(nbytes, self._device))
        # What had that memory on the device before may still be at work there.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        return slot


def _memory(nbytes: int, device: torch.device, *, pinned: bool = False) -> Tensor:
    """uint8, at least *nbytes*: a power of two, so that a ring seldom grows."""
    size = 1 << max(0, nbytes - 1).bit_length()
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
