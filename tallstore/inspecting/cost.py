"""What a parameter costs, in bits: one definition, from the tables alone, for everything that tells it.

    8 * (files of the task's codes + its share of its group's files) / parameters that its method was to code

What the method failed on is stored whole among the codes, and counts like them. What is whole by its nature (a head, a
small tensor, what was asked for) has files of its own and is left out, and so is what equals the base.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from tallstore.format import layout
from tallstore.format.manifest import CodedTensor, ExtendedTensor, Manifest, PrivateTensor, SameCode, TaskTable, Tensor

_CODES: Final = "mask-"  # what the names of the shards begin with that hold codes, and what no code fits


class Costs:
    """The sizes of a bundle's files, by what they are for."""

    def __init__(self, manifest: Manifest) -> None:
        """Go over the files that the manifest lists, once."""
        self._nbytes = {file.path: file.size for file in manifest.files}
        self._members = Counter(task.group for task in manifest.tasks)
        self._shared: Counter[str] = Counter()
        groups = {layout.group_directory(group.id): group.id for group in manifest.groups}
        for file in manifest.files:
            group = groups.get(file.path.rpartition("/")[0])
            if group is not None:
                self._shared[group] += file.size

    def bits(self, table: TaskTable) -> float | None:
        """What a parameter costs a task; None where there was nothing to code."""
        numel = coded_numel(table)
        if not numel:
            return None
        directory, shards = layout.task_directory(table.slug), {shard.file for shard in table.shards}
        own = sum(self._nbytes.get(f"{directory}/{name}", 0) for name in shards if name.startswith(_CODES))
        return 8 * (own + self._shared[table.group] / max(1, self._members[table.group])) / numel


def coded_numel(table: TaskTable) -> int:
    """Elements of a task that its method coded, or was to code and failed on."""
    shards = [shard.file for shard in table.shards]
    return sum(_numel(tensor, shards) for tensor in table.tensors)


def _numel(tensor: Tensor, shards: list[str]) -> int:
    if isinstance(tensor, CodedTensor):
        return math.prod(tensor.shape)
    if isinstance(tensor, ExtendedTensor) and not isinstance(tensor.leading, SameCode):
        return tensor.rows * math.prod(tensor.shape[1:])
    if isinstance(tensor, PrivateTensor) and tensor.values is not None and tensor.values.shard < len(shards):
        return math.prod(tensor.shape) if shards[tensor.values.shard].startswith(_CODES) else 0
    return 0
