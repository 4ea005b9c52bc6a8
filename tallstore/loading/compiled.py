"""A coded tensor whose elements a compiled function decodes: packed bytes go in, weights come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.format.bits import Bytes
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.manifest import Sparse
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded, sides_of, vector_values_of
from tallstore.format.shard_reader import PayloadReader
from tallstore.loading.forms import shared_roles
from tallstore.loading.own_values import OwnValues
from tallstore.loading.packed import SCALED, Scaled
from tallstore.loading.pinned_base import PinnedBase
from tallstore.loading.resident import ResidentBase, ResidentFiles

if TYPE_CHECKING:
    from tallstore.loading.decode_llvm import Kernel


class _Prepared(NamedTuple):
    """What a kernel takes for a range behind its destination, and the memory that the addresses are of."""

    arguments: tuple[int, ...]
    memory: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class CompiledElements:
    """The base's elements, moved by what the task chose.

    Attributes:
        own: values of a sparse tensor.
        prepared: by range, where all of it stays in memory.
    """

    kernel: Kernel
    base: PinnedBase
    base_name: str
    codes: PayloadReader
    vectors: Mapping[Scaled, PayloadReader]
    rows: Mapping[Scaled, _Rows]
    own: OwnValues | None
    prepared: dict[tuple[int, int], _Prepared] | None

    def read(self, start: int, stop: int, destination: Tensor) -> None:
        """Write elements [start, stop), which lie in one chunk, to *destination* in the dtype of the kernel's form."""
        if not destination.is_contiguous():
            whole = torch.empty(stop - start, dtype=destination.dtype, device="cpu")
            self.read(start, stop, whole)
            destination.copy_(whole)
            return
        prepared = None if self.prepared is None else self.prepared.get((start, stop))
        if prepared is None:
            prepared = self._prepare(start, stop)
        self.kernel(destination.data_ptr(), *prepared.arguments)

    def _prepare(self, start: int, stop: int) -> _Prepared:
        base = self.base.read(self.base_name, start, stop)
        index, offset = divmod(start, CHUNK_NUMEL)
        codes = self.codes.chunk(index)
        held: dict[Scaled, Bytes] = {name: vector.chunk(index) for name, vector in self.vectors.items()}
        if self.own is not None:
            held["values"] = self.own.read(*self.own.within(index, codes, offset, offset + stop - start))
        arguments = [base.data_ptr(), _address(codes)]
        arguments += [_address(held[name]) if name in held else 0 for name in SCALED]
        arguments += [offset, stop - start]
        for name in SCALED:
            arguments += self.rows[name].at(start) if name in self.rows else (0, 0, 0)
        prepared = _Prepared(tuple(arguments), (base, codes, *held.values()))
        if self.prepared is not None and isinstance(self.base, ResidentBase) and self.base.holds(self.base_name, start):
            self.prepared[start, stop] = prepared
        return prepared


@dataclass(frozen=True, slots=True)
class _Rows:
    """The scales of a tensor's rows: float32, one for the whole tensor or one a row; and where they are."""

    scales: NDArray[np.float32]
    address: int
    row_length: int

    @classmethod
    def of(cls, scales: NDArray[np.float32], row_length: int, numel: int) -> _Rows:
        scales = np.ascontiguousarray(scales)
        return cls(scales, _address(scales), numel if scales.size == 1 else row_length)

    def at(self, start: int) -> tuple[int, int, int]:
        """As the kernel takes them for elements from *start* on."""
        row, inside = divmod(start, self.row_length)
        return self.address + 4 * row, self.row_length - inside, self.row_length


def open_compiled(kernel: Kernel, files: BundleFiles, task: Task, base: PinnedBase, coded: Coded) -> CompiledElements:
    """The elements of a coded tensor of *task*, or of the leading rows of an extended one; *kernel* is of its form.

    Raises:
        TallstoreError: a payload is not there, or breaks a rule.
    """
    codes = files.payload(task, sides_of(coded))
    roles = shared_roles(coded)
    scales = {name: files.scales(task, coded, role) for name, role in roles.items()}
    if not roles:
        scales["values"] = files.scales(task, coded)
    if (coded.base_name, "centre") in task.group.vectors:
        roles["centre"] = "centre"
        steps = files.steps(task, coded, "centre")
        scales["centre"] = (np.ones(1, np.float32), coded.numel) if steps is None else steps
    shape = task.base[coded.base_name].shape
    vectors = {
        name: files.payload(task.group, vector_values_of(task.group.vector(coded.base_name, role), shape))
        for name, role in roles.items()
    }
    rows = {name: _Rows.of(*found, coded.numel) for name, found in scales.items()}
    own = OwnValues.open(files, task, coded, codes) if isinstance(coded.code, Sparse) else None
    stays = isinstance(files, ResidentFiles) and files.is_complete(task, coded.name)
    return CompiledElements(kernel, base, coded.base_name, codes, vectors, rows, own, {} if stays else None)


def _address(elements: NDArray[np.generic]) -> int:
    place: int = elements.__array_interface__["data"][0]
    return place
