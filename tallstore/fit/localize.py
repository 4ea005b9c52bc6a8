"""Localize-and-Stitch (arXiv 2408.13656): a thin mask a task, and the task vector's own values under it.

data-free    mask_t = the largest magnitudes of tau_t, a share *density* over ALL its parameters together
trained      mask_t = round(sigmoid(S_t)), with S_t trained on the user's loss (`tallstore.train_masks`)
expert_t     = base + gain_t * mask_t * tau_t                                          gain 1 as published

The gain is for the expert alone: stitching averages the task vectors' own values, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit.base import Fit
from tallstore.fit.gain import Gain, check_choice, check_gain, is_number
from tallstore.fit.tall_mask import Chunks, Run
from tallstore.fit.ties import trim_threshold
from tallstore.fit.tile import Coded, Shared, Tile
from tallstore.format.manifest import Scalar, SharedDtype
from tallstore.format.r13 import SMALLEST

ValuesDtype = Literal["float16", "bfloat16", "float32"]
_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class Localize:
    """The largest moves of each task, with their values.

    Args:
        density: the share of all parameters to keep, above 0 and at most 1.
        masks: which weights to keep instead, by task and tensor name: bool, of the tensor's shape; what
            `tallstore.train_masks` gives. Tensors that are not named keep nothing.
        gain: "one" scales a tensor's values until they go the whole way along its task vector; "published" keeps them
            as they are, and so does "least-squares". None takes "one" for the largest moves and "published" for given
            masks, which were trained on the values as they are.
        values_dtype: of the values: "float16", "bfloat16" or "float32". They are stored in units of the power of two
            that is nearest to the tensor's root mean square, so that small moves keep their digits.
    """

    density: float = 0.01
    masks: Mapping[str, Mapping[str, Tensor]] | None = None
    gain: Gain | None = None
    values_dtype: ValuesDtype = "float16"

    name: ClassVar = "localize"
    merged_dtype: ClassVar[SharedDtype] = "F32"  # it shares nothing
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset()
    minimum_experts: ClassVar = 1

    def __post_init__(self) -> None:
        """Refuse what is outside the documented ranges."""
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise OptionError(f"Localize: density is {self.density!r}; give a share above 0 and at most 1, as 0.01")
        if self.gain is not None:
            check_gain("Localize", self.gain)
        check_choice("Localize", "values_dtype", self.values_dtype, tuple(_TORCH))

    @property
    def scaling(self) -> Gain:
        """The gain that is given, or the one that serves the masks best."""
        return self.gain or ("one" if self.masks is None else "published")

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        kept: dict[str, Scalar | list[Scalar]] = {"density": float(self.density)} if self.masks is None else {}
        return kept | {"masks": "largest" if self.masks is None else "given", "gain": self.scaling}


@dataclass(frozen=True)
class LocalizeFit(Fit):
    """A Localize at work.

    Attributes:
        thresholds: the smallest magnitude that is kept, by task; empty where masks are given.
    """

    method: Localize
    thresholds: Mapping[str, float] = field(default_factory=dict)

    kind = "sparse"

    @classmethod
    def prepare(cls, method: Localize, chunks: Mapping[str, Chunks], run: Run = map) -> LocalizeFit:
        """Find each task's threshold: two passes over every task vector."""
        if method.masks is not None:
            return cls(method)

        def threshold(stream: Chunks) -> float:
            return trim_threshold(stream, method.density)

        return cls(method, dict(zip(chunks, run(threshold, chunks.values()), strict=True)))

    @property
    def gain(self) -> Gain:
        """Of the method."""
        return self.method.scaling

    @property
    def values_dtype(self) -> str:
        """Of the values, as the format names it."""
        return {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[self.method.values_dtype]

    def chosen(self, task: str) -> Mapping[str, float]:
        """The smallest magnitude that is kept of a task."""
        return {"threshold": self.thresholds[task]} if task in self.thresholds else {}

    def code(self, tile: Tile, position: int, _shared: Shared) -> Coded:
        """Bits and values of the task at *position*."""
        vector, statistics, task = tile.task_vectors[position], tile.statistics[position], tile.tasks[position]
        given = self.method.masks is not None
        kept = (self._given(task, tile) if given else vector.abs() >= self.thresholds[task]) & (vector != 0)
        unit = 2.0 ** round(math.log2(statistics.rms))  # exact, both ways
        values = (vector[kept] / unit).to(_TORCH[self.method.values_dtype]).float()
        values = torch.where(values.abs() < SMALLEST, 0.0, values)  # -0.0 too: a stored zero has one encoding
        return Coded(kept.to(torch.uint8), unit, values)

    def _given(self, task: str, tile: Tile) -> Tensor:
        masks = (self.method.masks or {}).get(task)
        if masks is None:
            raise OptionError(f"Localize: masks has none for task {task!r}; give one for each expert")
        mask = masks.get(tile.tensor)
        numel = tile.task_vectors[0].numel()
        if mask is None:
            return torch.zeros(numel, dtype=torch.bool, device="cpu")
        if mask.dtype is not torch.bool or mask.shape[1:] != tile.shape[1:] or mask.numel() < tile.start + numel:
            raise OptionError(
                f"Localize: the mask of task {task!r} for {tile.tensor!r} is {mask.dtype} {list(mask.shape)};"
                " give bool, of the tensor's shape"
            )
        return mask.reshape(-1)[tile.start : tile.start + numel]
