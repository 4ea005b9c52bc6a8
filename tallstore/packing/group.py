"""One group of tasks, fitted and written: its shared vectors, and each task's codes and private tensors.

For each tensor of the base in turn: compare every expert with it, merge what moved, store the merged vector's codes,
read the masks and gains off the merged vector AS STORED, rebuild, and measure what came of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tallstore.checkpoints import Checkpoint
from tallstore.fit import Fit, Method
from tallstore.format import layout
from tallstore.format import manifest as tables
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import BITS, SIGNED, WHOLE
from tallstore.format.manifest import Payload, SharedDtype
from tallstore.format.r13 import r13
from tallstore.format.shard_writer import POOLED_NUMEL, ShardWriter
from tallstore.packing.fidelity import Estimated, Sums, dot, sign_estimate, signed_estimates
from tallstore.packing.plan import Expert, Part
from tallstore.packing.shared_vector import SharedVector, contribution
from tallstore.packing.stack import Examined, Span, Stack, cast, examine, result_dtype

_WIDEST_GAIN = 8.0  # a gain this many times the fit's own scale, or one part in this many: the fit degenerated


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
        self,
        base: Checkpoint,
        experts: Sequence[Expert],
        root: Path,
        *,
        method: Method,
        fit: Fit,
        dtype: SharedDtype,
        pool: ThreadPoolExecutor,
    ) -> None:
        """Begin group g0001 in the bundle that is being written at *root*.

        Args:
            base: the base.
            experts: the group's tasks.
            root: the bundle's directory, empty.
            method: what was chosen.
            fit: the method at work.
            dtype: of the shared vectors.
            pool: threads to spread tiles and tasks over.
        """
        self._base, self._method, self._fit, self._dtype = base, method, fit, dtype
        self._root, self._pool = root, pool
        self.id = "g0001"
        self.writer = ShardWriter(root / layout.group_directory(self.id))
        self.vectors: list[tables.Vector] = []
        self.tasks = {
            expert.task: TaskProgress(expert, slug, ShardWriter(root / layout.task_directory(slug)))
            for expert, slug in _slugs(experts)
        }
        for directory in (
            layout.group_directory(self.id),
            *(layout.task_directory(t.slug) for t in self.tasks.values()),
        ):
            (root / directory).mkdir(parents=True)

    def pack_tensor(self, base_name: str, parts: Sequence[Part]) -> None:
        """Everything about one base tensor."""
        coded = [found for found in self._pool.map(functools.partial(self._sort_out, base_name), parts) if found]
        if coded:
            self._pack_stack(Stack(self._base, base_name, coded))

    def _sort_out(self, base_name: str, part: Part) -> Examined | None:
        """Store a part that is not coded; what was found of one that is."""
        found = examine(self._base, base_name, part)
        if found.statistics is None:
            self._store_uncoded(base_name, found)
            return None
        if reason := self._too_far(base_name, found):
            self.tasks[part.expert.task].store_private(part.name, reason)
            return None
        return found

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
        list(self._pool.map(stack.keep, range(len(stack.parts))))
        shared = SharedVector(stack, self._fit, self._dtype, self._root)
        fitted = list(self._pool.map(functools.partial(self._fit_span, stack, shared), range(len(stack.spans))))
        # Summed in the order of the spans: the same bundle whatever the number of threads.
        projections = [sum(found.get(part.expert.task, 0.0) for found in fitted) for part in stack.parts]
        store = functools.partial(self._store_part, stack, shared)
        if any(list(self._pool.map(store, range(len(stack.parts)), projections))):
            self.vectors.append(shared.write(self.writer))

    def _fit_span(self, stack: Stack, shared: SharedVector, number: int) -> dict[str, float]:
        """Merge one tile; <R, tau> in it by task, from the merged vector as stored."""
        span = stack.spans[number]
        tile = stack.tile(span)
        shared.fit(span, tile)
        merged = shared.stored(span)
        # One tile in eight stands for the tensor, the first always.
        if tile.tasks and number % 8 == 0 and self._method.kind != "signed":
            share = 1 / -(-len(stack.spans) // 8)
            for task, estimate in zip(tile.tasks, signed_estimates(tile, share), strict=True):
                self.tasks[task].signed.append(estimate)
        return {
            task: dot(contribution(self._fit.code(tile, position, merged), merged), tile.task_vectors[position])
            for position, task in enumerate(tile.tasks)
        }

    def _store_part(self, stack: Stack, shared: SharedVector, position: int, projection: float) -> bool:
        """Store one task's codes, or its whole tensor where the fit degenerated; whether it was coded."""
        part = stack.parts[position]
        task = self.tasks[part.expert.task]
        gain, reason = self._gain(position, stack, shared, projection)
        if reason is None:
            reason = self._write_codes(stack, position, shared, gain)
        if reason is not None:
            task.store_private(part.name, reason)
            return False
        task.sign.append(sign_estimate(stack.statistics[position]))
        return True

    def _gain(self, position: int, stack: Stack, shared: SharedVector, projection: float) -> tuple[float, str | None]:
        statistics = stack.statistics[position]
        if projection <= 0:
            return 0.0, "the fit has no part along its task vector"
        exact = self._fit.gain(statistics, projection)
        gain = r13(exact).item()
        fitted = self._fit.fitted_scale(statistics, len(stack.parts))
        if not fitted / _WIDEST_GAIN <= exact <= fitted * _WIDEST_GAIN:
            return gain, f"the fit degenerated (its gain is {exact / fitted:.3g})"
        if not shared.scales_are_in_range(gain):
            return gain, "its scales are beyond what the format holds"
        return gain, None

    def _write_codes(self, stack: Stack, position: int, shared: SharedVector, gain: float) -> str | None:
        """Write one task's codes, rebuild and measure; why it must be private instead, if it must."""
        part = stack.parts[position]
        task = self.tasks[part.expert.task]
        signed = self._method.kind == "signed"
        role = "fields" if signed else "bits"
        payload = task.writer.payload("mask", f"{role}/{part.name}", SIGNED if signed else BITS)
        sums = Sums()
        for span in stack.spans:
            if span.stop > part.numel:
                break
            tile = stack.tile(span, only=position)
            codes = self._fit.code(tile, 0, shared.stored(span))
            payload.append(codes.numpy())
            step = _rebuild(stack, part, span, shared.delta(span, codes, gain))
            if not torch.isfinite(step).all():
                payload.discard()
                return f"its reconstruction overflows {part.spec.dtype}"
            vector = tile.task_vectors[0]
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


def _rebuild(stack: Stack, part: Part, span: Span, delta: Tensor) -> Tensor:
    """What a reader gets, less the base: float64, after the final rounding."""
    base = stack.base.read(stack.name, span.start, span.stop)
    total = base.double() + delta.double() if base.dtype is torch.float64 else base.float() + delta
    dtype = result_dtype(part)
    return torch.where(delta == 0, cast(base, dtype), cast(total, dtype)).double() - base.double()
