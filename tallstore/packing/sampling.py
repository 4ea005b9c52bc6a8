"""A checkpoint that shows a part of each large tensor of another: the same part every time, spread over its rows."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from tallstore.checkpoints import Checkpoint
from tallstore.checkpoints.checkpoint import Origin
from tallstore.format.dtypes import TensorSpec

_WHOLE_NUMEL = 1 << 19  # tensors up to this size are taken whole
_LEAST_NUMEL = 1 << 18
_SHARE = 16  # of larger ones, one part in this many, but no fewer elements than the least
_BLOCK_NUMEL = 1 << 12  # rows come in blocks of about this size: near enough to each other to be read together


@dataclass(frozen=True)
class Thinness:
    """How much of a tensor a sample has.

    Attributes:
        whole_numel: tensors up to this size are taken whole.
        least_numel, share: of larger ones, one part in *share*, but no fewer elements than the least.
        block_numel: rows come in blocks of about this size.
    """

    whole_numel: int
    least_numel: int
    share: int
    block_numel: int


#: Enough to see whether a method works at all, of all but the smallest tensors.
THIN = Thinness(whole_numel=1 << 13, least_numel=1 << 13, share=64, block_numel=1 << 9)


@dataclass(frozen=True)
class Sample:
    """Which part of a tensor is shown.

    Attributes:
        shape: of the part.
        pieces: ranges of the flat tensor, ascending.
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stride:
    """Of a tensor's units (rows, or elements of a vector), every *every*-th block of *block*.

    Attributes:
        unit: elements of a unit.
    """

    unit: int
    block: int
    every: int

    def sample(self, spec: TensorSpec) -> Sample:
        """Of a tensor whose rows are of that length: the same rows whatever their number."""
        units = spec.shape[0]
        starts = range(0, units, self.block * self.every)
        pieces = tuple((start * self.unit, min(start + self.block, units) * self.unit) for start in starts)
        count = sum(stop - start for start, stop in pieces) // self.unit
        return Sample((count, *spec.shape[1:]), pieces)


def stride_of(spec: TensorSpec, thinness: Thinness | None = None) -> Stride | None:
    """How a tensor is sampled; None where it is taken whole.

    Few long rows, as of stacked experts, are taken whole too: a part of a row would be another tensor.
    """
    thin = thinness or Thinness(_WHOLE_NUMEL, _LEAST_NUMEL, _SHARE, _BLOCK_NUMEL)
    if spec.numel <= thin.whole_numel or not spec.shape:
        return None
    unit = math.prod(spec.shape[1:])
    block = max(1, thin.block_numel // unit)
    every = spec.numel // max(thin.least_numel, spec.numel // thin.share)
    return Stride(unit, block, every) if spec.shape[0] >= 4 * block * every else None


class SampledCheckpoint(Checkpoint):
    """Samples of a checkpoint's tensors, under the same names; reads only them."""

    def __init__(
        self, whole: Checkpoint, strides: Mapping[str, Stride | None], names: Collection[str] | None = None
    ) -> None:
        """Show *whole* in samples.

        Args:
            whole: the checkpoint.
            strides: by tensor name, None or absent for whole tensors.
            names: of the tensors to show, without ties; all of them by default.
        """
        samples = {name: stride.sample(whole.spec(name)) for name, stride in strides.items() if stride is not None}
        specs = {
            name: TensorSpec(whole.spec(name).dtype, samples[name].shape) if name in samples else whole.spec(name)
            for name in (whole.names if names is None else names)
        }
        super().__init__(Origin(whole.where), specs, whole.aliases if names is None else {})
        self._whole, self._samples = whole, samples
        self._ends = {
            name: list(accumulate(stop - start for start, stop in sample.pieces)) for name, sample in samples.items()
        }

    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        sample = self._samples.get(name)
        if sample is None:
            return self._whole.read_bytes(name, start, stop)
        ends, found = self._ends[name], [np.empty(0, np.uint8)]
        number = bisect_right(ends, start)
        while start < stop:
            first, last = sample.pieces[number]
            before = ends[number] - (last - first)
            until = min(stop, ends[number])
            found.append(self._whole.read_bytes(name, first + start - before, first + until - before))
            start, number = until, number + 1
        return np.concatenate(found)

    def _release(self) -> None:
        """The whole checkpoint stays open: it is somebody else's."""
