"""One base tensor after the other, fitted and stored: its shared vectors, and each task's codes or whole tensor.

Compare every expert with the base, merge what moved, store the merged vector's codes, read the masks and gains off the
merged vector AS STORED, rebuild, and measure what came of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tallstore.checkpoints import Checkpoint
from tallstore.fit import Fit
from tallstore.format import manifest as tables
from tallstore.format.manifest import SharedDtype
from tallstore.format.shard_writer import PayloadSink
from tallstore.packing.code_writer import CODES, CodeWriter
from tallstore.packing.fidelity import Estimated, Sums, sign_estimate, signed_estimates
from tallstore.packing.plan import Part
from tallstore.packing.stack import Examined, Kept, Room, Span, Stack, examine, is_merged, unfit
from tallstore.packing.stack_fit import Advance, Run, Scaled, StackFit
from tallstore.packing.task_progress import CodedTensor, TaskProgress

_PASSES = 3  # over each part of a tensor: examined, fitted, coded


class TensorPacker:
    """Fits and stores base tensors, one at a time.

    Attributes:
        vectors: the shared ones so far.
        vector_nbytes: what they take, by base tensor.
    """

    def __init__(
        self,
        base: Checkpoint,
        tasks: Mapping[str, TaskProgress],
        writer: PayloadSink,
        directory: Path,
        *,
        factors: Mapping[tuple[str, str], float],
        given: Checkpoint | None,
        estimates: bool,
        run: Run,
    ) -> None:
        """Store nothing yet.

        Args:
            base: the base.
            tasks: by name; what is made of each is added there.
            writer: takes the shared vectors.
            directory: where scratch files may be made.
            factors: by task and tensor of the expert, what its gains are multiplied by; 1 where there is none.
            given: somebody else's merged model, where the method merges none itself.
            estimates: whether to estimate what other fits would reach.
            run: spreads tiles and tasks over threads.
        """
        self._base, self._factors, self._given = base, factors, given
        self._directory, self._estimates, self._run = directory, estimates, run
        self._tasks, self._writer = tasks, writer
        self._kept = Kept()
        self.vectors: list[tables.Vector] = []
        self.vector_nbytes: dict[str, int] = {}

    def pack(self, base_name: str, parts: Sequence[Part], fit: Fit, dtype: SharedDtype, advance: Advance) -> None:
        """Everything about one base tensor.

        Args:
            base_name: it.
            parts: what the experts made of it.
            fit: what codes it.
            dtype: of its shared vectors.
            advance: is told bytes of *parts* as they come along, at most all of them.
        """

        def advance_pass(nbytes: int) -> None:
            advance(nbytes // _PASSES)

        sort_out = functools.partial(self._sort_out, base_name, advance_pass)
        rooms = self._kept.rooms([part.numel if part.whole_because is None else 0 for part in parts])
        coded = [found for found in self._run(sort_out, zip(parts, rooms, strict=True)) if found]
        if coded and self._given is not None and not is_merged(self._given, self._base, base_name):
            for found in coded:
                self._tasks[found.part.expert.task].store_private(found.part.name, "the merged model does not have it")
        elif coded:
            self._pack_stack(Stack(self._base, base_name, coded, self._given), fit, dtype, advance_pass)

    def _sort_out(self, base_name: str, advance: Advance, given: tuple[Part, Room]) -> Examined | None:
        """Store a part that is not coded; what was found of one that is, its task vector kept where there is room."""
        part, room = given
        found = examine(self._base, base_name, part, room)
        advance(part.spec.nbytes)
        if found.statistics is None:
            self._store_uncoded(base_name, found)
            return None
        if reason := unfit(self._base, base_name, found):
            self._tasks[part.expert.task].store_private(part.name, reason)
            return None
        return found

    def _store_uncoded(self, base_name: str, found: Examined) -> None:
        part = found.part
        task = self._tasks[part.expert.task]
        if not found.is_same:
            task.store_private(part.name, part.whole_because or "")
        elif part.is_resized:
            task.entries[part.name] = self._extended(part, base_name, tables.SameCode())
        else:
            task.entries[part.name] = tables.SameTensor(**_identity(part, base_name))

    def _pack_stack(self, stack: Stack, fit: Fit, dtype: SharedDtype, advance: Advance) -> None:
        factors = [self._factors.get((part.expert.task, part.name), 1.0) for part in stack.parts]
        fitted = StackFit(stack, fit, dtype, self._directory, factors=factors, advance=advance)
        scaled = fitted.run(self._run)
        if self._estimates and fit.kind != "signed":
            self._estimate_signed(stack)
        measured: list[Mapping[int, Sums]] = []
        if fitted.keeps_codes:
            measured = list(self._run(functools.partial(self._measure, fitted, scaled), stack.spans))
        store = functools.partial(self._store_part, fitted, measured)
        if any(list(self._run(store, enumerate(scaled)))):
            written = [vector.write(self._writer) for vector in fitted.shared]
            self.vectors.extend(vector for vector, _ in written)
            self.vector_nbytes[stack.name] = sum(nbytes for _, nbytes in written)

    def _measure(self, fitted: StackFit, scaled: Sequence[Scaled], span: Span) -> Mapping[int, Sums]:
        """How near every part that covers *span* comes there, from codes that are at hand."""
        covering = [
            (position, of)
            for position, of in enumerate(scaled)
            if of.reason is None and span.stop <= fitted.stack.parts[position].numel
        ]
        return fitted.measure(span, {position: (of, fitted.code(of, span, position)) for position, of in covering})

    def _estimate_signed(self, stack: Stack) -> None:
        """What `SignedMask()` would do: one tile in eight stands for the tensor, the first always."""
        share = 1 / -(-len(stack.spans) // 8)

        def estimate(span: Span) -> dict[str, Estimated]:
            tile = stack.tile(span)
            return dict(zip(tile.tasks, signed_estimates(tile, share), strict=True)) if tile.tasks else {}

        for found in self._run(estimate, stack.spans[::8]):
            for task, estimated in found.items():
                self._tasks[task].signed.append(estimated)

    def _store_part(self, fitted: StackFit, measured: Sequence[Mapping[int, Sums]], found: tuple[int, Scaled]) -> bool:
        """Store one task's codes, or its whole tensor where the fit degenerated; whether it was coded.

        *measured* has sums by position for every span, where the codes were kept.
        """
        position, scaled = found
        part = fitted.stack.parts[position]
        task = self._tasks[part.expert.task]
        reason = scaled.reason or self._write_codes(fitted, measured, position, scaled)
        if reason is not None:
            task.store_private(part.name, reason, degenerate=True)
            return False
        task.sign.append(sign_estimate(fitted.stack.statistics[position]))
        return True

    def _write_codes(
        self, fitted: StackFit, measured: Sequence[Mapping[int, Sums]], position: int, scaled: Scaled
    ) -> str | None:
        """Write one task's codes, measured or yet to be; why it must be private instead, if it must."""
        stack = fitted.stack
        part = stack.parts[position]
        task = self._tasks[part.expert.task]
        codes = CodeWriter(task.writer, part.name, scaled, row_axes=stack.row_axes)
        sums = Sums()
        for number, span in enumerate(stack.spans):
            if span.stop > part.numel:
                break
            coded = fitted.code(scaled, span, position)
            by_position = measured[number] if measured else fitted.measure(span, {position: (scaled, coded)})
            found = by_position[position]
            if not math.isfinite(found.reconstruction):
                codes.discard()
                return f"its reconstruction overflows {part.spec.dtype}"
            sums += found
            codes.append(coded)
        sums += Sums(task_vector=stack.statistics[position].sum_squares)
        fields = codes.finish()
        task.coded[part.name] = CodedTensor(part.numel, codes.nbytes, sums)
        code, tensor = CODES[scaled.fit.kind]
        if part.is_resized:
            task.entries[part.name] = self._extended(part, stack.name, code(**fields))
        else:
            task.entries[part.name] = tensor(**_identity(part, stack.name), **fields)
        return None

    def _extended(self, part: Part, base_name: str, leading: tables.RowsCode) -> tables.ExtendedTensor:
        task = self._tasks[part.expert.task]
        further = None
        if part.numel < part.spec.numel:
            reason = f"rows from {part.rows}, which the base does not have"
            further = task.store_whole(part.name, reason, part.numel, role="further")
        return tables.ExtendedTensor(**_identity(part, base_name), rows=part.rows, leading=leading, further=further)


def _identity(part: Part, base_name: str) -> dict[str, Any]:
    """The fields that every tensor with a base has."""
    other = None if base_name == part.name else base_name
    return {"name": part.name, "base": other, "dtype": part.spec.dtype, "shape": part.spec.shape}
