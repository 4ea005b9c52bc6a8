"""The memory of a model, piece by piece: what is written to, and what must not be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from tallstore.errors import OptionError
from tallstore.loading.model_weights import by_memory


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of memory of the model.

    Attributes:
        names: as `NamedTensors` gives them; several for tied tensors.
        tensors: by these names, each once.
        place: equal as long as it is the same memory.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    place: object

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        """The first of its tensors."""
        return self.tensors[0]

    @property
    def is_frozen(self) -> bool:
        """Whether torch counts all writes to it: not those of fused optimisers, nor of batch norm to its buffers."""
        return all(isinstance(whole, nn.Parameter) and not whole.requires_grad for whole in map(_whole, self.tensors))

    @property
    def versions(self) -> tuple[int, ...] | None:
        """How often torch counted a write; None where it does not count."""
        if any(tensor.is_inference() for tensor in self.tensors):
            return None
        return tuple(tensor._version for tensor in self.tensors)  # noqa: SLF001 - it has no public name

    def count_write(self) -> None:
        """Let graphs that hold the old values notice, as with any write in place."""
        for tensor in self.tensors:
            if not tensor.is_inference():
                increment_version(tensor)


def _whole(tensor: Tensor) -> Tensor:
    """What a tensor is a part of, itself by default."""
    return tensor if isinstance(tensor, nn.Parameter) or tensor._base is None else tensor._base  # noqa: SLF001


def slots_of(tensors: Mapping[str, Tensor]) -> dict[str, Slot]:
    """The memory of a model's *tensors*, by first names."""
    slots: dict[str, Slot] = {}
    for place, names in by_memory(tensors).items():
        unique = {id(tensors[name]): tensors[name] for name in names}
        slots[names[0]] = Slot(tuple(names), tuple(unique.values()), place)
    return slots


def check_slot(slot: Slot) -> None:
    """Refuse memory that is not written in place.

    Raises:
        OptionError: the tensor has none, or is of a class or a layout of its own.
    """
    tensor = slot.tensor
    if is_lazy(tensor) or tensor.is_meta:
        raise OptionError(f"tensor {slot.name!r} of the model has no memory; load the model's weights first")
    if type(tensor.detach()) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        raise OptionError(
            f"tensor {slot.name!r} of the model is of type {type(tensor).__name__}, which is not written in place; "
            "give a model of ordinary tensors"
        )


def check_mode(slot: Slot) -> None:
    """Refuse memory that may not be written in the mode that torch is in.

    Raises:
        OptionError: it was made in inference mode, and this is not it.
    """
    if slot.tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise OptionError(
            f"tensor {slot.name!r} of the model was made in inference mode; "
            "make the model outside of it, or switch inside of torch.inference_mode()"
        )


def memory_span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the memory that a tensor's elements are in; its storage, where it is part of one."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
