"""Least squares: the shared vectors whose masks leave the smallest squared error, exactly.

With v_t = tau_t / rms(tau_t), for each parameter on its own:

    levels=1    merged = c = mean(S) for the set S of tasks of largest gain (sum of S)^2 / |S|; the other tasks take 0.
                The best S is a prefix of the values sorted from the largest or from the smallest.
    levels=2    merged, merged_lo = the means of the best split of the sorted values into an upper and a lower run

Each task then takes the level nearest to its own value, from the shared vectors as stored. Both are fixed points: the
sets that made a mean are those that choose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tallstore.fit.base import Fit
from tallstore.fit.gain import Gain, check_choice, check_gain
from tallstore.fit.sides import Kind, exceeds
from tallstore.fit.tile import Coded, ScaleBy, Shared, Tile
from tallstore.format.manifest import Role, Scalar, SharedDtype


@dataclass(frozen=True)
class LeastSquares:
    """Masks of least squared error over one or two shared vectors.

    Args:
        levels: 1 is base + mask * merged; 2 is base + (bit ? merged : merged_lo).
        scale: what is brought to unit root mean square before tasks are compared: "tensor" or "row".
        gain: "one", "least-squares" or "published", which is the normalisation undone, and no more.
    """

    levels: Literal[1, 2] = 1
    scale: ScaleBy = "row"
    gain: Gain = "one"

    name: ClassVar = "least-squares"
    merged_dtype: ClassVar[SharedDtype] = "I8"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset({"I8", "F16", "BF16", "F32"})
    minimum_experts: ClassVar = 2

    def __post_init__(self) -> None:
        """Refuse what is outside the documented ranges."""
        check_choice("LeastSquares", "levels", self.levels, (1, 2))
        check_choice("LeastSquares", "scale", self.scale, get_args(ScaleBy))
        check_gain("LeastSquares", self.gain)

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        return {"levels": self.levels, "scale": self.scale, "gain": self.gain}


@dataclass(frozen=True)
class LeastSquaresFit(Fit):
    """A LeastSquares at work."""

    method: LeastSquares

    @property
    def kind(self) -> Kind:
        """Of the codes."""
        return "mask" if self.method.levels == 1 else "two-level"

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the shared vectors."""
        return ("merged",) if self.method.levels == 1 else ("merged", "merged_lo")

    def merge(self, tile: Tile) -> Shared:
        """The shared vectors of a tile. Cost: a sort of the tasks' values at every parameter."""
        units = ascending([tile.at_unit(position, self.method.scale) for position in range(len(tile.tasks))])
        if self.method.levels == 1:
            return {"merged": best_level(units)}
        upper, lower = best_split(units)
        return {"merged": upper, "merged_lo": lower}

    def code(self, tile: Tile, position: int, shared: Shared) -> Coded:
        """Bits of the task at *position*: set where merged is nearer than the other side."""
        unit = tile.at_unit(position, self.method.scale)
        to_other = unit - shared["merged_lo"] if self.method.levels == 2 else unit
        nearer = exceeds(to_other.abs(), (unit - shared["merged"]).abs_())
        return Coded(nearer, tile.scale_of(position, self.method.scale))


def ascending(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape, sorted among each other at every place.

    By Batcher's odd-even merging network: whole tensors are compared, which beats sorting at each place by an order of
    magnitude.
    """
    found = list(values)
    count = len(found)
    width = 1
    while width < count:
        step = width
        while step:
            for first in range(step % width, count - step, 2 * step):
                for low in range(first, min(first + step, count - step)):
                    if low // (2 * width) == (low + step) // (2 * width):
                        lower, upper = found[low], found[low + step]
                        found[low], found[low + step] = torch.minimum(lower, upper), torch.maximum(lower, upper)
            step //= 2
        width *= 2
    return found


def best_level(units: Sequence[Tensor]) -> Tensor:
    """The level c of largest gain (sum of S)^2 / |S|, 1-D, for a tensor a task, sorted along the tasks."""
    best = torch.zeros_like(units[0])
    level = torch.zeros_like(best)
    for run in (list(reversed(units)), units):  # prefixes from the largest, then from the smallest
        total = torch.zeros_like(best)
        for count, values in enumerate(run, start=1):
            total += values
            mean = total / count
            gained = total * mean
            torch.lerp(level, mean, _greater(gained, best), out=level)
            torch.maximum(best, gained, out=best)
    return level


def best_split(units: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Means of the upper and the lower run of the best split, each 1-D, for a tensor a task, sorted along the tasks."""
    count = len(units)
    whole = torch.zeros_like(units[0])
    for values in units:
        whole += values
    best = torch.full_like(whole, -1.0)
    upper, lower = whole / count, whole / count
    total = torch.zeros_like(whole)
    for below in range(1, count):
        total += units[below - 1]
        rest = whole - total
        low, high = total / below, rest / (count - below)
        gained = (total * low).add_(rest * high)
        better = _greater(gained, best)
        torch.lerp(lower, low, better, out=lower)
        torch.lerp(upper, high, better, out=upper)
        torch.maximum(best, gained, out=best)
    return upper, lower


def _greater(first: Tensor, second: Tensor) -> Tensor:
    """1.0 where *first* is greater, else 0.0: the weights with which `lerp` takes one of two values as it is."""
    return torch.gt(first, second, out=torch.empty_like(first))
