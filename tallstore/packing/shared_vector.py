"""The vector that the tasks of a group share in one tensor: fitted tile by tile, kept as codes, read back as stored."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit import Fit, Tile
from tallstore.format import manifest as tables
from tallstore.format.bits import Bytes
from tallstore.format.encodings import SHARED, STEPS
from tallstore.format.manifest import SharedDtype
from tallstore.format.r13 import in_range, row_scales
from tallstore.format.shard_writer import ShardWriter
from tallstore.format.tables import STEPPED
from tallstore.packing.quantise import quantise, steps, values
from tallstore.packing.stack import Span, Stack

_IN_MEMORY_NBYTES = 16 << 20


def contribution(codes: Tensor, shared: Tensor) -> Tensor:
    """+value where the code is 1, -value where it is 2, else 0."""
    return torch.where(codes == 0, 0.0, torch.where(codes == 1, shared, -shared))


class SharedVector:
    """The shared vector of one stack: fitted tile by tile, kept as codes, read back as stored."""

    def __init__(self, stack: Stack, fit: Fit, dtype: SharedDtype, directory: Path) -> None:
        self._stack, self._fit, self._dtype = stack, fit, dtype
        self._step: NDArray[np.float32] | None = np.zeros(stack.rows, np.float32) if dtype in STEPPED else None
        self._codes = _scratch(stack.spec.numel, dtype, directory)
        if self._step is not None and not stack.rows_are_whole:
            # A piece of a row does not know the row's largest magnitude: look at all of them first.
            largest = torch.zeros(stack.rows, dtype=torch.float32, device="cpu")
            for span in stack.spans:
                tile = stack.tile(span)
                if tile.tasks:
                    largest[span.row] = torch.maximum(largest[span.row], fit.merge(tile).abs().amax())
            self._step[:] = steps(largest, dtype)

    def fit(self, span: Span, tile: Tile) -> None:
        """Merge a tile and keep its codes."""
        if tile.tasks:
            merged = self._fit.merge(tile)
        else:
            merged = torch.zeros(span.stop - span.start, dtype=torch.float32, device="cpu")
        rows = merged.view(span.rows, -1)
        if self._step is not None and self._stack.rows_are_whole:
            self._step[span.row : span.row + span.rows] = steps(rows.abs().amax(1), self._dtype)
        codes = quantise(rows, self._row_steps(span), self._dtype).view(-1)
        if codes.is_floating_point() and not torch.isfinite(codes).all():
            where = f"the merged vector of tensor {self._stack.name!r}"
            raise OptionError(f"merged_dtype: {self._dtype} overflows in {where}; give bfloat16")
        self._codes[span.start : span.stop] = codes

    def stored(self, span: Span) -> Tensor:
        """The merged vector as a reader sees it at gain one: float32, 1-D."""
        rows = values(self._codes[span.start : span.stop], self._dtype).view(span.rows, -1)
        step = self._row_steps(span)
        return (rows if step is None else rows * step).view(-1)

    def delta(self, span: Span, codes: Tensor, gain: float) -> Tensor:
        """What a task adds to the base: float32, 1-D, in the arithmetic of the specification."""
        step = None if self._step is None else self._step[span.row : span.row + span.rows]
        scales = row_scales(np.full(1, gain, np.float32), step)
        rows = values(self._codes[span.start : span.stop], self._dtype).view(span.rows, -1)
        return contribution(codes, (rows * torch.from_numpy(scales)[:, None]).view(-1))

    def scales_are_in_range(self, gain: float) -> bool:
        """Whether every scale at *gain*, and every step, is an r13 number that the format holds."""
        scales = row_scales(np.full(1, gain, np.float32), self._step)
        steps_are = self._step is None or in_range(self._step).all()
        return bool(gain and in_range(scales).all() and steps_are)

    def write(self, writer: ShardWriter) -> tables.Vector:
        """Write codes and steps; the vector's entry in group.json."""
        name = self._stack.name
        payload = writer.payload("merged", f"merged/{name}", SHARED[self._dtype])
        for span in self._stack.spans:
            payload.append(self._codes[span.start : span.stop].view(torch.uint8).numpy())
        placed = payload.finish()
        step = None
        if self._step is not None:
            raw: Bytes = self._step.view(np.uint8)
            step = writer.whole("merged", f"merged.step/{name}", STEPS, self._step.size, raw)
        return tables.Vector(tensor=name, role="merged", dtype=self._dtype, values=placed, step=step)

    def _row_steps(self, span: Span) -> Tensor | None:
        if self._step is None:
            return None
        return torch.from_numpy(self._step[span.row : span.row + span.rows])[:, None]


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
