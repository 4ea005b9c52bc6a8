"""The part of a switch that devices do from what is kept on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES
from tallstore.format.bundle_files import BundleFiles
from tallstore.loading.contents import Content, OfBase, OfExpert, Write
from tallstore.loading.device_expert import DeviceExpert
from tallstore.loading.device_memory import DeviceMemory
from tallstore.loading.device_pieces import Opener, is_copied_there, is_for_device
from tallstore.loading.expert import Expert
from tallstore.loading.model_weights import is_sent
from tallstore.loading.pinned_base import PinnedBase


class DeviceWrites:
    """Memories on the devices of one model; none where nothing is to be kept there."""

    def __init__(self, files: BundleFiles, base: PinnedBase, limit_nbytes: int, *, enabled: bool) -> None:
        """Take no memory yet.

        Args:
            files: the bundle's.
            base: of the experts.
            limit_nbytes: on each device, of what tasks have of their own.
            enabled: whether anything is kept at all.
        """
        self._files, self._base, self._limit, self._enabled = files, base, limit_nbytes, enabled
        self._memories: dict[torch.device, DeviceMemory | None] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on all devices."""
        return sum(memory.nbytes for memory in self._memories.values() if memory is not None)

    def split(self, writes: Iterable[Write]) -> tuple[list[Write], list[Write]]:
        """What devices can do from what is kept there, and the rest."""
        here: list[Write] = []
        rest: list[Write] = []
        for write in writes:
            (here if self._is_kept(write.slot.tensor, write.content) else rest).append(write)
        return here, rest

    def hold(self, writes: Iterable[Write], keep: Container[str | None]) -> None:
        """Have on the devices what *writes*, which they can do, are made of.

        Raises:
            TallstoreError: as `DeviceMemory.hold`.
        """
        for memory, part in self._by_memory(writes):
            if part.expert is not None:
                memory.hold(Opener(part.expert.task, self._files, self._base), part.of_expert, keep)
            memory.hold_base(self._base, part.of_base)

    def write(self, writes: Iterable[Write]) -> None:
        """Do *writes*, which were held.

        Raises:
            TallstoreError: as `Expert.read`, where a task did not stay.
        """
        for memory, part in self._by_memory(writes):
            if part.expert is not None:
                name = part.expert.task.entry.name
                if memory.holds(name, part.of_expert):
                    memory.write(name)
                else:
                    DeviceExpert.on(part.expert, self._files, self._base, memory.device).write(part.of_expert)
            memory.write_base(self._base, part.of_base)

    def trim(self, keep: Container[str | None]) -> None:
        """Keep to the bounds; *keep* as for `hold`."""
        for memory in self._memories.values():
            if memory is not None:
                memory.trim(keep)

    def forget(self) -> None:
        """Forget the tasks: the model's memory is not where it was."""
        for memory in self._memories.values():
            if memory is not None:
                memory.forget()

    def _is_kept(self, tensor: Tensor, content: Content) -> bool:
        wanted = DTYPE_NAMES.get(tensor.dtype)
        if not self._enabled or wanted is None or not is_sent(tensor) or self._memory(tensor.device) is None:
            return False
        if isinstance(content, OfBase):
            return is_copied_there(content.tensor.dtype, DTYPE_NAMES[content.dtype], wanted)
        if isinstance(content, OfExpert):
            return is_for_device(content.expert.task, content.expert.task.tensor(content.name), wanted)
        return False

    def _memory(self, device: torch.device) -> DeviceMemory | None:
        if device not in self._memories:
            self._memories[device] = DeviceMemory.on(device, self._limit)
        return self._memories[device]

    def _by_memory(self, writes: Iterable[Write]) -> list[tuple[DeviceMemory, _Part]]:
        parts = defaultdict[torch.device, list[Write]](list)
        for write in writes:
            parts[write.slot.tensor.device].append(write)
        found: list[tuple[DeviceMemory, _Part]] = []
        for device, members in parts.items():
            memory = self._memory(device)
            if memory is not None:
                found.append((memory, _part(members)))
        return found


class _Part(NamedTuple):
    """What is written on one device, flat.

    Attributes:
        expert: that tensors are of; None where they are all of the base.
        of_expert: by their names there.
        of_base: and what they are to hold.
    """

    expert: Expert | None
    of_expert: Mapping[str, Tensor]
    of_base: Sequence[tuple[Tensor, OfBase]]


def _part(writes: Iterable[Write]) -> _Part:
    expert: Expert | None = None
    of_expert: dict[str, Tensor] = {}
    of_base: list[tuple[Tensor, OfBase]] = []
    for slot, content in writes:
        flat = slot.tensor.detach().view(-1)
        if isinstance(content, OfExpert):
            expert = content.expert  # all are of one
            of_expert[content.name] = flat
        elif isinstance(content, OfBase):
            of_base.append((flat, content))
    return _Part(expert, of_expert, of_base)
