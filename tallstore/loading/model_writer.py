"""What a switch decided, written into a model's tensors: where they are, or by way of memory that is kept for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from tallstore.format.dtypes import chunk_spans
from tallstore.loading import parallel
from tallstore.loading.contents import OWN, Content, OfBase, OfExpert, Write, copy_base
from tallstore.loading.device_expert import DeviceExpert
from tallstore.loading.device_writes import DeviceWrites
from tallstore.loading.model_weights import by_device, is_direct, is_sent
from tallstore.loading.resident import ResidentBase, ResidentFiles

#: Of a tensor; to copy fewer elements costs less than to let another thread do it.
_SMALL_NUMEL: Final = 1 << 15


class ModelWriter:
    """Writes contents that are in memory already, so that nothing but a fault of the system can stop it halfway."""

    def __init__(self, files: ResidentFiles, base: ResidentBase, devices: DeviceWrites) -> None:
        """Have no memory yet."""
        self._files, self._base, self._devices = files, base, devices
        self._staging: dict[torch.dtype, Tensor] = {}

    def stage(self, writes: Iterable[Write]) -> None:
        """Have memory for the largest of the tensors that are written to by way of the CPU."""
        for target in (write.slot.tensor for write in writes if not _is_sent(write)):
            have = self._staging.get(target.dtype)
            if not is_direct(target) and (have is None or have.numel() < target.numel()):
                pinned = target.device.type == "cuda"
                self._staging[target.dtype] = torch.empty(
                    target.numel(), dtype=target.dtype, device="cpu", pin_memory=pinned
                )

    @torch.no_grad()
    def write(self, writes: Sequence[Write], task: str | None, own: Mapping[str, Tensor]) -> None:
        """Write them all.

        Args:
            writes: what goes where; `stage` was called with those that are not on devices.
            task: whose contents they are.
            own: by slot, what the model had of its own.
        """
        here, rest = self._devices.split(writes, task)
        direct = [(slot.tensor.detach(), content) for slot, content in rest if is_direct(slot.tensor)]
        self._fill([(target.view(-1), content) for target, content in direct])
        self._devices.write(here, task)
        self._send([write for write in rest if _is_sent(write)])
        for write in rest:
            target, content = write.slot.tensor.detach(), write.content
            if content is OWN:
                target.copy_(own[write.slot.name])
            elif not is_direct(target) and not _is_sent(write):
                staged = self._staging[target.dtype][: target.numel()]
                self._fill([(staged, content)])
                target.copy_(staged.view(target.shape))

    def _send(self, writes: Sequence[Write]) -> None:
        """Write tensors of an expert where they are rebuilt on their devices."""
        sent = {content.name: (slot.tensor, content) for slot, content in writes if isinstance(content, OfExpert)}
        for device, targets in by_device({name: target for name, (target, _) in sent.items()}).items():
            expert = sent[next(iter(targets))][1].expert  # all are of one
            DeviceExpert.on(expert, self._files, self._base, device).write(targets)

    def _fill(self, destinations: Sequence[tuple[Tensor, Content]]) -> None:
        """Write whole tensors to flat, contiguous ones on the CPU; those of the model's own are left out."""
        experts = {content.task: content.expert for _, content in destinations if isinstance(content, OfExpert)}
        for expert in experts.values():  # one at most: contents are those of one state
            expert.write({to.name: destination for destination, to in destinations if isinstance(to, OfExpert)})
        jobs: list[parallel.Job] = []
        for destination, content in destinations:
            if isinstance(content, OfBase):
                for start, stop in chunk_spans(destination.numel()):
                    job = partial(copy_base, self._base, content, start, destination[start:stop])
                    if stop - start < _SMALL_NUMEL:
                        job()
                    else:
                        jobs.append(job)
        parallel.run(jobs)


def _is_sent(write: Write) -> bool:
    return isinstance(write.content, OfExpert) and is_sent(write.slot.tensor)
