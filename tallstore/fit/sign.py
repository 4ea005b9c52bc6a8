"""Signs alone: BitDelta's form (arXiv 2402.10193), a bit a parameter and a scale a tensor or a row.

    bit_t    = 0 where tau_t < 0, else 1
    expert_t = base + gain_t * mean |tau_t| * (2 * bit_t - 1)

mean |tau_t| is the scale of least squared error, and the published one: before distillation, that is BitDelta. With a
centre, the mean of the task vectors is shared, and the signs are those of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from tallstore.errors import OptionError
from tallstore.fit.base import Fit
from tallstore.fit.gain import Gain, check_choice, check_gain
from tallstore.fit.tile import Coded, ScaleBy, Shared, Tile, centre
from tallstore.format.manifest import Role, Scalar, SharedDtype


@dataclass(frozen=True)
class Sign:
    """The sign of every weight's move; what moved nowhere counts as moved up.

    Args:
        scale: a scale a "row", which leaves rows that did not move at the base, or a "tensor", as published.
        gain: "one", "least-squares" or "published".
        centre: share the mean of the task vectors.
    """

    scale: ScaleBy = "row"
    gain: Gain = "one"
    centre: bool = False

    name: ClassVar = "sign"
    merged_dtype: ClassVar[SharedDtype] = "I8"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset({"I8", "F16", "BF16", "F32"})
    minimum_experts: ClassVar = 1

    def __post_init__(self) -> None:
        """Refuse what is outside the documented ranges."""
        check_choice("Sign", "scale", self.scale, get_args(ScaleBy))
        check_gain("Sign", self.gain)
        if self.centre and self.gain == "published":
            raise OptionError("Sign: the published form has no centre; give gain='one' or 'least-squares' with it")

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        return {"scale": self.scale, "gain": self.gain, "centre": self.centre}


@dataclass(frozen=True)
class SignFit(Fit):
    """A Sign at work."""

    method: Sign

    kind = "sign"

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the shared vectors."""
        return ("centre",) if self.method.centre else ()

    def merge(self, tile: Tile) -> Shared:
        """The centre, if there is one."""
        return {"centre": centre(tile)} if self.method.centre else {}

    def code(self, tile: Tile, position: int, shared: Shared) -> Coded:
        """Bits of the task at *position*."""
        vector, statistics = tile.task_vectors[position], tile.statistics[position]
        if self.method.centre:
            vector = vector - shared["centre"]
        if self.method.scale == "tensor":
            return Coded((vector >= 0).to(torch.uint8), statistics.mean_magnitude)
        return Coded((vector >= 0).to(torch.uint8), tile.of_rows(statistics.row_mean_magnitude))
