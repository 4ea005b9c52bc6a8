"""One stack under one fit: merged, coded, scaled, and rebuilt as a reader rebuilds it. Writes nothing.

What `pack` writes and what `compare` predicts are both this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.fit import Coded, Fit, Projections, Shared, Tile, exceeds, present, select, side_values, solve
from tallstore.format.dtypes import itemsize
from tallstore.format.manifest import SharedDtype
from tallstore.format.r13 import in_range, r13
from tallstore.packing.fidelity import Sums, dot
from tallstore.packing.shared_vector import SharedVectors
from tallstore.packing.stack import Span, Stack, cast, result_dtype

#: Projections in one tile, and the fit's own scale there.
_Found = tuple[Projections, float | Tensor]

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Is told, by any thread, bytes of the experts' tensors that one pass over them is through with.
Advance = Callable[[int], None]


class Run(Protocol):
    """Maps a function over items, in their order, as `map` does or as an executor's."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]:
        """The results, in the order of *items*."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """How one part of a stack is coded.

    Attributes:
        fit: what codes it.
        gains: r13, float32: one for the tensor, or one a row of the part.
        unit: of its own values, if it is sparse.
        reason: why it must be stored whole instead; None where it need not be.
    """

    fit: Fit
    gains: NDArray[np.float32]
    unit: float = 1.0
    reason: str | None = None


class StackFit:
    """A fit at work on one stack. Threads may share it once it is fitted.

    Args:
        stack: the parts.
        fit: how they are merged and coded.
        dtype: of the shared vectors.
        directory: where scratch files may be made.
        factors: what the gains of each part are multiplied by; 1 where it is not given.
        advance: is told of two passes: of tiles that are fitted, and of those that are coded.
    """

    def __init__(
        self,
        stack: Stack,
        fit: Fit,
        dtype: SharedDtype,
        directory: Path,
        *,
        factors: Sequence[float] | None = None,
        advance: Advance = lambda _nbytes: None,
    ) -> None:
        self.stack, self.fit, self._advance = stack, fit, advance
        self._factors = [1.0] * len(stack.parts) if factors is None else factors
        self.shared = SharedVectors(stack, fit.roles, dtype, directory)

    def run(self, run: Run = map) -> list[Scaled]:
        """Merge and code every tile; how each part is scaled."""
        for vector in self.shared:
            if vector.needs_largest:
                tiles = ((span, self.stack.tile(span)) for span in self.stack.spans)
                vector.see((span, self.fit.merge(tile)[vector.role]) for span, tile in tiles if tile.tasks)
        fitted = list(run(self._fit_span, self.stack.spans))
        return [
            self._scaled(position, [found.get(position) for found in fitted])
            for position in range(len(self.stack.parts))
        ]

    def _fit_span(self, span: Span) -> dict[int, _Found]:
        """Merge one tile; each part's projections in it, and its fit's own scale."""
        tile = self.stack.tile(span)
        self.shared.store(span, self.fit.merge(tile) if tile.tasks else {})
        shared = self.shared.stored(span)
        found = {
            self.stack.position(task): self._project(self.fit, tile, place, shared)
            for place, task in enumerate(tile.tasks)
        }
        self._advance(sum(self._nbytes(position, span) for position in found))
        return found

    def _nbytes(self, position: int, span: Span) -> int:
        """Of one part in a tile that it covers, as the expert has it."""
        return (span.stop - span.start) * itemsize(self.stack.parts[position].spec.dtype)

    def _project(self, fit: Fit, tile: Tile, place: int, shared: Shared) -> _Found:
        """Projections of one part in a tile, under the scales of its rows but not under that of its tensor; scales.

        Its codes are kept where there is room.
        """
        coded, vector = fit.code(tile, place, shared), tile.task_vectors[place]
        kept = self.stack.codes[self.stack.position(tile.tasks[place])]
        if kept is not None:
            kept[tile.start : tile.start + coded.codes.numel()] = coded.codes
        sides, scale = side_values(fit.kind, coded, shared, fit.levels), coded.scale
        if isinstance(scale, Tensor):
            sides = (tile.by_row(sides) * scale[:, None]).view(-1)
        along = dot(sides, vector)
        energy = dot(sides, sides) if fit.gain == "least-squares" else along
        if "centre" not in fit.roles:
            return Projections(along, energy), scale
        where = present(fit.kind, coded, fit.levels)
        fixed = shared["centre"] if where is None else select(where.view(torch.uint8), shared["centre"])
        return Projections(along, energy, dot(fixed, vector), dot(fixed, sides)), scale

    def _scaled(self, position: int, found: Sequence[_Found | None]) -> Scaled:
        """How one part is scaled: by the fit, or by its fallback where that degenerates."""
        scaled = self._solve(self.fit, position, found)
        fallback = self.fit.fallback
        if scaled.reason is None or fallback is None:
            return scaled
        numel = self.stack.parts[position].numel
        spans = self.stack.spans
        again = [self._project_again(fallback, span, position) if span.stop <= numel else None for span in spans]
        second = self._solve(fallback, position, again)
        return scaled if second.reason is not None else second

    def _project_again(self, fit: Fit, span: Span, position: int) -> _Found:
        return self._project(fit, self.stack.tile(span, only=position), 0, self.shared.stored(span))

    def _solve(self, fit: Fit, position: int, found: Sequence[_Found | None]) -> Scaled:
        total = sum((projections for projections, _ in filter(None, found)), Projections())
        scales = self._own_scales(position, [None if item is None else item[1] for item in found])
        if isinstance(scales, float):
            total = total.times(scales)
        gain = solve(fit.gain, self.stack.statistics[position].sum_squares, total)
        if fit.kind == "sparse" and math.isnan(gain):
            gain = 1.0  # nothing is kept here, as the method has it: that is no reason to keep everything
        with np.errstate(over="ignore", invalid="ignore"):  # a scale may be beyond float32, and is refused below
            gains = r13(np.atleast_1d(scales) * (self._factors[position] * gain if math.isfinite(gain) else 0.0))
        unit = scales if fit.kind == "sparse" and isinstance(scales, float) else 1.0
        return Scaled(fit, gains, unit, self._why_not(fit, gain, gains))

    def _own_scales(self, position: int, scales: Sequence[float | Tensor | None]) -> float | NDArray[np.float64]:
        """The fit's own scale of a part: one number, or one a row."""
        numbers = [scale for scale in scales if scale is not None]
        if not numbers or not isinstance(numbers[0], Tensor):
            return next((scale for scale in numbers if isinstance(scale, float)), 0.0)
        rows = np.zeros(self.stack.rows_of(position), np.float64)
        for span, scale in zip(self.stack.spans, scales, strict=True):
            if isinstance(scale, Tensor):
                rows[span.row : span.row + span.rows] = scale.numpy()
        return rows

    def _why_not(self, fit: Fit, gain: float, gains: NDArray[np.float32]) -> str | None:
        """Why a part must be stored whole, if it must."""
        if not math.isfinite(gain):
            return "the fit has no part along its task vector"
        # Over a centre, a fit's own scale is no measure: how much is left, it does not know.
        smallest = 1 / fit.widest if "centre" not in fit.roles else math.ulp(0.0)
        if fit.kind != "sparse" and not smallest <= gain <= fit.widest:
            return f"the fit degenerated (its gain is {gain:.3g})"
        in_format = in_range(gains).all() and all(
            vector.scales_are_in_range(gains) for vector in self.shared if vector.role != "centre"
        )
        return None if in_format and gains.any() else "its scales are beyond what the format holds"

    @property
    def keeps_codes(self) -> bool:
        """Whether the codes of every part are at hand in `stack.codes`, and need not be computed again."""
        return self.fit.kind != "sparse" and all(codes is not None for codes in self.stack.codes)

    def code(self, scaled: Scaled, span: Span, position: int) -> Coded:
        """The codes of one part in one tile."""
        kept = self.stack.codes[position]
        if kept is not None and self.keeps_codes:
            return Coded(kept[span.start : span.stop], 1.0)
        return scaled.fit.code(self.stack.tile(span, only=position), 0, self.shared.stored(span))

    def measure(self, span: Span, coded: Mapping[int, tuple[Scaled, Coded]]) -> dict[int, Sums]:
        """Rebuild some parts in one tile, by position, as a reader would; how near they are to their task vectors.

        The base is read once for all, and the shared vectors are looked up once. A part that is not finite was beyond
        its dtype.
        """
        base = self.stack.base_at(span)
        wide = base if base.dtype is torch.float64 else base.float()
        values: Shared = {vector.role: vector.values(span) for vector in self.shared if vector.role != "centre"}
        centre = self.shared["centre"].stored(span) if "centre" in self.fit.roles else None
        found = {}
        for position, (scaled, codes) in coded.items():
            delta = self._delta(scaled, span, codes, values)
            total = wide
            if centre is not None:  # added where something else is
                total = total + select(exceeds(delta.abs(), 0.0), centre)
            total = delta.add_(total) if total.dtype is delta.dtype else total + delta
            rebuilt = cast(total, result_dtype(self.stack.parts[position]))
            rebuilt = rebuilt if rebuilt.dtype is torch.float64 else rebuilt.float()
            step = rebuilt.sub_(wide) if rebuilt.dtype is wide.dtype else rebuilt - wide
            vector = self.stack.task_vector(position, span, lambda: base)
            found[position] = Sums(dot(step, vector), dot(step, step))
            self._advance(self._nbytes(position, span))
        return found

    def _delta(self, scaled: Scaled, span: Span, coded: Coded, values: Shared) -> Tensor:
        """What a part adds to the base in one tile: float32, 1-D, in the arithmetic of the specification."""
        gains = scaled.gains if scaled.gains.size == 1 else scaled.gains[span.row : span.row + span.rows]
        fit = scaled.fit
        if fit.kind in ("mask", "signed", "two-level"):
            shared: Shared = {
                role: (rows * self.shared[role].scales(span, gains)[:, None]).view(-1) for role, rows in values.items()
            }
            return side_values(fit.kind, coded, shared, fit.levels)
        sides = side_values(fit.kind, coded, {}, fit.levels)
        return (sides.view(span.rows, -1) * torch.from_numpy(gains)[:, None]).view(-1)
