"""Which tensors the tasks of a bundle made of each tensor of the base."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tallstore.format.dtypes import CODED
from tallstore.format.manifest import BasedTensor, BaseTensor, DroppedTensor, PrivateTensor, Whole
from tallstore.format.owners import Task
from tallstore.format.payloads import BaseTensors


@dataclass(frozen=True, slots=True)
class Lineage:
    """A tensor of the base, and what came of it.

    Attributes:
        name: the base's, by which tasks and shared vectors refer to it.
        names: all that the base has for it, where names are tied.
        tensor: the base's.
        made: each task's own; None where a task has none, or only under a name that the base does not have.
    """

    name: str
    names: tuple[str, ...]
    tensor: BaseTensor
    made: tuple[Whole | None, ...]

    @property
    def numel(self) -> int:
        """Elements of the base's tensor."""
        return math.prod(self.tensor.shape)

    @property
    def has_weights(self) -> bool:
        """Whether it has elements that training moves: those of floating-point tensors."""
        return self.tensor.dtype in CODED and self.numel > 0

    def is_whole(self, tensor: Whole | None) -> bool:
        """Whether one of its tensors is stored whole, and has a task vector: as floats, in the base's shape.

        A tensor of another shape, such as a head of other classes, is no fine-tune of the base's.
        """
        return isinstance(tensor, PrivateTensor) and tensor.dtype in CODED and tensor.shape == self.tensor.shape


def lineages(base: BaseTensors, tasks: Sequence[Task], shared: Collection[str] = ()) -> list[Lineage]:
    """What *tasks* made of each tensor of the base, in its order.

    Names that the base ties are one tensor, unless several of them are in use: by experts that had untied them.

    Args:
        base: the base's tensors.
        tasks: of any group.
        shared: names that have shared vectors, and so are in use whatever the tasks have.
    """
    made = [_by_base_name(task) for task in tasks]
    used = {*shared, *(name for names in made for name in names)}
    found = []
    for names in _tied(base):
        first, *others = [name for name in names if name in used] or names[:1]
        for name, known_as in [(first, [name for name in names if name not in others]), *((o, [o]) for o in others)]:
            found.append(Lineage(name, tuple(known_as), base[name], tuple(own.get(name) for own in made)))
    return found


def _by_base_name(task: Task) -> Mapping[str, Whole]:
    """A task's tensors by the base's name for them."""
    dropped = {tensor.name for tensor in task.table.tensors if isinstance(tensor, DroppedTensor)}
    found: dict[str, Whole] = {}
    for tensor in task.table.tensors:
        if isinstance(tensor, BasedTensor):
            found[tensor.base_name] = tensor
        elif isinstance(tensor, PrivateTensor):
            name = tensor.name if tensor.base is None else tensor.base
            if name in task.base and name not in dropped:  # what is dropped has no descendant, whatever is called so
                found.setdefault(name, tensor)
    return found


def _tied(base: BaseTensors) -> Iterator[list[str]]:
    """The base's names, those of one tensor together, its own first."""
    tied: dict[str, list[str]] = {}
    for name, tensor in base.items():
        tied.setdefault(tensor.alias_of or name, []).append(name)
    for carrier, names in tied.items():
        yield [carrier, *(name for name in names if name != carrier)]
