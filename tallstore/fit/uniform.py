"""Uniform levels: the task vector itself, rounded to 3, 4, 8 or 16 levels with a step a row.

    3 levels     code = sign(tau) where |tau| > threshold * rms, else 0         levels -1, 0, 1
    L levels     code = the nearest of -(L-1)/2 … (L-1)/2 to tau / step         step = width * rms
    expert_t = base + gain_t * s * level,    s = <tau, level> / <level, level>  of the row, or of the tensor

Threshold and width are chosen row by row: those of the largest cosine between tau and its levels, out of a few around
the best ones for a normal distribution. Task-vector quantization (arXiv 2503.06921) stores levels too, between the
smallest and the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit.base import Fit
from tallstore.fit.gain import Gain, check_choice, check_gain, check_number
from tallstore.fit.sides import Levels, exceeds, select
from tallstore.fit.tile import Coded, ScaleBy, Shared, Tile, centre
from tallstore.format.manifest import Role, Scalar, SharedDtype

# The width (for 3 levels the threshold) of least squared error on a normal distribution, in standard deviations.
_NORMAL: dict[Levels, float] = {3: 0.6120, 4: 0.9957, 8: 0.5860, 16: 0.3352}
# What a kept weight of 3 levels is on a normal distribution at that threshold, in standard deviations.
_NORMAL_KEPT = 1.2240
_CANDIDATES = (0.85, 1.0, 1.15, 1.35, 1.6)
# Of a row that its centre meets, in root mean squares of the task vector: next to nothing.
_SMALLEST_SCALE = 2.0**-20


@dataclass(frozen=True)
class Uniform:
    """The task vector on a few evenly spaced levels.

    Args:
        levels: 3, 4, 8 or 16.
        scale: steps a "row" or a "tensor".
        gain: "one", "least-squares" or "published", which is least squares by row or tensor.
        threshold: of 3 levels, in root mean squares: larger values keep fewer weights; None takes the truest, row by
            row, or with steps a tensor the best one for a normal distribution.
        centre: share the mean of the task vectors, and code what is left; not with 3 levels.
    """

    levels: Literal[3, 4, 8, 16] = 4
    scale: ScaleBy = "row"
    gain: Gain = "one"
    threshold: float | None = None
    centre: bool = False

    name: ClassVar = "uniform"
    merged_dtype: ClassVar[SharedDtype] = "I8"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset({"I8", "F16", "BF16", "F32"})
    minimum_experts: ClassVar = 1

    def __post_init__(self) -> None:
        """Refuse what is outside the documented ranges."""
        check_choice("Uniform", "levels", self.levels, (3, 4, 8, 16))
        check_choice("Uniform", "scale", self.scale, get_args(ScaleBy))
        check_gain("Uniform", self.gain)
        if self.threshold is not None:
            check_number("Uniform", "threshold", self.threshold, 1.0)
            if self.levels != 3:
                raise OptionError("Uniform: threshold goes with levels=3")
        if self.centre and self.levels == 3:
            raise OptionError("Uniform: a centre is added where a level is not 0; give it with levels=4, 8 or 16")

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        return {
            "levels": self.levels,
            "scale": self.scale,
            "gain": self.gain,
            "threshold": None if self.threshold is None else float(self.threshold),
            "centre": self.centre,
        }


@dataclass(frozen=True)
class UniformFit(Fit):
    """A Uniform at work."""

    method: Uniform

    kind = "uniform"

    @property
    def levels(self) -> Levels:
        """Of the codes."""
        return self.method.levels

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the shared vectors."""
        return ("centre",) if self.method.centre else ()

    @property
    def gain(self) -> Gain:
        """Of the method.

        The published one is least squares: by row it makes no difference, since the scales of rows are that already.
        """
        return "least-squares" if self.method.gain == "published" else self.method.gain

    def merge(self, tile: Tile) -> Shared:
        """The centre, if there is one."""
        return {"centre": centre(tile)} if self.method.centre else {}

    def code(self, tile: Tile, position: int, shared: Shared) -> Coded:
        """Fields of the task at *position*. Cost: a pass over the tile for each candidate width."""
        vector, statistics = tile.task_vectors[position], tile.statistics[position]
        if self.method.centre:
            vector = vector - shared["centre"]
        by_row = tile.by_row(vector)
        row_rms = tile.of_rows(statistics.row_rms)[:, None]
        if self.method.scale == "tensor" or not tile.is_whole:
            # A piece does not know its whole: the same width everywhere, and the scale that goes with it.
            rms = row_rms if self.method.scale == "row" else torch.full_like(row_rms, statistics.rms)
            width = self._width
            levels = self._levels(by_row, width * rms)
            unit = _NORMAL_KEPT if self.method.levels == 3 else width
            codes = self._codes(levels).view(-1)
            return Coded(codes, unit * statistics.rms if self.method.scale == "tensor" else (unit * rms).view(-1))
        if self.method.centre:
            row_rms = by_row.square().mean(1, keepdim=True).sqrt()
        best = torch.full((tile.rows, 1), -1.0)
        chosen = torch.zeros_like(by_row)
        scale = torch.zeros((tile.rows, 1))
        factors = _CANDIDATES if self.method.threshold is None else (1.0,)
        for factor in factors:
            levels = self._levels(by_row, factor * self._width * row_rms)
            along, energy = (levels * by_row).sum(1, keepdim=True), levels.square().sum(1, keepdim=True)
            # The cosine, but for the norm of the row, which all candidates share.
            cosine = torch.where(energy > 0, along / energy.sqrt(), 0.0)
            better = cosine > best
            best = torch.where(better, cosine, best)
            chosen = torch.lerp(chosen, levels, better.float())  # one or the other, as it is
            scale = torch.where(better, torch.where(energy > 0, along / energy, 0.0), scale)
        if self.method.centre:  # a reader adds it where something is added to it: a row that it meets needs a scale
            scale = torch.maximum(scale, _SMALLEST_SCALE * tile.of_rows(statistics.row_rms)[:, None])
        return Coded(self._codes(chosen).view(-1), scale.view(-1))

    @property
    def _width(self) -> float:
        return _NORMAL[self.method.levels] if self.method.threshold is None else self.method.threshold

    def _levels(self, rows: Tensor, width: Tensor) -> Tensor:
        """The level of each element, as float32; *width* [rows, 1] is a step, or for 3 levels a threshold."""
        if self.method.levels == 3:
            return select(exceeds(rows.abs(), width), torch.sign(rows))
        half = self.method.levels / 2
        steps = rows / torch.where(width > 0, width, torch.inf)
        return steps.floor_().clamp_(-half, half - 1).add_(0.5)

    def _codes(self, levels: Tensor) -> Tensor:
        offset = 1.0 if self.method.levels == 3 else (self.method.levels - 1) / 2
        return (levels + offset).to(torch.uint8)
