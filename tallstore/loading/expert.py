"""One task's tensors, rebuilt range by range from the base, the shared vectors and the task's own payloads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL, Dtype, TensorSpec
from tallstore.format.manifest import BasedTensor, ExtendedTensor, PrivateTensor
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded, Stored, coded_part, further_of, leading_shape, values_of
from tallstore.format.shard_reader import PayloadReader
from tallstore.loading import parallel
from tallstore.loading.boxes import Box
from tallstore.loading.coded import open_coded
from tallstore.loading.compiled import CompiledElements, open_compiled
from tallstore.loading.decode import copy_cast
from tallstore.loading.forms import form_of
from tallstore.loading.fresh_memory import Wanted, fresh, refuse_too_large
from tallstore.loading.kernels import kernels
from tallstore.loading.packed import NARROW, Form
from tallstore.loading.pieces import Cut, Piece, Section, Source, jobs
from tallstore.loading.pinned_base import PinnedBase
from tallstore.loading.resident import ResidentFiles

if TYPE_CHECKING:
    from tallstore.loading.decode_llvm import Kernel


class Expert:
    """The tensors of one task. Holds no weights; several threads may use it."""

    def __init__(self, task: Task, files: BundleFiles, base: PinnedBase) -> None:
        self.task, self._files, self._base = task, files, base
        self._forms: dict[tuple[str, torch.dtype], Form] = {}

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
        nbytes = sum(self.spec(name).nbytes for name in names)
        refuse_too_large(nbytes, f"{self._files.where}, task {self.task.entry.name!r}")
        self._files.bring([self.task], names, ranges=len(names) == 1)

        def wanted(name: str) -> Wanted:
            spec = self.spec(name)
            own_dtype = TORCH_DTYPES[spec.dtype]
            return spec.shape, own_dtype if dtype is None or not own_dtype.is_floating_point else dtype

        def pieces() -> Iterator[Piece]:
            for name, tensor in zip(names, fresh(map(wanted, names)), strict=True):
                whole[name] = tensor
                yield from self._pieces(name, 0, tensor.numel(), tensor.view(-1))

        self._expect((name, wanted(name)[1]) for name in names)
        parallel.run(jobs(pieces()))
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name; tied names have one tensor.

        Raises:
            TallstoreError: as `read`.
        """
        whole = self.tensors(dict.fromkeys(map(self.carrier, self.names)))
        return {name: whole[self.carrier(name)] for name in self.names}

    def write(self, destinations: Mapping[str, Tensor]) -> None:
        """Write whole tensors to flat tensors on the CPU, by name; cast where the dtype is another.

        Torch may not see that they were written to: callers count it, where others may have kept them.

        Raises:
            TallstoreError: as `read`. Any part of *destinations* may have been written then.
        """
        self._files.bring([self.task], destinations)
        self._expect((name, destination.dtype) for name, destination in destinations.items())
        parallel.run(
            jobs(
                piece
                for name, destination in destinations.items()
                for piece in self._pieces(name, 0, destination.numel(), destination)
            )
        )

    def write_boxes(self, destinations: Sequence[tuple[str, Box, Tensor]]) -> None:
        """Write slices of tensors to tensors on the CPU; cast where the dtype is another. See `write` for torch.

        Reads and decodes each chunk that a slice has elements in, once for each slice: for a few columns of a matrix
        that is all of it. Needs the memory of a few chunks.

        Args:
            destinations: names, slices, and where they go: of the slice's lengths, of any dtype and strides, detached.

        Raises:
            TallstoreError: as `read`. Any part of the destinations may have been written then.
        """
        self._expect((name, destination.dtype) for name, _, destination in destinations)
        parallel.run(jobs(cut for slice_of in destinations for cut in self._cuts(*slice_of)))

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

    def _expect(self, wanted: Iterable[tuple[str, torch.dtype]]) -> None:
        """Have functions compiled for what is much: names of tensors, and dtypes of their destinations."""
        for name, dtype in wanted:
            tensor = self.task.tensor(name)
            coded = coded_part(tensor)
            if coded is not None:
                kernels.expect(self._form(coded, tensor.dtype, dtype), coded.numel)

    def _form(self, coded: Coded, own: Dtype, dtype: torch.dtype) -> Form:
        """What a coded tensor becomes for a destination of *dtype*: that, or what is then cast to it."""
        form = self._forms.get((coded.name, dtype))
        if form is None:
            name = DTYPE_NAMES.get(dtype)
            form = form_of(self.task, coded, own, name if name in NARROW else own)
            self._forms[coded.name, dtype] = form
        return form

    def _pieces(self, name: str, start: int, stop: int, destination: Tensor) -> Iterator[Piece]:
        """What `read` does, chunk by chunk; the payloads are opened as the iteration goes on."""
        for section in self._sections(name, start, stop, destination.dtype):
            yield from section.pieces(start, stop, destination)

    def _cuts(self, name: str, box: Box, destination: Tensor) -> Iterator[Piece | Cut]:
        """What `write_boxes` does for one slice, likewise."""
        if box.is_run and destination.is_contiguous():
            yield from self._pieces(name, box.start, box.stop, destination.view(-1))
            return
        for section in self._sections(name, box.start, box.stop, destination.dtype):
            yield from section.cuts(box, destination)

    def _sections(self, name: str, start: int, stop: int, wanted: torch.dtype) -> Iterator[Section]:
        """The parts of a tensor that overlap [start, stop); a payload is not opened before its part is asked for."""
        tensor = self.task.tensor(name)
        numel, own = math.prod(tensor.shape), TORCH_DTYPES[tensor.dtype]
        if isinstance(tensor, PrivateTensor) and start < stop:
            yield Section(0, numel, self._stored(values_of(tensor)), own)
        if not isinstance(tensor, BasedTensor):
            return
        if numel == 0:
            self._base.name_of(tensor.base_name)  # nothing of it will be read, and yet it must be there (BASE-1)
        border = math.prod(leading_shape(tensor)) if isinstance(tensor, ExtendedTensor) else numel
        if start < min(border, stop):
            coded = coded_part(tensor)
            if coded is None:
                yield Section(0, border, _Kept(self._base, tensor.base_name), own)
            else:
                yield self._coded(coded, tensor.dtype, wanted)
        if isinstance(tensor, ExtendedTensor) and max(border, start) < stop:
            yield Section(border, numel, self._stored(further_of(tensor)), own)

    def _coded(self, coded: Coded, own: Dtype, wanted: torch.dtype) -> Section:
        form = self._form(coded, own, wanted)
        kernel = kernels.kernel(form)
        if kernel is None:
            elements = open_coded(self._files, self.task, self._base, coded)
            return Section(0, coded.numel, elements, TORCH_DTYPES[own])
        return Section(0, coded.numel, self._compiled(coded, kernel), TORCH_DTYPES[form.wanted])

    def _compiled(self, coded: Coded, kernel: Kernel) -> CompiledElements:
        make = partial(open_compiled, kernel, self._files, self.task, self._base, coded)
        if isinstance(self._files, ResidentFiles):
            return self._files.opened(self.task, coded.name, kernel, make)
        return make()

    def _stored(self, stored: Stored | None) -> Source:
        if stored is None:
            raise AssertionError("elements without a payload")  # the tables were checked (TAB-6)
        return _Stored(self._files.payload(self.task, stored))


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
