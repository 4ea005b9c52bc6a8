"""The part of a switch that devices do from what is kept on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

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

_MAX_PARTS: Final = 256


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
        # A switch is a few kernels: to find out anew what goes where would take longer than they do.
        self._kept: dict[str | None, dict[str, bool]] = {}
        self._parts: dict[tuple[str | None, tuple[str, ...]], Sequence[tuple[DeviceMemory, _Part]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on all devices."""
        return sum(memory.nbytes for memory in self._memories.values() if memory is not None)

    def split(self, writes: Iterable[Write], task: str | None) -> tuple[Sequence[Write], Sequence[Write]]:
        """What devices can do from what is kept there, and the rest.

        Args:
            writes: of a switch to *task*.
            task: None for the base.
        """
        if not self._enabled:
            return [], list(writes)
        kept = self._kept.setdefault(task, {})
        here: list[Write] = []
        rest: list[Write] = []
        for write in writes:
            name = write.slot.name
            if name not in kept:
                kept[name] = self._is_kept(write.slot.tensor, write.content)
            (here if kept[name] else rest).append(write)
        return here, rest

    def hold(self, writes: Sequence[Write], task: str | None, keep: Container[str | None]) -> None:
        """Have on the devices what *writes*, which they can do, are made of; arguments as for `split`.

        Raises:
            TallstoreError: as `DeviceMemory.hold`.
        """
        for memory, part in self._by_memory(writes, task):
            if part.expert is not None:
                memory.hold(Opener(part.expert.task, self._files, self._base), part.of_expert, keep)
            if part.of_base:
                memory.hold_base(self._base, part.of_base)

    def write(self, writes: Sequence[Write], task: str | None) -> None:
        """Do *writes*, which were held; arguments as for `split`.

        Raises:
            TallstoreError: as `Expert.read`, where a task did not stay.
        """
        for memory, part in self._by_memory(writes, task):
            if part.expert is not None:
                name = part.expert.task.entry.name
                if memory.holds(name, part.of_expert):
                    memory.write(name)
                else:
                    DeviceExpert.on(part.expert, self._files, self._base, memory.device).write(part.of_expert)
            if part.of_base:
                memory.write_base(self._base, part.of_base)

    def trim(self, keep: Container[str | None]) -> None:
        """Keep to the bounds; *keep* as for `hold`."""
        for memory in self._memories.values():
            if memory is not None:
                memory.trim(keep)

    def forget(self) -> None:
        """Forget the tasks: the model's memory is not where it was, or what it is to hold is another."""
        self._kept, self._parts = {}, {}
        for memory in self._memories.values():
            if memory is not None:
                memory.forget()

    def _is_kept(self, tensor: Tensor, content: Content) -> bool:
        wanted = DTYPE_NAMES.get(tensor.dtype)
        if wanted is None or not is_sent(tensor) or self._memory(tensor.device) is None:
            return False
        if isinstance(content, OfBase):
            return is_copied_there({content.tensor.dtype, DTYPE_NAMES[content.dtype], wanted})
        if isinstance(content, OfExpert):
            return is_for_device(content.expert.task, content.expert.task.tensor(content.name), wanted)
        return False

    def _memory(self, device: torch.device) -> DeviceMemory | None:
        if device not in self._memories:
            self._memories[device] = DeviceMemory.on(device, self._limit)
        return self._memories[device]

    def _by_memory(self, writes: Sequence[Write], task: str | None) -> Sequence[tuple[DeviceMemory, _Part]]:
        key = task, tuple(write.slot.name for write in writes)
        if key not in self._parts:
            if len(self._parts) >= _MAX_PARTS:
                self._parts.clear()
            by_device = defaultdict[torch.device, list[Write]](list)
            for write in writes:
                by_device[write.slot.tensor.device].append(write)
            found = [(self._memory(device), _part(members)) for device, members in by_device.items()]
            self._parts[key] = [(memory, part) for memory, part in found if memory is not None]
        return self._parts[key]


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
