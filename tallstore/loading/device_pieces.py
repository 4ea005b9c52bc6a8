"""One task's tensors as pieces for a device: which packed bytes each chunk is made of, and how they are scaled."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import Dtype, chunk_spans, itemsize
from tallstore.format.manifest import (
    BasedTensor,
    BaseTensor,
    ExtendedTensor,
    PrivateTensor,
    Role,
    SharedDtype,
    Sparse,
    Whole,
)
from tallstore.format.owners import Task
from tallstore.format.payloads import (
    Coded,
    Stored,
    coded_part,
    further_of,
    leading_shape,
    sides_of,
    values_of,
    vector_values_of,
)
from tallstore.format.shard_reader import PayloadReader
from tallstore.loading.forms import form_of, shared_roles
from tallstore.loading.own_values import OwnValues
from tallstore.loading.packed import BITS, NARROW, Form, Piece, Region, Rows, Scaled, Source
from tallstore.loading.pinned_base import PinnedBase


class BaseKey(NamedTuple):
    """Elements [start, stop) of a tensor of the base, whatever is added to them."""

    tensor: str
    start: int
    stop: int


class VectorKey(NamedTuple):
    """Elements [start, stop) of a vector that a group's tasks share.

    Attributes:
        group: its directory.
        tensor: of the base, which it is for.
    """

    group: str
    tensor: str
    role: Role
    start: int
    stop: int


def is_for_device(task: Task, tensor: Whole, wanted: Dtype) -> bool:
    """Whether a tensor of *task* can be rebuilt on a device, *wanted* there; it is copied only, or of narrow floats."""
    dtypes = {tensor.dtype, wanted}
    if isinstance(tensor, BasedTensor):
        dtypes.add(task.base[tensor.base_name].dtype)
    return dtypes <= NARROW if coded_part(tensor) is not None else is_copied_there(dtypes)


def is_copied_there(dtypes: AbstractSet[Dtype]) -> bool:
    """Whether elements can be copied to a device that are stored, rounded and wanted in these dtypes."""
    return dtypes <= NARROW or len(dtypes) == 1


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
            origin = self.task.base[tensor.base_name]
            yield from base_pieces(self.base, origin, tensor.dtype, wanted, destination[:border])
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

    def _coded(self, coded: Coded, own: Dtype, wanted: Dtype, bits: Tensor) -> Iterator[Piece]:
        if not coded.numel:
            return
        code = coded.code
        codes = self.files.payload(self.task, sides_of(coded))
        vectors = self._vectors(coded)
        scales = self._scales(coded)
        own_values = OwnValues.open(self.files, self.task, coded, codes) if isinstance(code, Sparse) else None
        form = form_of(self.task, coded, own, wanted)
        for index, (start, stop) in enumerate(chunk_spans(coded.numel)):
            sources: dict[Region, Source] = {
                "base": _base_bytes(self.base, coded.base_name, start, stop),
                "codes": partial(codes.chunk, index),
            }
            keys: dict[Region, Hashable] = {"base": BaseKey(coded.base_name, start, stop)}
            for name, vector in vectors.items():
                sources[name] = partial(vector.payload.chunk, index)
                keys[name] = VectorKey(self.task.group.directory, coded.base_name, vector.role, start, stop)
            count = 0
            if own_values is not None:
                first, last = own_values.span(index)
                count, sources["values"] = last - first, partial(own_values.read, first, last)
            rows = {name: Rows.of(*found, start, stop - start) for name, found in scales.items()}
            yield Piece(form, bits[start:stop], sources, rows, count, keys)

    def _vectors(self, coded: Coded) -> dict[Scaled, _Vector]:
        """The shared vectors of what is coded, opened."""
        names = shared_roles(coded)
        if (coded.base_name, "centre") in self.task.group.vectors:
            names["centre"] = "centre"
        vectors: dict[Scaled, _Vector] = {}
        for name, role in names.items():
            vector = self.task.group.vector(coded.base_name, role)
            stored = vector_values_of(vector, self.task.base[coded.base_name].shape)
            vectors[name] = _Vector(role, self.files.payload(self.task.group, stored), vector.dtype)
        return vectors

    def _scales(self, coded: Coded) -> dict[Scaled, tuple[NDArray[np.float32], int]]:
        """The scales of what is coded, of all rows, and the elements of a row."""
        scales: dict[Scaled, tuple[NDArray[np.float32], int]] = {
            name: self.files.scales(self.task, coded, role) for name, role in shared_roles(coded).items()
        }
        if not coded.roles:
            scales["values"] = self.files.scales(self.task, coded)
        if (coded.base_name, "centre") in self.task.group.vectors:
            steps = self.files.steps(self.task, coded, "centre")
            scales["centre"] = (np.ones(1, np.float32), coded.numel) if steps is None else steps
        return scales


@dataclass(frozen=True, slots=True)
class _Vector:
    role: Role
    payload: PayloadReader
    dtype: SharedDtype


def base_pieces(
    base: PinnedBase, tensor: BaseTensor, own: Dtype, wanted: Dtype, destination: Tensor
) -> Iterator[Piece]:
    """The first elements of a tensor of the base, in the dtype *own*, then cast, chunk by chunk; reads none of them.

    Args:
        base: that is read.
        tensor: of its table.
        own: which its elements are rounded to.
        wanted: dtype of *destination*.
        destination: [n], contiguous.
    """
    form, bits = _copied(tensor.dtype, own, wanted), destination.view(BITS[itemsize(wanted)][1])
    for start, stop in chunk_spans(bits.numel()):
        source: dict[Region, Source] = {"base": _base_bytes(base, tensor.name, start, stop)}
        yield Piece(form, bits[start:stop], source, {}, keys={"base": BaseKey(tensor.name, start, stop)})


def _base_bytes(base: PinnedBase, name: str, start: int, stop: int) -> Source:
    return lambda: base.read(name, start, stop).view(torch.uint8).numpy()


def _copied(source: Dtype, own: Dtype, wanted: Dtype) -> Form:
    """The form of elements to which nothing is added: bits, where they keep their dtype."""
    if source == own == wanted:
        source = own = wanted = BITS[itemsize(wanted)][0]
    return Form("same", source, own, wanted)
