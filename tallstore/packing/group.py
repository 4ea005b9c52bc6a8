"""One group of tasks, fitted and written: its shared vectors, and each task's codes and private tensors.

For each tensor of the base in turn: compare every expert with it, merge what moved, store the merged vector's codes, read the
masks and gains off the merged vector AS STORED, rebuild, and measure what came of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore import layout
from tallstore import manifest as tables
from tallstore.bits import Bytes
from tallstore.checkpoints import Checkpoint
from tallstore.dtypes import CHUNK_NUMEL
from tallstore.encodings import BITS, SHARED, SIGNED, STEPS, WHOLE
from tallstore.errors import OptionError
from tallstore.fit import Fit, Method, Tile
from tallstore.manifest import Payload, SharedDtype
from tallstore.packing.fidelity import Estimated, Sums, dot, sign_estimate, signed_estimates
from tallstore.packing.plan import Expert, Part
from tallstore.packing.stack import Examined, Span, Stack, examine, result_dtype
from tallstore.quantise import STEPPED, quantise, steps, values
from tallstore.r13 import in_range, r13, row_scales
from tallstore.shards import POOLED_NUMEL, ShardWriter

_WIDEST_GAIN = 8.0  # a gain this many times the fit's own scale, or one part in this many, says that the fit degenerated
_IN_MEMORY_NBYTES = 16 << 20


@dataclass(frozen=True)
class StoredWhole:
    """A tensor that was stored whole, for the report.

    Attributes:
        tensor, reason: which, and why.
        nbytes: what it costs.
    """

    tensor: str
    reason: str
    nbytes: int


@dataclass
class TaskProgress:
    """What has been written of one task so far."""

    expert: Expert
    slug: str
    writer: ShardWriter
    entries: dict[str, tables.Tensor] = field(default_factory=dict)
    whole: list[StoredWhole] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    coded_nbytes: int = 0
    sign: list[Estimated] = field(default_factory=list)
    signed: list[Estimated] = field(default_factory=list)
    coded_numel: int = 0

    def store_whole(self, name: str, reason: str, start: int = 0, *, role: str = "values") -> Payload | None:
        """Store elements from *start* on as they are; None where there are none."""
        checkpoint = self.expert.checkpoint
        spec = checkpoint.spec(name)
        encoding, key = WHOLE[spec.dtype], f"{role}/{name}"
        if start == spec.numel:
            self.whole.append(StoredWhole(name, reason, 0))
            return None
        if spec.numel - start < POOLED_NUMEL:
            raw = checkpoint.read_bytes(name, start, spec.numel)
            self.whole.append(StoredWhole(name, reason, raw.size))
            return self.writer.whole("private", key, encoding, spec.numel - start, raw)
        payload = self.writer.payload("private", key, encoding)
        for first in range(start, spec.numel, CHUNK_NUMEL):
            payload.append(checkpoint.read_bytes(name, first, min(first + CHUNK_NUMEL, spec.numel)))
        placed = payload.finish()
        self.whole.append(StoredWhole(name, reason, payload.stored_nbytes))
        return placed

    def store_private(self, name: str, reason: str) -> None:
        """Store a whole tensor, and enter it in the table."""
        spec = self.expert.checkpoint.spec(name)
        self.entries[name] = tables.PrivateTensor(
            name=name, dtype=spec.dtype, shape=spec.shape, values=self.store_whole(name, reason)
        )


class GroupPacker:
    """Fits and writes one group, one base tensor at a time; holds no tensor between calls."""

    def __init__(
        self, base: Checkpoint, experts: Sequence[Expert], method: Method, fit: Fit, dtype: SharedDtype, root: Path
    ) -> None:
        """Begin group g0001 in the bundle that is being written at *root*.

        Args:
            base: the base.
            experts: the group's tasks.
            method, fit: what was chosen, and it at work.
            dtype: of the shared vectors.
            root: the bundle's directory, empty.
        """
        self._base, self._method, self._fit, self._dtype = base, method, fit, dtype
        self._root = root
        self.id = "g0001"
        self.writer = ShardWriter(root / layout.group_directory(self.id))
        self.vectors: list[tables.Vector] = []
        self.tasks = {
            expert.task: TaskProgress(expert, slug, ShardWriter(root / layout.task_directory(slug)))
            for expert, slug in _slugs(experts)
        }
        for directory in (layout.group_directory(self.id), *(layout.task_directory(t.slug) for t in self.tasks.values())):
            (root / directory).mkdir(parents=True)

    def pack_tensor(self, base_name: str, parts: Sequence[Part]) -> None:
        """Everything about one base tensor."""
        coded = []
        for part in parts:
            found = examine(self._base, base_name, part)
            if found.statistics is None:
                self._store_uncoded(base_name, found)
            elif reason := self._too_far(base_name, found):
                self.tasks[part.expert.task].store_private(part.name, reason)
            else:
                coded.append(found)
        if coded:
            self._pack_stack(Stack(self._base, base_name, coded))

    def _store_uncoded(self, base_name: str, found: Examined) -> None:
        part = found.part
        task = self.tasks[part.expert.task]
        if not found.is_same:
            task.store_private(part.name, part.whole_because or "")
        elif part.is_resized:
            task.entries[part.name] = self._extended(part, base_name, tables.SameCode())
        else:
            task.entries[part.name] = tables.SameTensor(**_identity(part, base_name))

    def _too_far(self, base_name: str, found: Examined) -> str | None:
        """Why leading rows are not the base's rows at all: a head with another number of classes, most often."""
        statistics = found.statistics
        if statistics is None:
            return None
        if not r13(statistics.rms).item():
            return "its task vector is too small for a scale"
        if not found.part.is_resized:
            return None
        norm = 0.0
        for start in range(0, found.part.numel, CHUNK_NUMEL):
            rows = self._base.read(base_name, start, min(start + CHUNK_NUMEL, found.part.numel))
            norm += dot(rows, rows)
        return "its rows are not a resizing of the base's" if statistics.sum_squares >= norm else None

    def _pack_stack(self, stack: Stack) -> None:
        shared = _SharedVector(stack, self._fit, self._dtype, self._root)
        projections = dict.fromkeys((part.expert.task for part in stack.parts), 0.0)
        for number, span in enumerate(stack.spans):
            tile = stack.tile(span)
            shared.fit(span, tile)
            merged = shared.stored(span)
            for position, name in enumerate(tile.tasks):
                codes = self._fit.code(tile, position, merged)
                projections[name] += dot(_contribution(codes, merged), tile.task_vectors[position])
            # One tile in eight stands for the tensor, the first always.
            if tile.tasks and number % 8 == 0 and self._method.kind != "signed":
                for name, estimate in zip(tile.tasks, signed_estimates(tile), strict=True):
                    self.tasks[name].signed.append(estimate)

        used = False
        for position, part in enumerate(stack.parts):
            task = self.tasks[part.expert.task]
            statistics = stack.statistics[position]
            gain, reason = self._gain(position, stack, shared, projections[part.expert.task])
            if reason is None:
                reason = self._write_codes(stack, part, shared, gain)
            if reason is not None:
                task.store_private(part.name, reason)
                continue
            task.sign.append(sign_estimate(statistics))
            used = True
        if used:
            self.vectors.append(shared.write(self.writer))

    def _gain(
        self, position: int, stack: Stack, shared: _SharedVector, projection: float
    ) -> tuple[float, str | None]:
        statistics = stack.statistics[position]
        if projection <= 0:
            return 0.0, "the fit has no part along its task vector"
        exact = self._fit.gain(statistics, projection)
        gain = r13(exact).item()
        fitted = self._fit.fitted_scale(statistics)
        if not fitted / _WIDEST_GAIN <= exact <= fitted * _WIDEST_GAIN:
            return gain, f"the fit degenerated (its gain is {exact / fitted:.3g})"
        if not shared.scales_are_in_range(gain):
            return gain, "its scales are beyond what the format holds"
        return gain, None

    def _write_codes(self, stack: Stack, part: Part, shared: _SharedVector, gain: float) -> str | None:
        """Write one task's codes, rebuild and measure; why it must be private instead, if it must."""
        task = self.tasks[part.expert.task]
        signed = self._method.kind == "signed"
        role = "fields" if signed else "bits"
        payload = task.writer.payload("mask", f"{role}/{part.name}", SIGNED if signed else BITS)
        sums = Sums()
        for span in stack.spans:
            if span.stop > part.numel:
                break
            tile = stack.tile(span)
            position = tile.tasks.index(part.expert.task)
            codes = self._fit.code(tile, position, shared.stored(span))
            payload.append(codes.numpy())
            step = _rebuild(stack, part, span, shared.delta(span, codes, gain))
            if not torch.isfinite(step).all():
                payload.discard()
                return f"its reconstruction overflows {part.spec.dtype}"
            vector = tile.task_vectors[position]
            sums += Sums(dot(step, vector), dot(step, step), dot(vector, vector))
        placed = payload.finish()
        task.sums += sums
        task.coded_numel += part.numel
        task.coded_nbytes += payload.stored_nbytes
        scaled: dict[str, Any] = {"gain": gain, role: placed}
        if part.is_resized:
            leading = tables.SignedCode(**scaled) if signed else tables.MaskCode(**scaled)
            task.entries[part.name] = self._extended(part, stack.name, leading)
        else:
            kind = tables.SignedTensor if signed else tables.MaskTensor
            task.entries[part.name] = kind(**_identity(part, stack.name), **scaled)
        return None

    def _extended(self, part: Part, base_name: str, leading: tables.RowsCode) -> tables.ExtendedTensor:
        task = self.tasks[part.expert.task]
        further = None
        if part.numel < part.spec.numel:
            reason = f"rows from {part.rows}, which the base does not have"
            further = task.store_whole(part.name, reason, part.numel, role="further")
        return tables.ExtendedTensor(**_identity(part, base_name), rows=part.rows, leading=leading, further=further)


def _slugs(experts: Sequence[Expert]) -> list[tuple[Expert, str]]:
    taken: set[str] = set()
    pairs = []
    for expert in experts:
        slug = layout.slugify(expert.task, taken)
        taken.add(slug)
        pairs.append((expert, slug))
    return pairs


def _identity(part: Part, base_name: str) -> dict[str, Any]:
    """The fields that every tensor with a base has."""
    other = None if base_name == part.name else base_name
    return {"name": part.name, "base": other, "dtype": part.spec.dtype, "shape": part.spec.shape}


def _contribution(codes: Tensor, shared: Tensor) -> Tensor:
    """+value where the code is 1, -value where it is 2, else 0."""
    return torch.where(codes == 0, 0.0, torch.where(codes == 1, shared, -shared))


def _rebuild(stack: Stack, part: Part, span: Span, delta: Tensor) -> Tensor:
    """What a reader gets, less the base: float64, after the final rounding."""
    base = stack.base.read(stack.name, span.start, span.stop)
    total = base.double() + delta.double() if base.dtype is torch.float64 else base.float() + delta
    expert = torch.where(delta == 0, base.to(result_dtype(part)), total.to(result_dtype(part)))
    return expert.double() - base.double()


class _SharedVector:
    """The shared vector of one stack: fitted tile by tile, kept as codes, read back as stored."""

    def __init__(self, stack: Stack, fit: Fit, dtype: SharedDtype, directory: Path) -> None:
        self._stack, self._fit, self._dtype = stack, fit, dtype
        self._step: NDArray[np.float32] | None = np.zeros(stack.rows, np.float32) if dtype in STEPPED else None
        self._codes = _scratch(stack.spec.numel, dtype, directory)
        if self._step is not None and not stack.rows_are_whole:
            # A piece of a row does not know the row's largest magnitude: look at all of them first.
            largest = torch.zeros(stack.rows)
            for span in stack.spans:
                tile = stack.tile(span)
                if tile.tasks:
                    largest[span.row] = torch.maximum(largest[span.row], fit.merge(tile).abs().amax())
            self._step[:] = steps(largest, dtype)

    def fit(self, span: Span, tile: Tile) -> None:
        """Merge a tile and keep its codes."""
        merged = self._fit.merge(tile) if tile.tasks else torch.zeros(span.stop - span.start)
        rows = merged.view(span.rows, -1)
        if self._step is not None and self._stack.rows_are_whole:
            self._step[span.row : span.row + span.rows] = steps(rows.abs().amax(1), self._dtype)
        codes = quantise(rows, self._row_steps(span), self._dtype).view(-1)
        if codes.is_floating_point() and not torch.isfinite(codes).all():
            raise OptionError(
                f"merged_dtype: {self._dtype} overflows in the merged vector of tensor {self._stack.name!r}; give bfloat16"
            )
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
        return _contribution(codes, (rows * torch.from_numpy(scales)[:, None]).view(-1))

    def scales_are_in_range(self, gain: float) -> bool:
        """Whether every scale at *gain*, and every step, is an r13 number that the format holds."""
        if self._step is None:
            return bool(in_range(np.full(1, gain, np.float32)).all())
        scales = row_scales(np.full(1, gain, np.float32), self._step)
        return bool(gain and in_range(scales).all() and in_range(self._step).all())

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
        return torch.empty(numel, dtype=code_dtype)
    with tempfile.TemporaryFile(dir=directory) as file:
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(nbytes,))).view(code_dtype)
