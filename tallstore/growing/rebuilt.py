"""A task of a bundle as a checkpoint: its weights as the bundle rebuilds them, when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tallstore.checkpoints import Checkpoint
from tallstore.checkpoints.checkpoint import Origin
from tallstore.checkpoints.state_dict import StateDictCheckpoint
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.manifest import BasedTensor, PrivateTensor
from tallstore.format.owners import Task
from tallstore.format.recent import Recent
from tallstore.loading.expert import Expert

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tallstore.format.bits import Bytes
    from tallstore.loading.pinned_base import PinnedBase

_KEPT_CHUNKS = 4  # tiles are smaller than chunks, and read by several threads: none should be rebuilt for each of them


class RebuiltCheckpoint(Checkpoint):
    """The expert of a task, its ties and its companion files with it."""

    def __init__(self, bundle: BundleFiles, task: Task, base: PinnedBase, names: Iterable[str] | None = None) -> None:
        """Read tables only.

        Args:
            bundle: that has the task; stays open as long as weights are read.
            task: of which the files are here.
            base: that it is rebuilt on.
            names: of its tensors; all by default.

        Raises:
            NotFetchedError: a companion file is not here.
        """
        expert = Expert(task, bundle, base)
        chosen = sorted(expert.names if names is None else names)
        carriers: dict[str, str] = {}
        ties = {name: carriers.setdefault(expert.carrier(name), name) for name in chosen}
        where = f"task {task.entry.name!r} of {bundle.where}"
        companions = {file.name: bundle.companion(task, file) for file in task.table.files}
        super().__init__(
            Origin(where, companions=companions),
            {name: expert.spec(name) for name in chosen},
            {name: carrier for name, carrier in ties.items() if name != carrier},
        )
        self._bundle, self._task, self._base, self._expert = bundle, task, base, expert
        self._chunks = Recent[tuple[str, int], "Bytes"](_KEPT_CHUNKS)

    def part(self, names: Iterable[str]) -> RebuiltCheckpoint:
        """As `Checkpoint.part`."""
        return RebuiltCheckpoint(self._bundle, self._task, self._base, names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get the weights: they have neither the bundle's files open nor the base's."""
        tensors = {name: self.read(name).view(self.spec(name).shape) for name in self.names}
        return _itself, (StateDictCheckpoint(self.origin, tensors),)

    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        found = [np.empty(0, np.uint8)]
        width = self.spec(name).nbytes // max(1, self.spec(name).numel)
        while start < stop:
            index = start // CHUNK_NUMEL
            first = index * CHUNK_NUMEL
            until = min(stop, first + CHUNK_NUMEL)
            chunk = self._chunks.get((name, index), partial(self._rebuild, name, first))
            found.append(chunk[(start - first) * width : (until - first) * width])
            start = until
        return found[1] if len(found) == 2 else np.concatenate(found)

    def _rebuild(self, name: str, first: int) -> Bytes:
        last = min(first + CHUNK_NUMEL, self.spec(name).numel)
        return self._expert.elements(name, first, last).view(torch.uint8).numpy()

    def _release(self) -> None:
        self._chunks.clear()


def base_names(task: Task) -> Mapping[str, str]:
    """What the base calls the tensors of a task, as far as its table says so."""
    named = {}
    for tensor in task.table.tensors:
        if isinstance(tensor, BasedTensor):
            named[tensor.name] = tensor.base_name
        elif isinstance(tensor, PrivateTensor) and tensor.base is not None:
            named[tensor.name] = tensor.base
    return named


def _itself(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint
