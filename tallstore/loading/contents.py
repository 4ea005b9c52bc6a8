"""What the memory of a model can hold: the base's tensors, an expert's, or what the model had of its own."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tallstore.forking import cached_property
from tallstore.format.manifest import BasedTensor, BaseTensor
from tallstore.loading.decode import copy_cast
from tallstore.loading.expert import Expert
from tallstore.loading.model_slots import Slot
from tallstore.loading.pinned_base import PinnedBase


class OwnContent:
    """What the model had before an expert first wrote there."""


OWN: Final = OwnContent()


@dataclass(frozen=True, slots=True)
class OfBase:
    """A tensor of the base, rounded to a dtype."""

    tensor: BaseTensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class OfExpert:
    """A tensor of an expert."""

    task: str
    name: str
    expert: Expert = field(compare=False)


Content: TypeAlias = OwnContent | OfBase | OfExpert


class Write(NamedTuple):
    """A piece of the model's memory, and what it is to hold."""

    slot: Slot
    content: Content


@dataclass(frozen=True)
class State:
    """What the model is: a task's expert, or the base; and what every slot holds then."""

    task: str | None
    contents: Mapping[str, Content]

    @cached_property
    def of_expert(self) -> list[OfExpert]:
        """Contents that are rebuilt."""
        return [content for content in self.contents.values() if isinstance(content, OfExpert)]

    @cached_property
    def base_tensors(self) -> list[BaseTensor]:
        """What of the base the contents are made of, each tensor once."""
        found: dict[str, BaseTensor] = {}
        for content in self.contents.values():
            if isinstance(content, OfBase):
                found[content.tensor.name] = content.tensor
            elif isinstance(content, OfExpert):
                tensor = content.expert.task.tensor(content.name)
                if isinstance(tensor, BasedTensor):
                    found[tensor.base_name] = content.expert.task.base[tensor.base_name]
        return list(found.values())

    def without(self, names: Container[str]) -> State:
        """The same of all slots but these."""
        return State(self.task, {name: content for name, content in self.contents.items() if name not in names})


@dataclass(frozen=True, slots=True)
class Holding:
    """What was written, where, and torch's count of writes after that."""

    content: Content
    place: object
    versions: tuple[int, ...] | None


def copy_base(base: PinnedBase, content: OfBase, start: int, destination: Tensor) -> None:
    """Write a tensor of the base, from element *start* on, which lies in one chunk with all of *destination*."""
    elements = base.read(content.tensor.name, start, start + destination.numel())
    if elements.dtype != content.dtype:
        rounded = torch.empty(destination.numel(), dtype=content.dtype, device="cpu")
        copy_cast(rounded, elements)
        elements = rounded
    copy_cast(destination, elements)
