"""Stitching of sparse experts (Localize-and-Stitch, arXiv 2408.13656): at each weight, the mean of what tasks claim.

    base + sum over tasks of mask_t * tau_t / number of masks that are set

tau_t is the task vector's own, as the bundle has its values: the gains that the task was packed with are for its expert
alone. Where a task stores a tensor whole, tau_t is exact, and the mask follows from the magnitude that was kept of the
task; it is all that moved where masks were given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit.gain import is_number
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.manifest import Sparse, Whole
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded, coded_part
from tallstore.inspecting.lineage import Lineage
from tallstore.loading.coded import open_sides
from tallstore.loading.merging import Elements, Merging
from tallstore.loading.sides import SparseSides

#: A task's vector in elements [start, stop), which lie in one chunk, 0 where it claims nothing; and where it claims.
_Claimed = Callable[[int, int], tuple[Tensor, Tensor]]


def stitch(merging: Merging) -> dict[str, Tensor]:
    """Average what the tasks claim; see `Bundle.stitch`.

    Raises:
        OptionError: they are no sparse experts.
    """
    if merging.method.name != "localize":
        raise OptionError(f"stitch: needs sparse experts, and these are of {merging.method.name}; pack with Localize()")
    return merging.moved(merging.lineages(merging.tasks), lambda lineage: _mean(merging, lineage))


def _mean(merging: Merging, lineage: Lineage) -> Elements | None:
    """What the tasks that claim an element add to it, on average."""
    claimed = [
        read
        for task, tensor in zip(merging.tasks, lineage.made, strict=True)
        if (read := _claimed(merging, task, tensor, lineage)) is not None
    ]
    if not claimed:
        return None

    def added(start: int, stop: int) -> Tensor:
        total = torch.zeros(stop - start, dtype=torch.float32, device="cpu")
        count = torch.zeros_like(total)
        for read in claimed:
            vector, mask = read(start, stop)
            total += vector
            count += mask
        return total.div_(count.clamp_(min=1))

    return added


def _claimed(merging: Merging, task: Task, tensor: Whole | None, lineage: Lineage) -> _Claimed | None:
    """A task's part in a tensor; None where it has none."""
    coded = None if tensor is None else coded_part(tensor)
    if coded is not None:
        return _sparse(merging, task, coded)
    vector = merging.own_vector(task, tensor, lineage)
    return None if vector is None else _whole(task, vector)


def _sparse(merging: Merging, task: Task, coded: Coded) -> _Claimed:
    """Of a sparse tensor, or of the leading rows of an extended one."""
    code = coded.code
    if not isinstance(code, Sparse):
        raise OptionError(f"stitch: task {task.entry.name!r} has no values of its own for {coded.name!r}")
    held = open_sides(merging.files, task, coded) if merging.hold else None

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        vector = torch.zeros(stop - start, dtype=torch.float32, device="cpu")
        mask = torch.zeros(stop - start, dtype=torch.bool, device="cpu")
        last = min(stop, coded.numel)
        if start < last:
            sides, first = (held or open_sides(merging.files, task, coded))(start, last), start % CHUNK_NUMEL
            if not isinstance(sides, SparseSides):
                raise AssertionError("a sparse tensor with other sides")
            places = torch.from_numpy(sides.positions - first)
            vector[places] = torch.from_numpy(sides.values) * code.unit
            mask[places] = True
        return vector, mask

    return read


def _whole(task: Task, vector: Elements) -> _Claimed:
    """Of a tensor that is stored whole."""
    threshold = task.table.chosen.get("threshold")
    smallest = float(threshold) if is_number(threshold) else 0.0

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        found = vector(start, stop)
        mask = (found.abs() >= smallest) & (found != 0)
        return torch.where(mask, found, 0.0), mask

    return read
