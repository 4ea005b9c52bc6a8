"""A base as base.json describes it, whatever checkpoint it is read from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tallstore.checkpoints import Checkpoint
from tallstore.format.dtypes import TensorSpec, chunk_count, chunk_span
from tallstore.format.payloads import BaseTensors
from tallstore.loading.pinned_base import PinnedBase

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class DescribedBase(Checkpoint):
    """The tensors that base.json lists, under its names and with its ties; what else the checkpoint has is not there.

    Groups that are added later are packed against the same names as the first one, whichever copy of the base is read.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: BaseTensors, names: Mapping[str, str]) -> None:
        """Take a checkpoint and its *names* for the *tensors*; reads nothing, and does not close the checkpoint."""
        specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        ties = {name: tensor.alias_of for name, tensor in tensors.items() if tensor.alias_of is not None}
        super().__init__(checkpoint.origin, specs, ties)
        self._checkpoint, self._tensors, self._names = checkpoint, tensors, names

    def part(self, names: Iterable[str]) -> DescribedBase:
        """As `Checkpoint.part`."""
        needed = dict.fromkeys(each for name in names for each in (self.aliases.get(name, name), name))
        tensors = {name: self._tensors[name] for name in needed}
        part = self._checkpoint.part(dict.fromkeys(self._names[name] for name in needed))
        return DescribedBase(part, tensors, {name: self._names[name] for name in needed})

    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        return self._checkpoint.read_bytes(self._names[name], start, stop)

    def _release(self) -> None:
        """The checkpoint stays open: it is somebody else's."""


def describe(checkpoint: Checkpoint, tensors: BaseTensors) -> DescribedBase:
    """Compare a base with what base.json says of it; reads all of it.

    Raises:
        BaseMismatchError: naming the first tensor that is missing or another.
    """
    base = PinnedBase(tensors, lambda: checkpoint, "first-read")
    names = {name: base.name_of(name) for name in tensors}
    for tensor in tensors.values():
        numel = TensorSpec(tensor.dtype, tensor.shape).numel
        if tensor.alias_of is None:
            for chunk in range(chunk_count(numel)):
                base.read(tensor.name, *chunk_span(numel, chunk))
    return DescribedBase(checkpoint, tensors, names)
