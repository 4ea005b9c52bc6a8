"""What the vectors that tasks share are like: how large their values are, and how the codes of each dtype are used.

Read chunk by chunk, without torch; nothing of a task is read but its tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tallstore.format import bits
from tallstore.format.bits import Bytes
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import chunk_count, chunk_span
from tallstore.format.encodings import LOG4_VALUES, as_float32
from tallstore.format.manifest import Role, SharedDtype, Vector
from tallstore.format.owners import Group
from tallstore.format.payloads import Shape, row_count, vector_step_of, vector_values_of
from tallstore.meter import Meter, Progress

_LOG4: Final = np.array(LOG4_VALUES, np.float32)
_INT8: Final = np.arange(-127, 128)
_EXPONENTS: Final = np.arange(-60, 128)  # of shared floats that are not zero: the format has no smaller ones
#: What the codes of a dtype stand for, before the step; of floats, powers of two: each counts what is up to twice it.
LEVELS: Final[dict[SharedDtype, tuple[float, ...]]] = {
    "LOG4": LOG4_VALUES,
    "I8": tuple(map(float, _INT8)),
    **dict.fromkeys(("F16", "BF16", "F32"), tuple(2.0**exponent for exponent in _EXPONENTS.tolist())),
}


@dataclass(frozen=True)
class VectorStatistics:
    """A shared vector over one tensor of the base.

    Attributes:
        group: whose it is.
        tensor, role, dtype: as in the group's table.
        numel: its values.
        zeros: how many of them are 0.
        sum_of_squares, largest: of the values, in magnitude, as an expert of gain one takes them.
        counts: how many values have each level of `LEVELS`; of floats, zeros are of none.
    """

    group: str
    tensor: str
    role: Role
    dtype: SharedDtype
    numel: int
    zeros: int
    sum_of_squares: float
    largest: float
    counts: tuple[int, ...]

    @property
    def rms(self) -> float | None:
        """Root of the mean square; None where there are no values."""
        return math.sqrt(self.sum_of_squares / self.numel) if self.numel else None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return asdict(self) | {"rms": self.rms}


def vectors_nbytes(files: BundleFiles, groups: Sequence[str]) -> int:
    """Bytes that `measure_vectors` will go through: of the vectors of *groups*, decoded."""
    return sum(
        vector_values_of(vector, shape).encoding.nbytes(math.prod(shape)) for _, vector, shape in _all(files, groups)
    )


def measure_vectors(
    files: BundleFiles, groups: Sequence[str], progress: Progress | None = None
) -> tuple[VectorStatistics, ...]:
    """Go through the shared vectors of *groups*, in the order of their tables.

    Args:
        files: of the bundle.
        groups: ids; the files of all of them must be here.
        progress: is told bytes of vectors done, and in all.

    Cost:
        reads each vector once; memory of a few chunks.

    Raises:
        FormatError, IntegrityError: as `BundleFiles.group` and `PayloadReader.chunk`.
    """
    meter = Meter(progress, [vectors_nbytes(files, groups)])
    found = tuple(_measure(files, group, vector, shape, meter) for group, vector, shape in _all(files, groups))
    meter.end_phase()
    return found


def _all(files: BundleFiles, groups: Sequence[str]) -> Iterator[tuple[str, Vector, Shape]]:
    for group in groups:
        for vector in files.group(group).vectors.values():
            yield group, vector, files.base[vector.tensor].shape


def _measure(files: BundleFiles, group: str, vector: Vector, shape: Shape, meter: Meter) -> VectorStatistics:
    owner, numel = files.group(group), math.prod(shape)
    payload = files.payload(owner, vector_values_of(vector, shape))
    steps = _steps(files, owner, vector, shape)
    counts = np.zeros(len(LEVELS[vector.dtype]), np.int64)
    zeros, squares, largest = 0, 0.0, 0.0
    for index in range(chunk_count(numel)):
        start, stop = chunk_span(numel, index)
        chunk = payload.chunk(index)
        levels, values = _decode(chunk, vector.dtype, stop - start)
        counts += np.bincount(levels, minlength=counts.size)
        # A row has one step: what it holds is summed first, and scaled then.
        length = max(1, numel // steps.size)
        rows = np.arange(start // length, -(-stop // length))
        cuts = np.maximum(rows * length - start, 0)
        scales = np.float64(steps[rows])
        squares += float(np.add.reduceat(np.square(values, dtype=np.float64), cuts) @ np.square(scales))
        largest = max(largest, float((np.maximum.reduceat(np.abs(values), cuts) * scales).max()))
        nothing = np.add.reduceat(values == 0, cuts, dtype=np.int64)
        zeros += int(np.where(scales == 0, np.diff(cuts, append=values.size), nothing).sum())
        meter.advance(chunk.nbytes)
    return VectorStatistics(
        group=group,
        tensor=vector.tensor,
        role=vector.role,
        dtype=vector.dtype,
        numel=numel,
        zeros=zeros,
        sum_of_squares=squares,
        largest=largest,
        counts=tuple(counts.tolist()),
    )


def _steps(files: BundleFiles, owner: Group, vector: Vector, shape: Shape) -> NDArray[np.float32]:
    """A step a row; a single one where there are none."""
    stored = vector_step_of(vector, shape)
    if stored is None or not row_count(shape, vector.row_axes):
        return np.ones(1, np.float32)
    return files.payload(owner, stored).all().view("<f4")


def _decode(chunk: Bytes, dtype: SharedDtype, numel: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A chunk's levels, as positions in `LEVELS` (of floats, without zeros), and its values before the step."""
    if dtype == "LOG4":
        codes = bits.unpack(chunk, numel, 4).astype(np.int64)
        return codes, _LOG4[codes]
    if dtype == "I8":
        signed = chunk.view(np.int8)
        return signed.astype(np.int64) - int(_INT8[0]), signed.astype(np.float32)
    values = as_float32(chunk, dtype)
    _, exponents = np.frexp(values[values != 0])  # a fraction of at least one half times a power of two
    return exponents.astype(np.int64) - 1 - int(_EXPONENTS[0]), values
