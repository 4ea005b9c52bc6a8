"""TALL-masks (arXiv 2405.07813): one merged vector, and a bit a parameter a task that says where it serves the task.

    merged = sum over tasks of tau_t   (or their TIES merge, their mean, or what somebody else merged, minus the base)
    mask_t = |tau_t| > mask_lambda * |merged - tau_t|          equation 4, strict as in the authors' code
    expert_t = base + gain_t * mask_t * merged

Masks are computed from the merged vector as stored; where that is zero they are cleared. The authors use gain 1; scaled
so that its projection on tau_t is one, the same form keeps far more of the expert (`gain="one"`, the default).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit.base import Fit
from tallstore.fit.gain import Gain, check_gain
from tallstore.fit.sides import exceeds, nonzero
from tallstore.fit.ties import disjoint_sum, trim_threshold, trimmed
from tallstore.fit.tile import Coded, Shared, Tile
from tallstore.format.manifest import Scalar, SharedDtype

Merge = Literal["sum", "ties", "mean"]
#: A task's whole task vector, streamed; for what must be known of all of it.
Chunks = Callable[[], Iterable[Tensor]]
#: Maps a function over tasks: `map`, or an executor's.
Run = Callable[[Callable[[Chunks], float], Iterable[Chunks]], Iterable[float]]
PUBLISHED_GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class TallMask:
    """{0, 1} masks over a merged vector.

    Args:
        mask_lambda: larger values give thinner masks. A sequence (the paper's grid is 0.2, 0.3, 0.4, 0.5, 0.6) needs
            `pack(evaluate=…)`, which chooses the best for each task, the smaller on a tie.
        merge: how task vectors become the merged vector: "sum", "ties" (the largest 20 % a task, disjoint sum) or
            "mean"; or a merged model, as anything that `pack` takes as a base: its difference to the base is the merged
            vector, however it was made. Tensors that it does not have, in the base's shape, count as not merged.
        gain: "one" scales each tensor's reconstruction so that its projection on the task vector is one; "published"
            is 1; "least-squares" makes the squared error least.
        normalise: bring each task's tensors to unit root mean square before they are merged, so that none drowns the
            others; not with a merged model.
    """

    mask_lambda: float | Sequence[float] = 1.0
    merge: Merge | str | os.PathLike[str] | Mapping[str, Tensor] = "sum"
    gain: Gain = "one"
    normalise: bool = False

    name: ClassVar = "tall-mask"
    merged_dtype: ClassVar[SharedDtype] = "I8"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset({"I8", "F16", "BF16", "F32"})

    @classmethod
    def published(cls) -> TallMask:
        """The paper's own: TIES merge, mask_lambda 0.4, gain 1."""
        return cls(mask_lambda=0.4, merge="ties", gain="published")

    def __post_init__(self) -> None:
        """Refuse what is outside the documented ranges."""
        try:
            values = self.lambdas
        except (TypeError, ValueError):
            values = ()
        if not values or not all(math.isfinite(value) and value >= 0 for value in values):
            raise OptionError(f"TallMask: mask_lambda is {self.mask_lambda!r}; give a number from 0, such as 1.0")
        check_gain("TallMask", self.gain)
        merge: object = self.merge
        if not isinstance(merge, str | os.PathLike | Mapping):
            known = ", ".join(map(repr, get_args(Merge)))
            raise OptionError(f"TallMask: merge is {merge!r}; give one of {known}, or a merged checkpoint")
        if self.normalise and self.given is not None:
            raise OptionError("TallMask: normalise goes with merge='sum', 'ties' or 'mean', not with a merged model")

    @property
    def given(self) -> str | os.PathLike[str] | Mapping[str, Tensor] | None:
        """The merged model, where the merge is somebody else's."""
        return None if isinstance(self.merge, str) and self.merge in get_args(Merge) else self.merge

    @property
    def minimum_experts(self) -> int:
        """Two make a merge."""
        return 2 if self.given is None else 1

    @property
    def lambdas(self) -> tuple[float, ...]:
        """The candidates for mask_lambda, ascending; one where there is nothing to choose."""
        given = self.mask_lambda
        return tuple(sorted(map(float, given))) if isinstance(given, Iterable) else (float(given),)

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        recorded: Scalar | list[Scalar] = self.lambdas[0]
        if isinstance(self.mask_lambda, Iterable):
            recorded = list(self.lambdas)
        merge = str(self.merge) if self.given is None else "checkpoint"
        return {"mask_lambda": recorded, "merge": merge, "gain": self.gain, "normalise": self.normalise}


@dataclass(frozen=True)
class TallMaskFit(Fit):
    """A TallMask at work on one set of tasks.

    Attributes:
        lambdas: mask_lambda by task.
        thresholds: the smallest magnitude that TIES' trim keeps, by task; empty for other merges.
    """

    method: TallMask
    lambdas: Mapping[str, float]
    thresholds: Mapping[str, float] = field(default_factory=dict)

    kind = "mask"
    roles = ("merged",)

    @classmethod
    def prepare(
        cls, method: TallMask, chunks: Mapping[str, Chunks], lambdas: Mapping[str, float], run: Run = map
    ) -> TallMaskFit:
        """Do what needs all of a task's parameters: for TIES, two passes over every task vector.

        Args:
            method: the method.
            chunks: by task, a function that streams its whole task vector.
            lambdas: by task.
            run: maps a function over the tasks, as `map` does or as an executor's.
        """
        if method.merge != "ties":
            return cls(method, lambdas)
        return cls(method, lambdas, dict(zip(chunks, run(trim_threshold, chunks.values()), strict=True)))

    def with_lambdas(self, lambdas: Mapping[str, float]) -> TallMaskFit:
        """The same fit at other lambdas."""
        return replace(self, lambdas=lambdas)

    def chosen(self, task: str) -> Mapping[str, float]:
        """The mask_lambda that was chosen for a task, and the smallest magnitude that TIES' trim keeps of it."""
        own = {"mask_lambda": self.lambdas[task]} if len(self.method.lambdas) > 1 else {}
        return own | ({"trim_threshold": self.thresholds[task]} if self.thresholds else {})

    def merge(self, tile: Tile) -> Shared:
        """The merged vector of a tile."""
        if tile.given is not None:
            return {"merged": tile.given}
        vectors = list(tile.task_vectors)
        if self.method.merge == "ties":
            vectors = [trimmed(vector, self.thresholds[task]) for vector, task in zip(vectors, tile.tasks, strict=True)]
        if self.method.normalise:
            vectors = [vector * found.unit for vector, found in zip(vectors, tile.statistics, strict=True)]
        if self.method.merge == "ties":
            return {"merged": disjoint_sum(vectors)}
        total = torch.zeros_like(vectors[0])
        for vector in vectors:
            total += vector
        return {"merged": total / len(vectors) if self.method.merge == "mean" else total}

    def code(self, tile: Tile, position: int, shared: Shared) -> Coded:
        """Mask of the task at *position*, as 0 and 1."""
        merged, statistics = shared["merged"], tile.statistics[position]
        vector = tile.task_vectors[position]
        if self.method.normalise:
            vector = vector * statistics.unit
        limit, factor = (merged - vector).abs_(), self.lambdas[tile.tasks[position]]
        if factor != 1:
            limit.mul_(factor)
        # A mean that is scaled back is that of `shared_by` task vectors.
        scale = float(tile.shared_by) if self.method.merge == "mean" and self.gain != "published" else 1.0
        if self.method.normalise:
            scale *= statistics.rms
        return Coded(exceeds(vector.abs(), limit) & nonzero(merged), scale)
