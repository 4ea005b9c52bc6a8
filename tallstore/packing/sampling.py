"""A checkpoint that shows a part of each large tensor of another: the same part every time, spread over its rows."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
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


def stride_of(spec: TensorSpec) -> Stride | None:
    """How a tensor is sampled; None where it is taken whole.

    Few long rows, as of stacked experts, are taken whole too: a part of a row would be another tensor.
    """
    if spec.numel <= _WHOLE_NUMEL or not spec.shape:
        return None
    unit = math.prod(spec.shape[1:])
    block = max(1, _BLOCK_NUMEL // unit)
    every = spec.numel // max(_LEAST_NUMEL, spec.numel // _SHARE)
    return Stride(unit, block, every) if spec.shape[0] >= 4 * block * every else None


class SampledCheckpoint(Checkpoint):
    """Samples of a checkpoint's tensors, under the same names; reads only them."""

    def __init__(self, whole: Checkpoint, strides: Mapping[str, Stride | None]) -> None:
        """Show *whole* in samples; *strides* by tensor name, None or absent for whole tensors."""
        samples = {name: stride.sample(whole.spec(name)) for name, stride in strides.items() if stride is not None}
        specs = {
            name: TensorSpec(whole.spec(name).dtype, samples[name].shape) if name in samples else whole.spec(name)
            for name in whole.names
        }
        super().__init__(Origin(whole.where), specs, whole.aliases)
        self._whole, self._samples = whole, samples
        self._ends = {
            name: list(accumulate(stop - start for start, stop in sample.pieces)) for name, sample in samples.items()
        }

    def _flat_bytes(self, name: str, start: int, stop: int, *, mapped: bool) -> NDArray[np.uint8]:
        sample = self._samples.get(name)
        if sample is None:
            return self._whole.read_bytes(name, start, stop, mapped=mapped)
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
