"""Consensus Merging (TALL-masks, arXiv 2405.07813): of a merged vector, what several tasks claim.

    base + scale * 1{at least k masks are set} * merged        equation 5

Where tasks store a tensor whole, their task vectors are exact: the merged vector is made of them as the group's method
makes it, and a mask by equation 4, mask_t = |tau_t| > mask_lambda * |merged - tau_t|.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit.gain import is_number
from tallstore.fit.ties import disjoint_sum, trimmed
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.manifest import Mask
from tallstore.format.owners import Task
from tallstore.format.payloads import coded_part, row_count, vector_step_of, vector_values_of
from tallstore.inspecting.agreement import Words, at_least, tally
from tallstore.inspecting.claims import CHUNK_WORDS, ReadClaims, open_claims, words
from tallstore.inspecting.lineage import Lineage
from tallstore.loading.merging import Elements, Merging
from tallstore.loading.sides import RowScales, SharedChunk

_MERGES = ("sum", "mean", "ties")


def consensus(merging: Merging, k: int, scale: float) -> dict[str, Tensor]:
    """Merge what at least *k* of the tasks' masks claim; see `Bundle.consensus`."""
    merge = _check(merging, k, scale)
    tasks, found = merging.tasks, merging.lineages(merging.tasks)
    if merge is not None and any(_needs_everyone(merging, lineage, k) for lineage in found):
        tasks = merging.everyone()
        found = merging.lineages(tasks)
    return merging.moved(found, _Consensus(merging, tasks, merge, operator.index(k), float(scale)).move)


def _check(merging: Merging, k: int, scale: float) -> str | None:
    """How the group was merged; None where somebody else did.

    Raises:
        OptionError: this group has no consensus, or an argument is out of range.
    """
    method = merging.method
    if method.name != "tall-mask" or method.parameters.get("normalise"):
        form = f"{method.name}, normalised" if method.name == "tall-mask" else method.name
        raise OptionError(
            f"consensus: needs masks over one sum of task vectors, which {form} does not have; pack with TallMask()"
        )
    merge = method.parameters.get("merge")
    if merge not in (*_MERGES, "checkpoint"):
        raise OptionError(f"consensus: the group says that it was merged by {merge!r}; pack with TallMask() again")
    count = len(merging.tasks)
    if not hasattr(k, "__index__") or not 0 <= k <= count:
        raise OptionError(f"k is {k!r}; give how many of the {count} masks must agree, from 0 to {count}")
    if not is_number(scale):
        raise OptionError(f"scale is {scale!r}; give a finite number, such as 1.0")
    return None if merge == "checkpoint" else str(merge)


def _needs_everyone(merging: Merging, lineage: Lineage, k: int) -> bool:
    """Whether a tensor is merged here, out of the task vectors of the whole group."""
    if (lineage.name, "merged") in merging.group.vectors or not lineage.has_weights:
        return False
    return k == 0 or any(map(lineage.is_whole, lineage.made))


class _Consensus:
    """What is added to each tensor of the base."""

    def __init__(self, merging: Merging, tasks: Sequence[Task], merge: str | None, k: int, scale: float) -> None:
        """Read nothing yet.

        Args:
            merging: the tasks whose masks are counted.
            tasks: those of the lineages: these, or the whole group.
            merge: how the group's task vectors are merged; None where it cannot be done again.
            k: masks that must be set.
            scale: of the merged vector.
        """
        self._merging, self._tasks, self._merge, self._k, self._scale = merging, tasks, merge, k, scale
        names = {task.entry.name for task in merging.tasks}
        self._counted = [place for place, task in enumerate(tasks) if task.entry.name in names]

    def move(self, lineage: Lineage) -> Elements | None:
        """As `Move`."""
        shared = self._shared(lineage)
        if shared is None and self._merge is None:
            return None
        places = self._counted if shared is not None else range(len(self._tasks))
        own = {place: self._merging.own_vector(self._tasks[place], lineage.made[place], lineage) for place in places}
        vectors = {place: vector for place, vector in own.items() if vector is not None}
        if shared is None and not vectors:
            return None
        masks = self._masks(lineage)
        room = np.zeros((len(self._counted), min(words(lineage.numel), CHUNK_WORDS)), np.uint64)

        def added(start: int, stop: int) -> Tensor:
            exact = {place: read(start, stop) for place, read in vectors.items()}
            merged = self._merged(exact) if shared is None else shared(start, stop)
            claims = room[:, : words(stop - start)]
            for place, row in zip(self._counted, claims, strict=True):
                if place in masks:
                    masks[place](start // CHUNK_NUMEL, row)
                else:
                    self._claim(place, exact.get(place), merged, row)
            agreed = at_least(tally(claims), self._k)
            kept = np.unpackbits(agreed.view(np.uint8), count=stop - start, bitorder="little")
            return torch.where(torch.from_numpy(kept.view(np.bool_)), merged * self._scale, 0.0)

        return added

    def _masks(self, lineage: Lineage) -> Mapping[int, ReadClaims]:
        """The stored masks of the tasks that are counted."""
        masks = {}
        for place in self._counted:
            tensor, task = lineage.made[place], self._tasks[place]
            coded = None if tensor is None else coded_part(tensor)
            if coded is not None:
                if not isinstance(coded.code, Mask):
                    raise OptionError(
                        f"consensus: task {task.entry.name!r} has no mask for {coded.name!r}; pack with TallMask()"
                    )
                masks[place] = open_claims(self._merging.files, task, coded, hold=self._merging.hold)
        return masks

    def _claim(self, place: int, vector: Tensor | None, merged: Tensor, row: Words) -> None:
        """Write the mask of a tensor that is stored whole, by equation 4; an empty one for all others.

        Where merged is 0 there is nothing to claim, whatever it says.
        """
        row[:] = 0
        if vector is not None:
            mask = vector.abs() > self._lambda(place) * (merged - vector).abs()
            packed = np.packbits(mask.numpy(), bitorder="little")
            row.view(np.uint8)[: packed.size] = packed

    def _merged(self, vectors: Mapping[int, Tensor]) -> Tensor:
        """What the group's method makes of the task vectors of those that moved a tensor."""
        if self._merge == "ties":
            return disjoint_sum([trimmed(vector, self._threshold(place)) for place, vector in vectors.items()])
        total = torch.zeros_like(next(iter(vectors.values())))
        for vector in vectors.values():
            total += vector
        return total / len(vectors) if self._merge == "mean" else total

    def _shared(self, lineage: Lineage) -> Elements | None:
        """The group's merged vector of a tensor, at gain one; None where it has none."""
        merging, shape = self._merging, lineage.tensor.shape
        vector = merging.group.vectors.get((lineage.name, "merged"))
        if vector is None:
            return None
        values, steps = merging.files.payload(merging.group, vector_values_of(vector, shape)), np.ones(1, np.float32)
        step = vector_step_of(vector, shape)
        if step is not None:
            steps = merging.files.payload(merging.group, step).all().view("<f4")
        rows = RowScales(steps, math.prod(shape) // row_count(shape, vector.row_axes) if step is not None else 1)

        def read(start: int, stop: int) -> Tensor:
            first = start % CHUNK_NUMEL
            chunk = SharedChunk(values.chunk(start // CHUNK_NUMEL), vector.dtype, rows)
            return chunk.everywhere(first, first + stop - start, start)

        return read

    def _lambda(self, place: int) -> float:
        return self._recorded(place, "mask_lambda", self._merging.method.parameters.get("mask_lambda"))

    def _threshold(self, place: int) -> float:
        return self._recorded(place, "trim_threshold", None)

    def _recorded(self, place: int, parameter: str, otherwise: object) -> float:
        """A parameter of a task's fit."""
        task = self._tasks[place]
        found = task.table.chosen.get(parameter, otherwise)
        if not is_number(found):
            raise OptionError(f"consensus: task {task.entry.name!r} does not record its {parameter}; pack it again")
        return float(found)
