"""The vectors that the tasks of a group share in one tensor: kept as codes tile by tile, read back as stored."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.errors import InputError, OptionError
from tallstore.fit import Shared
from tallstore.format import manifest as tables
from tallstore.format.bits import Bytes
from tallstore.format.encodings import SHARED, STEPS
from tallstore.format.manifest import Role, SharedDtype
from tallstore.format.r13 import in_range, row_scales
from tallstore.format.shard_writer import PayloadSink, about_stored
from tallstore.format.tables import STEPPED
from tallstore.packing.quantise import quantise, steps, values
from tallstore.packing.stack import Span, Stack

_IN_MEMORY_NBYTES = 16 << 20


class SharedVector:
    """One shared vector of one stack."""

    def __init__(self, stack: Stack, role: Role, dtype: SharedDtype, directory: Path) -> None:
        self.role = role
        self._stack, self._dtype = stack, dtype
        self._step: NDArray[np.float32] | None = np.zeros(stack.rows, np.float32) if dtype in STEPPED else None
        self._codes = _scratch(stack.spec.numel, dtype, directory)

    @property
    def needs_largest(self) -> bool:
        """Whether `see` must be told of every tile first: a piece of a row does not know the row's largest value."""
        return self._step is not None and not self._stack.rows_are_whole

    def see(self, spans: Iterable[tuple[Span, Tensor]]) -> None:
        """Choose the steps from what will be stored: all of it."""
        largest = torch.zeros(self._stack.rows, dtype=torch.float32, device="cpu")
        for span, vector in spans:
            largest[span.row] = torch.maximum(largest[span.row], vector.abs().amax())
        if self._step is not None:
            self._step[:] = steps(largest, self._dtype)

    def store(self, span: Span, vector: Tensor) -> None:
        """Keep the codes of a tile: float32, 1-D."""
        rows = vector.view(span.rows, -1)
        if self._step is not None and self._stack.rows_are_whole:
            self._step[span.row : span.row + span.rows] = steps(rows.abs().amax(1), self._dtype)
        codes = quantise(rows, self._row_steps(span), self._dtype).view(-1)
        if codes.is_floating_point() and not torch.isfinite(codes).all():
            what = f"the {self.role} vector of tensor {self._stack.name!r}"
            if not torch.isfinite(vector).all():
                raise InputError(what, f"is beyond float32; keep the tensor whole with private={self._stack.name!r}")
            wider = "bfloat16" if self._dtype == "F16" else "float32"
            raise OptionError(f"merged_dtype: {self._dtype} overflows in {what}; give {wider}")
        self._codes[span.start : span.stop] = codes

    def stored(self, span: Span) -> Tensor:
        """The vector as a reader sees it at gain one: float32, 1-D."""
        rows = self.values(span)
        step = self._row_steps(span)
        return (rows if step is None else rows * step).view(-1)

    def values(self, span: Span) -> Tensor:
        """What the codes stand for, in steps: float32 [rows, length]."""
        return values(self._codes[span.start : span.stop], self._dtype).view(span.rows, -1)

    def scales(self, span: Span, gains: NDArray[np.float32]) -> Tensor:
        """What a reader multiplies `values` by under *gains*, one or one for each row of the span: float32, 1-D."""
        step = None if self._step is None else self._step[span.row : span.row + span.rows]
        return torch.from_numpy(row_scales(gains, step))

    def scales_are_in_range(self, gains: NDArray[np.float32]) -> bool:
        """Whether every scale under *gains*, one or one for each of the first rows, is one that the format holds."""
        step = None if self._step is None else self._step[: gains.size] if gains.size > 1 else self._step
        return bool(in_range(row_scales(gains, step)).all() and (step is None or in_range(step).all()))

    def write(self, writer: PayloadSink) -> tuple[tables.Vector, int]:
        """Write codes and steps; the vector's entry in group.json, and about how many bytes it takes."""
        name = self._stack.name
        payload = writer.payload("merged", f"{self.role}/{name}", SHARED[self._dtype])
        for span in self._stack.spans:
            payload.append(self._codes[span.start : span.stop].view(torch.uint8).numpy())
        placed = payload.finish()
        nbytes, step = payload.stored_nbytes, None
        if self._step is not None:
            raw: Bytes = self._step.view(np.uint8)
            step = writer.whole("merged", f"{self.role}.step/{name}", STEPS, self._step.size, raw)
            nbytes += about_stored(raw, STEPS, self._step.size)
        vector = tables.Vector(
            tensor=name, role=self.role, dtype=self._dtype, row_axes=self._stack.row_axes, values=placed, step=step
        )
        return vector, nbytes

    def _row_steps(self, span: Span) -> Tensor | None:
        if self._step is None:
            return None
        return torch.from_numpy(self._step[span.row : span.row + span.rows])[:, None]


class SharedVectors:
    """All the shared vectors of one stack, by role."""

    def __init__(self, stack: Stack, roles: Iterable[Role], dtype: SharedDtype, directory: Path) -> None:
        self._by_role = {role: SharedVector(stack, role, dtype, directory) for role in roles}

    def __iter__(self) -> Iterator[SharedVector]:
        """In the order of the roles."""
        return iter(self._by_role.values())

    def __getitem__(self, role: Role) -> SharedVector:
        return self._by_role[role]

    def store(self, span: Span, vectors: Shared) -> None:
        """Keep the codes of a tile of every role; zeros for the roles that *vectors* lacks."""
        for role, vector in self._by_role.items():
            zeros = torch.zeros(span.stop - span.start, dtype=torch.float32, device="cpu")
            vector.store(span, vectors.get(role, zeros))

    def stored(self, span: Span) -> Shared:
        """Every vector as a reader sees it at gain one."""
        return {role: vector.stored(span) for role, vector in self._by_role.items()}


_CODE_DTYPES: dict[SharedDtype, torch.dtype] = {
    "LOG4": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def _scratch(numel: int, dtype: SharedDtype, directory: Path) -> Tensor:
    """Room for the codes of one tensor: in memory, or in a nameless file where they are many."""
    code_dtype = _CODE_DTYPES[dtype]
    nbytes = numel * code_dtype.itemsize
    if nbytes <= _IN_MEMORY_NBYTES:
        return torch.empty(numel, dtype=code_dtype, device="cpu")
    with tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is an error here, and under a mapping a crash
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(nbytes,))).view(code_dtype)
