"""One model out of many: what the ways to merge a bundle's tasks have in common.

Each gives, for every tensor of the base, what is added to it. Everything runs over chunks: the result, and a few chunks
of each task, are all that is in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.errors import OptionError
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import TensorSpec, chunk_spans
from tallstore.format.manifest import Whole
from tallstore.format.owners import Task
from tallstore.inspecting.claims import MAX_HELD
from tallstore.inspecting.lineage import Lineage, lineages
from tallstore.loading.decode import copy_cast
from tallstore.loading.expert import Expert
from tallstore.loading.fresh_memory import refuse_too_large
from tallstore.loading.pinned_base import PinnedBase

#: Elements [start, stop) of a flat tensor, which lie in one chunk: float32 [stop - start].
Elements = Callable[[int, int], Tensor]
#: What is added to a tensor of the base; None where nothing is.
Move = Callable[[Lineage], "Elements | None"]


class Merging:
    """Some tasks of one group, and the base that they are merged on.

    Attributes:
        files: the bundle's.
        tasks: to be merged.
        group: theirs.
        method: the group's, as the manifest has it.
        hold: whether the payloads of one tensor are few enough to be open all at once.
    """

    def __init__(self, files: BundleFiles, base: PinnedBase, tasks: Iterable[Task]) -> None:
        """Read nothing yet.

        Raises:
            OptionError: there is no task, or they are of several groups.
        """
        self.files, self._base, self.tasks = files, base, tuple(tasks)
        if not self.tasks:
            raise OptionError("tasks: there are none; give the names of those to merge")
        first = self.tasks[0].entry
        for task in self.tasks:
            if task.entry.group != first.group:
                raise OptionError(
                    f"tasks: {first.name!r} is of group {first.group}, {task.entry.name!r} of {task.entry.group};"
                    " give tasks of one group"
                )
        self.group = self.tasks[0].group
        self.method = next(entry.method for entry in files.manifest.groups if entry.id == first.group)
        self.hold = len(self.tasks) <= MAX_HELD

    def everyone(self) -> tuple[Task, ...]:
        """All tasks of the group, in the bundle's order.

        Raises:
            NotFetchedError: the files of one are not here.
        """
        group = self.tasks[0].entry.group
        return tuple(self.files.tables_of(entry.name for entry in self.files.manifest.tasks if entry.group == group))

    def lineages(self, tasks: Sequence[Task]) -> list[Lineage]:
        """What *tasks* of the group made of each tensor of the base.

        Raises:
            OptionError: one ties tensors that others of the group have apart: they share no vector.
        """
        self.files.bring(tasks)
        found = lineages(self.files.base, tasks, {name for name, _ in self.group.vectors})
        tied = defaultdict[str, list[Lineage]](list)
        for lineage in found:
            tied[lineage.tensor.alias_of or lineage.name].append(lineage)
        for together in tied.values():
            for task, *made in zip(tasks, *(lineage.made for lineage in together), strict=True):
                if len({tensor is None for tensor in made}) > 1:
                    names = " and ".join(repr(lineage.name) for lineage in together)
                    raise OptionError(
                        f"tasks: {task.entry.name!r} has {names} tied, and others of its group have not;"
                        " give tasks that are alike in this"
                    )
        return found

    def own_vector(self, task: Task, tensor: Whole | None, lineage: Lineage) -> Elements | None:
        """The exact task vector of a tensor that a task stores whole; None of any other.

        What is not finite in it counts as 0, such as between equal infinities.
        """
        if tensor is None or not lineage.is_whole(tensor):
            return None
        expert = Expert(task, self.files, self._base)

        def read(start: int, stop: int) -> Tensor:
            own, base = expert.elements(tensor.name, start, stop), self._base.read(lineage.name, start, stop)
            wide = torch.float64 if torch.float64 in (own.dtype, base.dtype) else torch.float32
            return (own.to(wide) - base.to(wide)).float().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

        return read

    def moved(self, found: Iterable[Lineage], move: Move) -> dict[str, Tensor]:
        """The base, moved: new tensors by the base's names, in its order and dtypes; ties share one tensor."""
        found = list(found)
        nbytes = sum(TensorSpec(lineage.tensor.dtype, lineage.tensor.shape).nbytes for lineage in found)
        refuse_too_large(nbytes, f"{self.files.where}, the base")
        by_name: dict[str, Tensor] = {}
        for lineage in found:
            added = move(lineage) if lineage.has_weights else None
            by_name |= dict.fromkeys(lineage.names, self._moved(lineage, added))
        return {name: by_name[name] for name in self.files.base}

    def _moved(self, lineage: Lineage, added: Elements | None) -> Tensor:
        result = torch.empty(lineage.tensor.shape, dtype=TORCH_DTYPES[lineage.tensor.dtype], device="cpu")
        flat = result.view(-1)
        for start, stop in chunk_spans(lineage.numel):
            base, destination = self._base.read(lineage.name, start, stop), flat[start:stop]
            if added is None:
                destination.copy_(base)
                continue
            delta = added(start, stop)
            copy_cast(destination, (base if base.dtype is torch.float64 else base.float()) + delta)
            torch.where(delta == 0, base, destination, out=destination)  # -0.0 + 0.0 would be +0.0
        return result
