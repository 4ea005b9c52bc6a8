"""One task's tensors, rebuilt range by range from the base, the shared vectors and the task's own payloads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.format.bundle_files import BundleFiles, Task
from tallstore.format.dtypes import CHUNK_NUMEL, Dtype, TensorSpec
from tallstore.format.manifest import BasedTensor, ExtendedTensor, PrivateTensor
from tallstore.format.payloads import Coded, Stored, coded_part, further_of, leading_shape, values_of
from tallstore.format.shard_reader import PayloadReader
from tallstore.loading import parallel
from tallstore.loading.coded import open_coded
from tallstore.loading.compiled import open_compiled
from tallstore.loading.decode import copy_cast
from tallstore.loading.forms import form_of
from tallstore.loading.fresh_memory import Wanted, fresh
from tallstore.loading.kernels import kernels
from tallstore.loading.packed import Form
from tallstore.loading.pinned_base import PinnedBase
from tallstore.loading.resident import ResidentFiles

_JOB_NUMEL: Final = CHUNK_NUMEL // 2


class Expert:
    """The tensors of one task. Holds no weights; several threads may use it."""

    def __init__(self, task: Task, files: BundleFiles, base: PinnedBase) -> None:
        self.task, self._files, self._base = task, files, base
        self._forms: dict[str, Form] = {}  # of coded tensors

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the task's table."""
        return tuple(self.task.tensors)

    def carrier(self, name: str) -> str:
        """The name of the tensor that *name* is tied to; its own where it is not tied.

        Raises:
            UnknownTensorError: no tensor has that name.
        """
        return self.task.tensor(name).name

    def spec(self, name: str) -> TensorSpec:
        """Data type and shape of a tensor; reads nothing.

        Raises:
            UnknownTensorError: no tensor has that name.
        """
        tensor = self.task.tensor(name)
        return TensorSpec(tensor.dtype, tensor.shape)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor in new memory on the CPU; cast to *dtype*, if it is a floating-point one.

        Raises:
            TallstoreError: as `read`.
        """
        return self.tensors([name], dtype)[name]

    def tensors(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """As `tensor`, for several tensors at once.

        Raises:
            TallstoreError: as `read`.
        """
        whole: dict[str, Tensor] = {}
        names = list(names)
        self._expect(names)

        def wanted(name: str) -> Wanted:
            spec = self.spec(name)
            own_dtype = TORCH_DTYPES[spec.dtype]
            return spec.shape, own_dtype if dtype is None or not own_dtype.is_floating_point else dtype

        def pieces() -> Iterator[_Piece]:
            for name, tensor in zip(names, fresh(map(wanted, names)), strict=True):
                whole[name] = tensor
                yield from self._pieces(name, 0, tensor.numel(), tensor.view(-1))

        parallel.run(_grouped(pieces()))
        return whole

    def write(self, destinations: Mapping[str, Tensor]) -> None:
        """Write whole tensors to flat tensors on the CPU, by name; cast where the dtype is another.

        Torch may not see that they were written to: callers count it, where others may have kept them.

        Raises:
            TallstoreError: as `read`. Any part of *destinations* may have been written then.
        """
        self._expect(destinations)
        parallel.run(
            _grouped(
                piece
                for name, destination in destinations.items()
                for piece in self._pieces(name, 0, destination.numel(), destination)
            )
        )

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat tensor in its own dtype, [stop - start], in new memory on the CPU.

        Raises:
            TallstoreError: as `read`.
        """
        part = torch.empty(stop - start, dtype=TORCH_DTYPES[self.spec(name).dtype], device="cpu")
        self.read(name, start, stop, part)
        return part

    def read(self, name: str, start: int, stop: int, destination: Tensor) -> None:
        """Write elements [start, stop) of the flat tensor *name* to *destination*, cast where its dtype is another.

        Reads the chunks that they lie in, and nothing else of the tensor; needs the memory of a few chunks.

        Args:
            name: of the tensor.
            start: of the range, inside the tensor.
            stop: behind its last element.
            destination: [stop - start], on the CPU.

        Raises:
            UnknownTensorError: no tensor has that name.
            IntegrityError: bytes are not the ones that were written.
            FormatError: a payload breaks a rule.
            BaseMismatchError: the base is another one.
        """
        for piece in self._pieces(name, start, stop, destination):
            piece.write()

    def _expect(self, names: Iterable[str]) -> None:
        """Have functions compiled for what is much; what tensors are coded is known before they are read."""
        for tensor in map(self.task.tensor, names):
            coded = coded_part(tensor)
            if coded is not None:
                kernels.expect(self._form(coded, tensor.dtype), coded.numel)

    def _form(self, coded: Coded, dtype: Dtype) -> Form:
        form = self._forms.get(coded.name)
        if form is None:
            form = self._forms[coded.name] = form_of(self.task, coded, dtype)
        return form

    def _pieces(self, name: str, start: int, stop: int, destination: Tensor) -> Iterator[_Piece]:
        """What `read` does, chunk by chunk; the payloads are opened as the iteration goes on."""
        own_dtype = TORCH_DTYPES[self.task.tensor(name).dtype]
        for section in self._sections(name, start, stop):
            low, high = max(start, section.start), min(stop, section.stop)
            for first, last in _chunked(low - section.start, high - section.start):
                place = section.start + first - start
                yield _Piece(section.source, first, last, own_dtype, destination[place : place + last - first])

    def _sections(self, name: str, start: int, stop: int) -> Iterator[_Section]:
        """The parts of a tensor that overlap [start, stop); a payload is not opened before its part is asked for."""
        tensor = self.task.tensor(name)
        numel = math.prod(tensor.shape)
        if isinstance(tensor, PrivateTensor) and start < stop:
            yield _Section(0, numel, self._stored(values_of(tensor)))
        if not isinstance(tensor, BasedTensor):
            return
        border = math.prod(leading_shape(tensor)) if isinstance(tensor, ExtendedTensor) else numel
        if start < min(border, stop):
            coded = coded_part(tensor)
            kept = _Kept(self._base, tensor.base_name)
            yield _Section(0, border, kept if coded is None else self._coded(coded, tensor.dtype))
        if isinstance(tensor, ExtendedTensor) and max(border, start) < stop:
            yield _Section(border, numel, self._stored(further_of(tensor)))

    def _coded(self, coded: Coded, dtype: Dtype) -> _Source:
        kernel = kernels.kernel(self._form(coded, dtype))
        if kernel is None:
            return open_coded(self._files, self.task, self._base, coded)
        make = partial(open_compiled, kernel, self._files, self.task, self._base, coded)
        return self._files.opened(self.task, coded.name, make) if isinstance(self._files, ResidentFiles) else make()

    def _stored(self, stored: Stored | None) -> _Source:
        if stored is None:
            raise AssertionError("elements without a payload")  # the tables were checked (TAB-6)
        return _Stored(self._files.payload(self.task, stored))


class _Source(Protocol):
    """Where elements come from."""

    def read(self, start: int, stop: int, destination: Tensor) -> None:
        """Write elements [start, stop), which lie in one chunk, to *destination* in the tensor's own dtype."""


@dataclass(frozen=True, slots=True)
class _Section:
    """Elements [start, stop) of a tensor, whose source counts them, and their chunks, from 0."""

    start: int
    stop: int
    source: _Source


@dataclass(frozen=True, slots=True)
class _Stored:
    """Elements that are stored whole."""

    payload: PayloadReader

    def read(self, start: int, stop: int, destination: Tensor) -> None:
        chunk = self.payload.chunk(start // CHUNK_NUMEL)
        offset, width = start % CHUNK_NUMEL, self.payload.encoding.itemsize
        elements = chunk[offset * width : (offset + stop - start) * width]
        destination.view(torch.uint8).numpy()[:] = elements


@dataclass(frozen=True, slots=True)
class _Kept:
    """The base's own elements."""

    base: PinnedBase
    name: str

    def read(self, start: int, stop: int, destination: Tensor) -> None:
        copy_cast(destination, self.base.read(self.name, start, stop))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements [start, stop) of a source, which lie in one chunk, and where they are wanted.

    Attributes:
        dtype: the tensor's own.
        destination: [stop - start], of any dtype.
    """

    source: _Source
    start: int
    stop: int
    dtype: torch.dtype
    destination: Tensor

    def write(self) -> None:
        if self.destination.dtype == self.dtype:
            self.source.read(self.start, self.stop, self.destination)
            return
        own = torch.empty(self.stop - self.start, dtype=self.dtype, device="cpu")
        self.source.read(self.start, self.stop, own)
        copy_cast(self.destination, own)


def _grouped(pieces: Iterable[_Piece]) -> Iterator[parallel.Job]:
    """Jobs of a piece each, or of many small ones: a job costs about as much as decoding a thousand elements."""
    group: list[_Piece] = []
    numel = 0
    try:
        for piece in pieces:
            group.append(piece)
            numel += piece.stop - piece.start
            if numel >= _JOB_NUMEL:
                yield partial(_write, group)
                group, numel = [], 0
    except Exception:
        yield partial(_write, group)  # what goes wrong there comes first
        raise
    if group:
        yield partial(_write, group)


def _write(pieces: Sequence[_Piece]) -> None:
    for piece in pieces:
        piece.write()


def _chunked(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in ranges that each lie in one chunk."""
    while start < stop:
        last = min(stop, (start // CHUNK_NUMEL + 1) * CHUNK_NUMEL)
        yield start, last
        start = last
