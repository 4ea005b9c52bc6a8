"""What the masks of a bundle have in common: densities, the agreement profile, the overlap of each two masks.

A weight that no mask claims is called catastrophic, one that a single mask claims selfish, and one that all claim
universal (TALL-masks, arXiv 2405.07813). Counted on packed bits, chunk by chunk, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tallstore.errors import NotFetchedError, OptionError
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import chunk_count, chunk_span
from tallstore.format.manifest import ExtendedTensor, PrivateTensor, Whole
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded, coded_part, leading_shape
from tallstore.inspecting.agreement import overlaps, profile, tally
from tallstore.inspecting.claims import CHUNK_WORDS, MAX_HELD, is_mask, open_claims, words
from tallstore.inspecting.lineage import Lineage, lineages
from tallstore.meter import Meter, Progress
from tallstore.notebook import MAX_ROWS, html_table

_LONGEST_PROFILE: Final = 9  # numbers that fit a line


@dataclass(frozen=True)
class TensorStatistics:
    """The masks over one tensor of the base.

    Attributes:
        name: the base's.
        numel: its weights.
        claimed: by task, how many weights its mask claims.
        weights: by task, how many it could claim: those of a tensor's leading rows, where it was extended or cut; 0
            where the task has no such tensor.
        claimed_by: how many weights are claimed by exactly 0, 1, …, N masks.
    """

    name: str
    numel: int
    claimed: tuple[int, ...]
    weights: tuple[int, ...]
    claimed_by: tuple[int, ...]

    @property
    def densities(self) -> tuple[float | None, ...]:
        """By task, the share of weights that its mask claims; None where it has none of them."""
        return tuple(map(_share, self.claimed, self.weights))

    @property
    def profile(self) -> tuple[float | None, ...]:
        """The share of weights that exactly 0, 1, …, N masks claim."""
        return _shares(self.claimed_by)


@dataclass(frozen=True)
class LeftOut:
    """A tensor of the base that is not counted.

    Attributes:
        name: the base's.
        numel: its weights.
        reason: why, as "stored whole by 'mnist'".
    """

    name: str
    numel: int
    reason: str


@dataclass(frozen=True)
class Statistics:
    """What the masks of a bundle have in common.

    A weight is an element of a floating-point tensor of the base; a tensor is counted where no task stores it whole or
    in a code that leaves nothing out. Where a task's tensor equals the base's, or is not there, it claims nothing.

    Attributes:
        path: the bundle's directory.
        where: what to call it: the directory, or the id on the Hub and the commit.
        tasks: whose masks were counted; all that is "by task" is in their order.
        not_fetched: the bundle's other tasks, whose files are not here; empty where tasks were asked for.
        tensors: those that were counted.
        left_out: those that were not.
        overlap: how many weights each two masks both claim, and each with itself: N rows of N.
    """

    path: Path
    where: str
    tasks: tuple[str, ...]
    not_fetched: tuple[str, ...]
    tensors: tuple[TensorStatistics, ...]
    left_out: tuple[LeftOut, ...]
    overlap: tuple[tuple[int, ...], ...]

    @cached_property
    def numel(self) -> int:
        """Weights that were counted."""
        return sum(tensor.numel for tensor in self.tensors)

    @cached_property
    def left_out_numel(self) -> int:
        """Weights that were left out."""
        return sum(tensor.numel for tensor in self.left_out)

    @cached_property
    def densities(self) -> Mapping[str, float | None]:
        """By task, the share of its weights that its mask claims; None for a task that has none of them."""
        claimed, weights = self._sums
        return {task: _share(*counts) for task, *counts in zip(self.tasks, claimed, weights, strict=True)}

    @property
    def density(self) -> float | None:
        """Over all tasks; None where nothing was counted."""
        claimed, weights = self._sums
        return _share(sum(claimed), sum(weights))

    @cached_property
    def claimed_by(self) -> tuple[int, ...]:
        """How many weights are claimed by exactly 0, 1, …, N masks."""
        counts = np.zeros(len(self.tasks) + 1, np.int64)
        for tensor in self.tensors:
            counts += tensor.claimed_by
        return tuple(counts.tolist())

    @property
    def profile(self) -> tuple[float | None, ...]:
        """The agreement profile: the share of weights that exactly 0, 1, …, N masks claim; None if none was counted."""
        return _shares(self.claimed_by)

    @property
    def catastrophic(self) -> float | None:
        """The share of weights that no mask claims."""
        return self.profile[0]

    @property
    def selfish(self) -> float | None:
        """The share of weights that exactly one mask claims."""
        return self.profile[1]

    @property
    def universal(self) -> float | None:
        """The share of weights that all masks claim."""
        return self.profile[-1]

    @cached_property
    def similarity(self) -> tuple[tuple[float | None, ...], ...]:
        """Of the weights that either of two masks claims, the share that both claim: N rows of N; None for none."""
        claimed = [row[place] for place, row in enumerate(self.overlap)]
        return tuple(
            tuple(_share(both, mine + yours - both) for both, yours in zip(row, claimed, strict=True))
            for row, mine in zip(self.overlap, claimed, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """The statistics as plain JSON types: counts, and what is derived from them."""
        derived = {
            name: getattr(self, name)
            for name in ("numel", "left_out_numel", "density", "densities", "claimed_by", "profile", "similarity")
        }
        plain = asdict(self) | derived | {"path": str(self.path)}
        for tensor, counts in zip(plain["tensors"], self.tensors, strict=True):
            tensor |= {"densities": counts.densities, "profile": counts.profile}
        return plain

    @cached_property
    def _sums(self) -> tuple[list[int], list[int]]:
        """By task, over all tensors: weights that its mask claims, and that it could."""
        numbers = np.zeros((2, len(self.tasks)), np.int64)
        for tensor in self.tensors:
            numbers += (tensor.claimed, tensor.weights)
        return numbers[0].tolist(), numbers[1].tolist()

    def __repr__(self) -> str:
        return f"<Statistics {self.where!r}: {self._count()}>"

    def __str__(self) -> str:
        """A few lines for people: what was counted, the profile, a line a task for the first of them."""
        lines = self._facts()
        for task, density, nearest, common in self._rows():
            lines.append(f"  {task}: density {density}" + (f", {common} in common with {nearest}" if nearest else ""))
        return "\n".join([*lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        return html_table(self._facts(), ("task", "density", "nearest task", "in common"), self._rows(), self._notes())

    def _count(self) -> str:
        return f"{len(self.tasks)} mask{'' if len(self.tasks) == 1 else 's'} over {self.numel:,} weights"

    def _facts(self) -> list[str]:
        first = f"statistics of {self.where}: {self._count()}"
        if not self.numel:
            return [first]
        last = len(self.tasks)
        names = {last: f"all {last} (universal)", 1: "1 (selfish)", 0: "none (catastrophic)"}
        shown = [(names.get(count, str(count)), number) for count, number in enumerate(self.claimed_by)]
        if len(shown) > _LONGEST_PROFILE:
            shown = [*shown[:3], (f"3 to {last - 1}", sum(self.claimed_by[3:-1])), shown[-1]]
        shares = (f"by {count}: {_percent(_share(number, self.numel))}" for count, number in shown)
        return [first, f"weights claimed {', '.join(shares)}"]

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """Of the first tasks: name, density, the task that it has most in common with, and how much."""
        rows = []
        for place, (task, density) in enumerate(list(self.densities.items())[:MAX_ROWS]):
            shares = [
                (share, self.tasks[other]) for other, share in enumerate(self.similarity[place]) if other != place
            ]
            common, nearest = max(((share, name) for share, name in shares if share), default=(None, ""))
            rows.append((task, _percent(density), nearest, _percent(common)))
        return rows

    def _notes(self) -> list[str]:
        notes = []
        if len(self.tasks) > MAX_ROWS:
            notes.append(f"and {len(self.tasks) - MAX_ROWS} more in statistics.tasks")
        if self.left_out:
            example = f"{self.left_out[0].name} ({self.left_out[0].reason})"
            notes.append(
                f"left out: {self.left_out_numel:,} weights in {len(self.left_out)} tensors, such as {example}"
            )
        if self.not_fetched:
            names = ", ".join(self.not_fetched[:MAX_ROWS]) + (", …" if len(self.not_fetched) > MAX_ROWS else "")
            notes.append(f"not fetched: {names}")
        return notes


def measure_masks(
    files: BundleFiles, tasks: Sequence[str] | None = None, progress: Progress | None = None
) -> Statistics:
    """Count what masks have in common; see `Bundle.statistics`."""
    chosen, not_fetched = _choose(files, tasks)
    opened = files.tables_of(chosen)
    files.bring(opened, shared=False)
    counted, left_out = [], []
    for lineage in lineages(files.base, opened):
        if lineage.has_weights:
            reason = _why_not(lineage, chosen)
            if reason is None:
                counted.append(lineage)
            else:
                left_out.append(LeftOut(lineage.name, lineage.numel, reason))
    meter = Meter(progress, [sum(8 * words(lineage.numel) * len(_masks(lineage)) for lineage in counted)])
    overlap = np.zeros((len(opened), len(opened)), np.int64)
    tensors = tuple(_measure(files, opened, lineage, overlap, meter) for lineage in counted)
    meter.end_phase()
    return Statistics(
        path=files.root,
        where=files.where,
        tasks=chosen,
        not_fetched=not_fetched,
        tensors=tensors,
        left_out=tuple(left_out),
        overlap=tuple(map(tuple, overlap.tolist())),
    )


def _choose(files: BundleFiles, tasks: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks to count, and those that are left out since their files are not here."""
    if tasks is not None:
        if isinstance(tasks, str) or not tasks:
            raise OptionError(f"tasks is {tasks!r}; give a list of names, or None for all that are here")
        return tuple(dict.fromkeys(tasks)), ()
    names = [task.name for task in files.manifest.tasks]
    here = tuple(name for name in names if files.is_fetched(name))
    if not here:
        advice = "name the tasks" if files.brings else "copy some from where the bundle came from"
        raise NotFetchedError(f"{files.where}: no task's files are here; {advice}")
    return here, tuple(name for name in names if name not in here)


def _why_not(lineage: Lineage, tasks: Sequence[str]) -> str | None:
    """Why a tensor is not counted; None where it is."""
    for task, tensor in zip(tasks, lineage.made, strict=True):
        if isinstance(tensor, PrivateTensor):
            return f"stored whole by {task!r}"
        coded = None if tensor is None else coded_part(tensor)
        if coded is not None and not is_mask(coded.code):
            return f"the {coded.code.__struct_config__.tag} code of {task!r} leaves nothing out"
    has_some = any(tensor is not None for tensor in lineage.made)
    return None if has_some else "no task has it under the base's name"


def _masks(lineage: Lineage) -> dict[int, Coded]:
    """What has a mask, by the position of its task."""
    coded = {place: coded_part(tensor) for place, tensor in enumerate(lineage.made) if tensor is not None}
    return {place: found for place, found in coded.items() if found is not None}


def _weights(tensor: Whole | None, lineage: Lineage) -> int:
    """How many of the base's weights a task's tensor has."""
    if tensor is None:
        return 0
    return math.prod(leading_shape(tensor)) if isinstance(tensor, ExtendedTensor) else lineage.numel


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _shares(counts: Sequence[int]) -> tuple[float | None, ...]:
    whole = sum(counts)
    return tuple(_share(count, whole) for count in counts)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _measure(
    files: BundleFiles, tasks: Sequence[Task], lineage: Lineage, overlap: NDArray[np.int64], meter: Meter
) -> TensorStatistics:
    """Count the masks of one tensor, and add what each two have in common to *overlap*."""
    masks = _masks(lineage)
    places = list(masks)
    hold = len(masks) <= MAX_HELD
    readers = [open_claims(files, tasks[place], coded, hold=hold) for place, coded in masks.items()]
    common = np.zeros((len(masks), len(masks)), np.int64)
    claimed_by = np.zeros(len(tasks) + 1, np.int64)
    claims = np.zeros((len(masks), min(words(lineage.numel), CHUNK_WORDS)), np.uint64)
    for index in range(chunk_count(lineage.numel) if masks else 0):
        start, stop = chunk_span(lineage.numel, index)
        chunk = claims[:, : words(stop - start)]
        for read, row in zip(readers, chunk, strict=True):
            read(index, row)
        common += overlaps(chunk)
        claimed_by[: len(masks) + 1] += profile(tally(chunk), len(masks), stop - start)
        meter.advance(chunk.nbytes)
    if not masks:
        claimed_by[0] = lineage.numel
    overlap[np.ix_(places, places)] += common
    claimed = dict(zip(places, common.diagonal().tolist(), strict=True))
    return TensorStatistics(
        name=lineage.name,
        numel=lineage.numel,
        claimed=tuple(claimed.get(place, 0) for place in range(len(tasks))),
        weights=tuple(_weights(tensor, lineage) for tensor in lineage.made),
        claimed_by=tuple(claimed_by.tolist()),
    )
