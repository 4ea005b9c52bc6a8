"""One group of tasks, fitted and written: its shared vectors, and each task's codes and private tensors.

For each tensor of the base in turn: compare every expert with it, merge what moved, store the merged vector's codes,
read the masks and gains off the merged vector AS STORED, rebuild, and measure what came of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tallstore.checkpoints import Checkpoint
from tallstore.fit import Fit
from tallstore.format import layout
from tallstore.format import manifest as tables
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import WHOLE
from tallstore.format.manifest import Payload, SharedDtype
from tallstore.format.shard_writer import POOLED_NUMEL, ShardWriter
from tallstore.packing.code_writer import CODES, CodeWriter
from tallstore.packing.fidelity import Estimated, Sums, dot, sign_estimate, signed_estimates
from tallstore.packing.plan import Expert, Part
from tallstore.packing.stack import Examined, Span, Stack, examine, is_merged, unfit
from tallstore.packing.stack_fit import Advance, Scaled, StackFit

_PASSES = 3  # over each part of a tensor: examined, fitted, coded


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


@dataclass(frozen=True)
class CodedTensor:
    """What coding one tensor of one task came to.

    Attributes:
        numel: elements.
        nbytes: of its codes, and of its gains by row and its own values where it has them.
        sums: over the reconstruction, after the final rounding.
    """

    numel: int
    nbytes: int
    sums: Sums


@dataclass
class TaskProgress:
    """What has been written of one task so far."""

    expert: Expert
    slug: str
    writer: ShardWriter
    entries: dict[str, tables.Tensor] = field(default_factory=dict)
    whole: list[StoredWhole] = field(default_factory=list)
    coded: dict[str, CodedTensor] = field(default_factory=dict)
    sign: list[Estimated] = field(default_factory=list)
    signed: list[Estimated] = field(default_factory=list)

    @property
    def sums(self) -> Sums:
        """Over all coded tensors."""
        return sum((tensor.sums for tensor in self.coded.values()), Sums())

    @property
    def coded_nbytes(self) -> int:
        """Of all coded tensors."""
        return sum(tensor.nbytes for tensor in self.coded.values())

    @property
    def coded_numel(self) -> int:
        """Of all coded tensors."""
        return sum(tensor.numel for tensor in self.coded.values())

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
        fits: Callable[[str], tuple[Fit, SharedDtype]],
        factors: Mapping[tuple[str, str], float],
        given: Checkpoint | None,
        compress: bool,
        estimates: bool,
        pool: ThreadPoolExecutor,
    ) -> None:
        """Begin group g0001 in the bundle that is being written at *root*.

        Args:
            base: the base.
            experts: the group's tasks.
            root: the bundle's directory, empty.
            fits: the method at work: by base tensor, what codes it and the dtype of its shared vectors.
            factors: by task and tensor of the expert, what its gains are multiplied by; 1 where there is none.
            given: somebody else's merged model, where the method merges none itself.
            compress: whether payloads are compressed where that makes them smaller; raw if not.
            estimates: whether to estimate what other fits would reach.
            pool: threads to spread tiles and tasks over.
        """
        self._base, self._fits, self._factors, self._given = base, fits, factors, given
        self._root, self._pool, self._estimates = root, pool, estimates
        self.id = "g0001"
        self.writer = ShardWriter(root / layout.group_directory(self.id), compress=compress)
        self.vectors: list[tables.Vector] = []
        self.vector_nbytes: dict[str, int] = {}  # by base tensor
        self.tasks = {
            expert.task: TaskProgress(expert, slug, ShardWriter(root / layout.task_directory(slug), compress=compress))
            for expert, slug in _slugs(experts)
        }
        for directory in (
            layout.group_directory(self.id),
            *(layout.task_directory(t.slug) for t in self.tasks.values()),
        ):
            (root / directory).mkdir(parents=True)

    def pack_tensor(self, base_name: str, parts: Sequence[Part], advance: Advance) -> None:
        """Everything about one base tensor.

        Args:
            base_name: it.
            parts: what the experts made of it.
            advance: is told bytes of *parts* as they come along, at most all of them.
        """

        def advance_pass(nbytes: int) -> None:
            advance(nbytes // _PASSES)

        sort_out = functools.partial(self._sort_out, base_name, advance_pass)
        coded = [found for found in self._pool.map(sort_out, parts) if found]
        if coded and self._given is not None and not is_merged(self._given, self._base, base_name):
            for found in coded:
                self.tasks[found.part.expert.task].store_private(found.part.name, "the merged model does not have it")
        elif coded:
            self._pack_stack(Stack(self._base, base_name, coded, self._given), advance_pass)

    def _sort_out(self, base_name: str, advance: Advance, part: Part) -> Examined | None:
        """Store a part that is not coded; what was found of one that is."""
        found = examine(self._base, base_name, part)
        advance(part.spec.nbytes)
        if found.statistics is None:
            self._store_uncoded(base_name, found)
            return None
        if reason := unfit(self._base, base_name, found):
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

    def _pack_stack(self, stack: Stack, advance: Advance) -> None:
        list(self._pool.map(stack.keep, range(len(stack.parts))))
        fit, dtype = self._fits(stack.name)
        factors = [self._factors.get((part.expert.task, part.name), 1.0) for part in stack.parts]
        fitted = StackFit(stack, fit, dtype, self._root, factors=factors, advance=advance)
        scaled = fitted.run(self._pool.map)
        if self._estimates and fit.kind != "signed":
            self._estimate_signed(stack)
        store = functools.partial(self._store_part, fitted)
        if any(list(self._pool.map(store, range(len(stack.parts)), scaled))):
            written = [vector.write(self.writer) for vector in fitted.shared]
            self.vectors.extend(vector for vector, _ in written)
            self.vector_nbytes[stack.name] = sum(nbytes for _, nbytes in written)

    def _estimate_signed(self, stack: Stack) -> None:
        """What `SignedMask()` would do: one tile in eight stands for the tensor, the first always."""
        share = 1 / -(-len(stack.spans) // 8)

        def estimate(span: Span) -> dict[str, Estimated]:
            tile = stack.tile(span)
            return dict(zip(tile.tasks, signed_estimates(tile, share), strict=True)) if tile.tasks else {}

        for found in self._pool.map(estimate, stack.spans[::8]):
            for task, estimated in found.items():
                self.tasks[task].signed.append(estimated)

    def _store_part(self, fitted: StackFit, position: int, scaled: Scaled) -> bool:
        """Store one task's codes, or its whole tensor where the fit degenerated; whether it was coded."""
        part = fitted.stack.parts[position]
        task = self.tasks[part.expert.task]
        reason = scaled.reason or self._write_codes(fitted, position, scaled)
        if reason is not None:
            task.store_private(part.name, reason)
            return False
        task.sign.append(sign_estimate(fitted.stack.statistics[position]))
        return True

    def _write_codes(self, fitted: StackFit, position: int, scaled: Scaled) -> str | None:
        """Write one task's codes, rebuild and measure; why it must be private instead, if it must."""
        stack = fitted.stack
        part = stack.parts[position]
        task = self.tasks[part.expert.task]
        codes = CodeWriter(task.writer, part.name, scaled, row_axes=stack.row_axes)
        sums = Sums()
        for span in stack.spans:
            if span.stop > part.numel:
                break
            coded, tile = fitted.code(scaled, span, position)
            codes.append(coded)
            step = fitted.rebuild(scaled, span, position, coded)
            if not torch.isfinite(step).all():
                codes.discard()
                return f"its reconstruction overflows {part.spec.dtype}"
            vector = tile.task_vectors[0]
            sums += Sums(dot(step, vector), dot(step, step), dot(vector, vector))
        fields = codes.finish()
        task.coded[part.name] = CodedTensor(part.numel, codes.nbytes, sums)
        code, tensor = CODES[scaled.fit.kind]
        if part.is_resized:
            task.entries[part.name] = self._extended(part, stack.name, code(**fields))
        else:
            task.entries[part.name] = tensor(**_identity(part, stack.name), **fields)
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
