"""One task's tensors as pieces for a device: which packed bytes each chunk is made of, and how they are scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.format.bits import Bytes
from tallstore.format.bundle_files import BundleFiles, Task
from tallstore.format.dtypes import CHUNK_NUMEL, Dtype, chunk_count, chunk_spans, itemsize
from tallstore.format.manifest import (
    BasedTensor,
    ExtendedTensor,
    Mask,
    PrivateTensor,
    Role,
    SharedDtype,
    Sign,
    Signed,
    Sparse,
    TwoLevel,
    Uniform,
    Whole,
)
from tallstore.format.payloads import (
    Coded,
    Stored,
    coded_part,
    further_of,
    leading_shape,
    sides_of,
    sparse_values_of,
    values_of,
    vector_values_of,
)
from tallstore.format.shard_reader import PayloadReader
from tallstore.loading.packed import BITS, Form, Kind, Piece, Region, Rows, Scaled, Source
from tallstore.loading.pinned_base import PinnedBase

#: What is summed in float32 and cast between each other; sums in float64, and casts from it, are the CPU's.
_NARROW: Final = frozenset({"F16", "BF16", "F32"})


def is_for_device(task: Task, tensor: Whole, wanted: Dtype) -> bool:
    """Whether a tensor of *task* can be rebuilt on a device, *wanted* there; it is copied only, or of narrow floats."""
    dtypes: set[str] = {tensor.dtype, wanted}
    if isinstance(tensor, BasedTensor):
        dtypes.add(task.base[tensor.base_name].dtype)
    return dtypes <= _NARROW or (len(dtypes) == 1 and coded_part(tensor) is None)


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens the payloads of one task."""

    task: Task
    files: BundleFiles
    base: PinnedBase

    def pieces(self, tensor: Whole, wanted: Dtype, destination: Tensor) -> Iterator[Piece]:
        """A whole tensor, chunk by chunk. Opens payloads, reads none of their chunks.

        Args:
            tensor: one that `is_for_device`.
            wanted: dtype of *destination*.
            destination: [n], contiguous.

        Raises:
            TallstoreError: a payload is not there, or breaks a rule.
        """
        bits = destination.view(BITS[itemsize(wanted)][1])
        numel = math.prod(tensor.shape)
        if isinstance(tensor, PrivateTensor) and numel:
            yield from self._stored(values_of(tensor), tensor.dtype, wanted, bits)
        if not isinstance(tensor, BasedTensor):
            return
        border = math.prod(leading_shape(tensor)) if isinstance(tensor, ExtendedTensor) else numel
        coded = coded_part(tensor)
        if coded is None:
            yield from self._same(tensor, wanted, bits[:border])
        else:
            yield from self._coded(coded, tensor.dtype, wanted, bits[:border])
        if isinstance(tensor, ExtendedTensor) and border < numel:
            yield from self._stored(further_of(tensor), tensor.dtype, wanted, bits[border:])

    def _stored(self, stored: Stored | None, own: Dtype, wanted: Dtype, bits: Tensor) -> Iterator[Piece]:
        if stored is None:
            raise AssertionError("elements without a payload")  # the tables were checked (TAB-6)
        payload = self.files.payload(self.task, stored)
        form = _copied(own, own, wanted)
        for index, (start, stop) in enumerate(chunk_spans(stored.numel)):
            yield Piece(form, bits[start:stop], {"base": partial(payload.chunk, index)}, {})

    def _same(self, tensor: BasedTensor, wanted: Dtype, bits: Tensor) -> Iterator[Piece]:
        form = _copied(self.task.base[tensor.base_name].dtype, tensor.dtype, wanted)
        for start, stop in chunk_spans(bits.numel()):
            yield Piece(form, bits[start:stop], {"base": self._base_bytes(tensor.base_name, start, stop)}, {})

    def _coded(self, coded: Coded, own: Dtype, wanted: Dtype, bits: Tensor) -> Iterator[Piece]:
        if not coded.numel:
            return
        code = coded.code
        codes = self.files.payload(self.task, sides_of(coded))
        vectors = self._vectors(coded)
        scales = self._scales(coded)
        dtypes: dict[Scaled, SharedDtype] = {name: vector.dtype for name, vector in vectors.items()}
        own_values = None
        if isinstance(code, Sparse):
            dtypes["values"] = code.values_dtype
            own_values = _OwnValues.open(self.files, self.task, coded, codes)
        form = Form(
            _kind(coded),
            self.task.base[coded.base_name].dtype,
            own,
            wanted,
            code.levels if isinstance(code, Uniform) else 0,
            dtypes.get("values"),
            dtypes.get("values_lo"),
            dtypes.get("centre"),
        )
        for index, (start, stop) in enumerate(chunk_spans(coded.numel)):
            sources: dict[Region, Source] = {
                "base": self._base_bytes(coded.base_name, start, stop),
                "codes": partial(codes.chunk, index),
            }
            for name, vector in vectors.items():
                sources[name] = partial(vector.payload.chunk, index)
            count = 0
            if own_values is not None:
                first, last = own_values.span(index)
                count, sources["values"] = last - first, partial(own_values.read, first, last)
            rows = {name: Rows.of(*found, start, stop - start) for name, found in scales.items()}
            yield Piece(form, bits[start:stop], sources, rows, count)

    def _vectors(self, coded: Coded) -> dict[Scaled, _Vector]:
        """The shared vectors of what is coded, opened."""
        names = _shared_roles(coded)
        if (coded.base_name, "centre") in self.task.group.vectors:
            names["centre"] = "centre"
        vectors: dict[Scaled, _Vector] = {}
        for name, role in names.items():
            vector = self.task.group.vector(coded.base_name, role)
            stored = vector_values_of(vector, self.task.base[coded.base_name].shape)
            vectors[name] = _Vector(self.files.payload(self.task.group, stored), vector.dtype)
        return vectors

    def _scales(self, coded: Coded) -> dict[Scaled, tuple[NDArray[np.float32], int]]:
        """The scales of what is coded, of all rows, and the elements of a row."""
        scales: dict[Scaled, tuple[NDArray[np.float32], int]] = {
            name: self.files.scales(self.task, coded, role) for name, role in _shared_roles(coded).items()
        }
        if not coded.roles:
            scales["values"] = self.files.scales(self.task, coded)
        if (coded.base_name, "centre") in self.task.group.vectors:
            steps = self.files.steps(self.task, coded, "centre")
            scales["centre"] = (np.ones(1, np.float32), coded.numel) if steps is None else steps
        return scales

    def _base_bytes(self, name: str, start: int, stop: int) -> Source:
        return lambda: self.base.read(name, start, stop).view(torch.uint8).numpy()


@dataclass(frozen=True, slots=True)
class _Vector:
    payload: PayloadReader
    dtype: SharedDtype


@dataclass(frozen=True, slots=True)
class _OwnValues:
    """The values of a sparse tensor, and how many each chunk of its bits has."""

    bits: PayloadReader
    payload: PayloadReader | None
    count: int

    @classmethod
    def open(cls, files: BundleFiles, task: Task, coded: Coded, bits: PayloadReader) -> _OwnValues:
        stored = sparse_values_of(coded)
        if stored is None:
            return cls(bits, None, 0)
        return cls(bits, files.payload(task, stored), stored.numel)

    def span(self, index: int) -> tuple[int, int]:
        """The values of a chunk of bits: the first one, and the one behind the last."""
        is_last = index + 1 == chunk_count(self.bits.numel)
        return self.bits.rank(index), self.count if is_last else self.bits.rank(index + 1)

    def read(self, first: int, last: int) -> Bytes:
        """The bytes of values [first, last)."""
        if self.payload is None or first == last:
            return np.empty(0, np.uint8)
        width = self.payload.encoding.itemsize
        pieces = []
        for index in range(first // CHUNK_NUMEL, (last - 1) // CHUNK_NUMEL + 1):
            begin = index * CHUNK_NUMEL
            chunk = self.payload.chunk(index)
            pieces.append(chunk[max(0, first - begin) * width : (last - begin) * width])
        return np.concatenate(pieces)


def _shared_roles(coded: Coded) -> dict[Scaled, Role]:
    """The roles of the vectors that a gain scales."""
    return dict(zip(("values", "values_lo"), coded.roles, strict=False))


def _kind(coded: Coded) -> Kind:
    code = coded.code
    if isinstance(code, Mask):
        return "mask"
    if isinstance(code, Signed):
        return "signed"
    if isinstance(code, TwoLevel):
        return "two-level"
    if isinstance(code, Sign):
        return "sign"
    return "sparse" if isinstance(code, Sparse) else "uniform"


def _copied(source: Dtype, own: Dtype, wanted: Dtype) -> Form:
    """The form of elements to which nothing is added: bits, where they keep their dtype."""
    if source == own == wanted:
        source = own = wanted = BITS[itemsize(wanted)][0]
    return Form("same", source, own, wanted)
