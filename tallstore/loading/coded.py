"""The payloads of a coded tensor, opened: gives the sides and the centre of any range of its elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import SIGN_VALUES, UNIFORM_VALUES
from tallstore.format.manifest import Mask, Role, SharedDtype, Sign, Signed, Sparse, TwoLevel
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded, sides_of, sparse_values_of, vector_values_of
from tallstore.format.shard_reader import PayloadReader
from tallstore.loading.decode import rebuild
from tallstore.loading.pinned_base import PinnedBase
from tallstore.loading.sides import (
    LevelSides,
    MaskSides,
    RowScales,
    SharedChunk,
    Sides,
    SignedSides,
    SparseSides,
    TwoLevelSides,
    set_positions,
    values_as_float32,
)

#: The sides of elements [start, stop) of the flat tensor, which lie in one chunk.
_ReadSides: TypeAlias = Callable[[int, int], Sides]

_UNSCALED: Final = RowScales(np.ones(1, np.float32), 1)


@dataclass(frozen=True, slots=True)
class CodedElements:
    """The base's elements, moved by what the task chose."""

    base: PinnedBase
    base_name: str
    sides: _ReadSides
    centre: _SharedVector | None

    def read(self, start: int, stop: int, destination: Tensor) -> None:
        """Write elements [start, stop), which lie in one chunk, to *destination* in the tensor's own dtype."""
        sides = self.sides(start, stop)
        centre = None if self.centre is None else self.centre.chunk(start)
        rebuild(destination, self.base.read(self.base_name, start, stop), sides, centre, start)


@dataclass(frozen=True, slots=True)
class _SharedVector:
    """A shared vector, and what it is multiplied by."""

    values: PayloadReader
    dtype: SharedDtype
    scales: RowScales

    def chunk(self, start: int) -> SharedChunk:
        """The chunk that element *start* lies in."""
        return SharedChunk(self.values.chunk(start // CHUNK_NUMEL), self.dtype, self.scales)


@dataclass(frozen=True, slots=True)
class _SparseBits:
    """The bits of a sparse tensor, and the values that belong to them; None where no bit is set."""

    bits: PayloadReader
    values: PayloadReader | None
    dtype: SharedDtype
    scales: RowScales

    def sides(self, start: int, stop: int) -> Sides:
        """As `_ReadSides`: reads the chunks of the values that the range needs."""
        index = start // CHUNK_NUMEL
        begin = index * CHUNK_NUMEL
        before, positions = set_positions(self.bits.chunk(index), start - begin, stop - begin)
        first = self.bits.rank(index) + before
        return SparseSides(positions, self._values(first, first + positions.size), self.scales)

    def _values(self, first: int, last: int) -> NDArray[np.float32]:
        pieces = [np.empty(0, np.float32)]
        if self.values is not None and first < last:
            for index in range(first // CHUNK_NUMEL, (last - 1) // CHUNK_NUMEL + 1):
                begin = index * CHUNK_NUMEL
                chunk = values_as_float32(self.values.chunk(index), self.dtype)
                pieces.append(chunk[max(0, first - begin) : last - begin])
        return np.concatenate(pieces)


def open_coded(files: BundleFiles, task: Task, base: PinnedBase, coded: Coded) -> CodedElements:
    """The elements of a coded tensor of *task*, or of the leading rows of an extended one.

    Raises:
        TallstoreError: a payload is not there, or breaks a rule.
    """
    sides = open_sides(files, task, coded)
    centre = None
    if (coded.base_name, "centre") in task.group.vectors:
        steps = files.steps(task, coded, "centre")
        centre = _open_vector(files, task, coded, "centre", _UNSCALED if steps is None else RowScales(*steps))
    return CodedElements(base, coded.base_name, sides, centre)


def open_sides(files: BundleFiles, task: Task, coded: Coded) -> _ReadSides:
    """What a task adds to the base, without the centre: the sides of any range within a chunk."""
    code, stored = coded.code, sides_of(coded)
    sides = files.payload(task, stored)
    vectors = [
        _open_vector(files, task, coded, role, RowScales(*files.scales(task, coded, role))) for role in coded.roles
    ]
    if isinstance(code, Mask | Signed):
        kind, [merged] = MaskSides if isinstance(code, Mask) else SignedSides, vectors
        return lambda start, _: kind(sides.chunk(start // CHUNK_NUMEL), merged.chunk(start))
    if isinstance(code, TwoLevel):
        return lambda start, _: TwoLevelSides(
            sides.chunk(start // CHUNK_NUMEL), *(vector.chunk(start) for vector in vectors)
        )
    scales = RowScales(*files.scales(task, coded))
    if isinstance(code, Sparse):
        values = sparse_values_of(coded)
        own = None if values is None else files.payload(task, values)
        return _SparseBits(sides, own, code.values_dtype, scales).sides
    levels = SIGN_VALUES if isinstance(code, Sign) else UNIFORM_VALUES[code.levels]
    return lambda start, _: LevelSides(sides.chunk(start // CHUNK_NUMEL), stored.encoding.width, levels, scales)


def _open_vector(files: BundleFiles, task: Task, coded: Coded, role: Role, scales: RowScales) -> _SharedVector:
    vector = task.group.vector(coded.base_name, role)
    values = vector_values_of(vector, task.base[coded.base_name].shape)
    return _SharedVector(files.payload(task.group, values), vector.dtype, scales)
