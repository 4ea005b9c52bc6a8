"""Groups and tasks of a bundle, their tables checked: what has shards, and what of them a tensor is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tallstore.errors import UnknownTensorError
from tallstore.format import layout
from tallstore.format.manifest import (
    AliasTensor,
    DroppedTensor,
    Role,
    Shard,
    TaskEntry,
    TaskTable,
    Vector,
    Whole,
)
from tallstore.format.payloads import (
    BaseTensors,
    Coded,
    Stored,
    Vectors,
    coded_part,
    tensor_payloads,
    vector_step_of,
    vector_values_of,
)


@dataclass(frozen=True)
class Owner:
    """A group or a task: whose shards they are.

    Attributes:
        directory: of the shards, in the bundle.
        shards: as payloads number them.
    """

    directory: str
    shards: tuple[Shard, ...]

    def path(self, number: int) -> str:
        """Where a shard is in the bundle."""
        return f"{self.directory}/{self.shards[number].file}"


@dataclass(frozen=True)
class Group(Owner):
    """A group's table, checked."""

    vectors: Vectors

    def vector(self, tensor: str, role: Role) -> Vector:
        """A vector of a base tensor that a code needs; the checks of the tables have seen to it that it is there."""
        return self.vectors[tensor, role]


@dataclass(frozen=True)
class Task(Owner):
    """A task's table, checked against its group's and the base's.

    Attributes:
        entry: the manifest's.
        table: task.json.
        group: the task's.
        base: the base's tensors.
        tensors: by name, a tied name leading to the tensor that it is tied to; the dropped ones are left out.
    """

    entry: TaskEntry
    table: TaskTable
    group: Group
    base: BaseTensors
    tensors: Mapping[str, Whole]

    def tensor(self, name: str) -> Whole:
        """The tensor of that name.

        Raises:
            UnknownTensorError: there is none.
        """
        if name not in self.tensors:
            raise UnknownTensorError(f"task {self.entry.name!r}", "tensor", name, self.tensors)
        return self.tensors[name]


def table_paths(entry: TaskEntry) -> tuple[str, ...]:
    """The tables that a task is understood by."""
    return layout.BASE_TABLE, layout.group_table(entry.group), layout.task_table(entry.slug)


def payloads(task: Task, names: Iterable[str] | None, *, shared: bool) -> Iterator[tuple[str, Stored]]:
    """What tensors of a task are read from, and its shard, in the task and in its group; all tensors by default."""
    for tensor in map(task.tensor, task.tensors if names is None else names):
        for stored in tensor_payloads(tensor):
            yield task.path(stored.payload.shard), stored
        for vector in _vectors_of(task, coded_part(tensor)) if shared else ():
            shape = task.base[vector.tensor].shape
            for part in (vector_values_of(vector, shape), vector_step_of(vector, shape)):
                if part is not None:
                    yield task.group.path(part.payload.shard), part


def _vectors_of(task: Task, coded: Coded | None) -> Iterator[Vector]:
    """The shared vectors that a coded tensor is rebuilt with."""
    if coded is not None:
        roles: tuple[Role, ...] = (*coded.roles, "centre")
        found = (task.group.vectors.get((coded.base_name, role)) for role in roles)
        yield from (vector for vector in found if vector is not None)


def whole_tensors(table: TaskTable) -> Mapping[str, Whole]:
    """The tensors of a task by name, a tied name leading to the one that it is tied to; the dropped ones left out."""
    whole = {tensor.name: tensor for tensor in table.tensors if isinstance(tensor, Whole)}
    return {
        tensor.name: whole[tensor.of if isinstance(tensor, AliasTensor) else tensor.name]
        for tensor in table.tensors
        if not isinstance(tensor, DroppedTensor)
    }
