"""One tensor of the base under the tensors that the experts made of it, streamed in tiles of whole rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tallstore.checkpoints import Checkpoint
from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.errors import NonFiniteError
from tallstore.fit import TaskStatistics, Tile, row_sums
from tallstore.format.dtypes import CHUNK_NUMEL, CODED, TensorSpec
from tallstore.format.r13 import r13
from tallstore.loading.decode import copy_cast
from tallstore.packing.plan import Part

_TILE_NUMEL = 1 << 20  # elements of a tile, over all its tasks: what stays in a processor's cache
_SMALLEST_TILE_NUMEL = 1 << 15
_SHORTEST_ROW = 64  # elements; a scale and a step a row would cost a bit a parameter
_LONGEST_WHOLE_ROW = 1 << 22  # longer rows are streamed in pieces
_KEPT_NBYTES = 64 << 20  # task vectors and codes up to this size are kept between passes instead of made again
_FIRST_LOOK_NUMEL = 1 << 10
_EXAMINED_NUMEL = 1 << 18

#: Elements of the base, and of an expert, in a range of one tensor.
_Read = Callable[[int, int], tuple[Tensor, Tensor]]


def is_merged(given: Checkpoint, base: Checkpoint, name: str) -> bool:
    """Whether a merged model has the base's tensor *name*, in its shape and as floats."""
    if name not in given.names:
        return False
    spec = given.spec(name)
    return spec.dtype in CODED and spec.shape == base.spec(name).shape


def task_vector(base: Tensor, finetuned: Tensor, out: Tensor | None = None) -> Tensor:
    """Finetuned - base in float32; float64 where one of them is, then rounded once. 1-D, of equal length.

    Written to *out* where that is given.
    """
    if torch.float64 in (base.dtype, finetuned.dtype):
        difference = (finetuned.double() - base.double()).float()
        return difference if out is None else out.copy_(difference)
    return torch.sub(finetuned.float(), base.float(), out=out)


@dataclass(frozen=True)
class Examined:
    """What one pass over a part found.

    Attributes:
        is_same: the leading rows are the base's, bit for bit (after the cast to the expert's dtype).
        statistics: of the task vector; None where it is the same, or may not be coded.
        task_vector: the whole of it, where it was kept: float32, 1-D.
        codes: room for those of all elements, where there is some: uint8, 1-D.
    """

    part: Part
    is_same: bool = False
    statistics: TaskStatistics | None = None
    task_vector: Tensor | None = None
    codes: Tensor | None = None


@dataclass(frozen=True)
class Room:
    """Where what is computed of one part may be kept; None where there is no room for it.

    Attributes:
        task_vector: float32, 1-D, of the part's length.
        codes: uint8, likewise.
    """

    task_vector: Tensor | None = None
    codes: Tensor | None = None


class Kept:
    """Memory for the task vectors and codes of one tensor after the other, where they are small enough to be kept.

    It is allocated once, and used again: new memory would cost more than reading the inputs again.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")

    def rooms(self, numels: Sequence[int]) -> list[Room]:
        """Room for each of *numels*, in the memory that the last call gave."""
        total = sum(numels)
        vectors = total if total * 5 <= _KEPT_NBYTES else 0
        codes = total if total <= _KEPT_NBYTES else 0  # a byte each, and more work to make again
        needed = vectors + -(-codes // 4)
        if needed > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.float32, device="cpu")  # never both
            self._memory = torch.empty(needed, dtype=torch.float32, device="cpu")
        behind = self._memory[vectors:].view(torch.uint8)
        return [
            Room(
                self._memory[stop - numel : stop] if vectors else None,
                behind[stop - numel : stop] if codes else None,
            )
            for numel, stop in zip(numels, itertools.accumulate(numels), strict=True)
        ]


def examine(base: Checkpoint, base_name: str, part: Part, room: Room | None = None) -> Examined:
    """Compare a part with the base, and sum up its task vector if it can be coded; keep it if *room* has some for it.

    Raises:
        NonFiniteError: it would be coded, and has NaN or infinity.
    """

    @functools.lru_cache(maxsize=1)  # what was looked at first is most often all there is
    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return base.read(base_name, start, stop), part.expert.checkpoint.read(part.name, start, stop)

    if _is_same(part, read):
        return Examined(part, is_same=True)
    if part.whole_because is not None:
        return Examined(part)
    rows, _ = rows_of(base.spec(base_name))
    row_length = base.spec(base_name).numel // rows
    rows = max(1, part.numel // row_length)  # a cut vector of one dimension is part of a row
    squares = torch.zeros(rows, dtype=torch.float64, device="cpu")
    magnitudes = torch.zeros_like(squares)
    kept, codes = (None, None) if room is None else (room.task_vector, room.codes)
    for start, stop in row_pieces(part.numel, row_length):
        reference, finetuned = read(start, stop)
        # In bits that stay near the cache, of whole rows where rows are no longer than a piece.
        step = max(1, _EXAMINED_NUMEL // row_length) * row_length
        for begin in range(0, stop - start, step):
            end = min(begin + step, stop - start)
            out = None if kept is None else kept[start + begin : start + end]
            vector = task_vector(reference[begin:end], finetuned[begin:end], out)
            first, count = (start + begin) // row_length, max(1, (end - begin) // row_length)
            found_squares, found_magnitudes = row_sums(vector.view(count, -1))
            squares[first : first + count] += found_squares
            magnitudes[first : first + count] += found_magnitudes
        if not torch.isfinite(squares).all():
            _refuse_non_finite(part, reference, finetuned, start)
            return Examined(replace(part, whole_because="its task vector is beyond float32"))
    return Examined(part, statistics=TaskStatistics(part.numel, squares, magnitudes), task_vector=kept, codes=codes)


def unfit(base: Checkpoint, base_name: str, found: Examined) -> str | None:
    """Why what may be coded had better not be; None where it may."""
    statistics = found.statistics
    if statistics is None:
        return None
    if not r13(statistics.rms).item():
        return "its task vector is too small for a scale"
    if not found.part.is_resized:
        return None
    norm = 0.0
    for start in range(0, found.part.numel, CHUNK_NUMEL):
        rows = base.read(base_name, start, min(start + CHUNK_NUMEL, found.part.numel))
        norm += torch.linalg.vector_norm(rows, dtype=torch.float64).item() ** 2
    # A head with another number of classes, most often.
    return "its rows are not a resizing of the base's" if statistics.sum_squares >= norm else None


def coded_stack(
    base: Checkpoint, base_name: str, parts: Sequence[Part], given: Checkpoint | None = None
) -> Stack | None:
    """The parts of one base tensor that can be coded, as a stack; None where there are none."""
    found = [examine(base, base_name, part) for part in parts]
    coded = [one for one in found if one.statistics is not None and unfit(base, base_name, one) is None]
    return Stack(base, base_name, coded, given) if coded else None


def rows_of(spec: TensorSpec) -> tuple[int, int]:
    """How many rows a coded tensor has, and over how many axes (REC-7).

    Rows run over the first dimension; short ones, as of depthwise convolutions, are not worth a number each.
    """
    if len(spec.shape) <= 1:
        return 1, 1
    return (spec.shape[0], 1) if spec.numel // spec.shape[0] >= _SHORTEST_ROW else (1, 0)


def row_pieces(numel: int, row_length: int) -> Iterator[tuple[int, int]]:
    """[0, numel) in pieces of about a chunk: of whole rows, or of parts of one row where rows are longer."""
    start = 0
    while start < numel:
        if row_length <= CHUNK_NUMEL:
            stop = start + CHUNK_NUMEL // row_length * row_length
        else:
            stop = min(start + CHUNK_NUMEL, (start // row_length + 1) * row_length)
        yield start, min(stop, numel)
        start = stop


def trimmable_chunks(base: Checkpoint, base_name: str, part: Part) -> Iterator[Tensor]:
    """A part's task vector for a trim over all parameters: float32 and finite, in pieces.

    What is not finite counts as 0: equal infinities, as in the buffers of attention masks, and what will be stored
    whole.
    """
    for start in range(0, part.numel, CHUNK_NUMEL):
        stop = min(start + CHUNK_NUMEL, part.numel)
        vector = task_vector(base.read(base_name, start, stop), part.expert.checkpoint.read(part.name, start, stop))
        yield torch.nan_to_num_(vector, nan=0.0, posinf=0.0, neginf=0.0)


def _is_same(part: Part, read: _Read) -> bool:
    spec, base_spec = part.spec, part.base_spec
    castable = spec.dtype in CODED and base_spec.dtype in CODED
    if part.is_resized and (part.numel == 0 or part.whole_because is not None):
        return False
    if spec.dtype != base_spec.dtype and not castable:
        return False
    for start in range(0, part.numel, CHUNK_NUMEL):
        theirs, ours = read(start, min(start + CHUNK_NUMEL, part.numel))
        first = 0
        for last in (_FIRST_LOOK_NUMEL, len(ours)):  # most tensors differ early on
            expected = cast(theirs[first:last], ours.dtype)
            # numpy compares bytes many times faster than torch.
            if not np.array_equal(ours[first:last].view(torch.uint8).numpy(), expected.view(torch.uint8).numpy()):
                return False
            first = last
    return True


def cast(elements: Tensor, dtype: torch.dtype) -> Tensor:
    """*elements* in *dtype*, rounded as a reader rounds them."""
    if elements.dtype == dtype:
        return elements
    converted = torch.empty(elements.shape, dtype=dtype, device="cpu")
    copy_cast(converted, elements)
    return converted


def _refuse_non_finite(part: Part, reference: Tensor, finetuned: Tensor, start: int) -> None:
    wrong = torch.nonzero(~(torch.isfinite(finetuned) & torch.isfinite(reference)))
    if len(wrong):
        raise NonFiniteError(
            part.expert.where,
            f"tensor {part.name!r} has NaN or infinity (element {start + int(wrong[0])}, here or in the base); "
            f"keep it whole with private={part.name!r}, or mend the weights",
        )


@dataclass(frozen=True)
class Span:
    """A range of a tensor: whole rows, or a piece of one.

    Attributes:
        start, stop: elements.
        row: the first row.
        rows: how many; 1 for a piece.
    """

    start: int
    stop: int
    row: int
    rows: int


class Stack:
    """The parts of one base tensor that are to be coded, as tiles of task vectors. Several threads may read tiles.

    Attributes:
        parts, statistics: of every part, by position.
        codes: room for those of all elements of each part, uint8; None where there is none.
        spans: the tiles' ranges, in order.
    """

    def __init__(
        self, base: Checkpoint, name: str, examined: Sequence[Examined], given: Checkpoint | None = None
    ) -> None:
        """Stack what was examined; *given* is somebody else's merged model, which has this tensor too."""
        self.base, self.name, self._given = base, name, given
        self.spec: TensorSpec = base.spec(name)
        self.parts = tuple(found.part for found in examined)
        self.statistics = tuple(found.statistics for found in examined if found.statistics is not None)
        self.rows, self.row_axes = rows_of(self.spec)
        self.row_length = self.spec.numel // self.rows
        cuts = sorted({part.numel for part in self.parts} | {self.spec.numel})
        target = max(_SMALLEST_TILE_NUMEL, _TILE_NUMEL // len(self.parts))
        self.rows_are_whole = self.row_length <= _LONGEST_WHOLE_ROW and all(cut % self.row_length == 0 for cut in cuts)
        self.spans = tuple(self._spans(cuts, target))
        self._positions = {part.expert.task: position for position, part in enumerate(self.parts)}
        self._kept = tuple(found.task_vector for found in examined)
        self.codes = tuple(found.codes for found in examined)

    def base_at(self, span: Span) -> Tensor:
        """Elements of the base: 1-D, in its dtype."""
        return self.base.read(self.name, span.start, span.stop)

    def tile(self, span: Span, only: int | None = None) -> Tile:
        """Task vectors of the parts that cover *span*, or *only* of the one at that position, which must cover it.

        None of them may: at the end of a base that every expert cut short.
        """
        covering = [position for position, part in enumerate(self.parts) if span.stop <= part.numel]
        taken = covering if only is None else [only]
        base = functools.cache(functools.partial(self.base_at, span))
        return Tile(
            tasks=tuple(self.parts[position].expert.task for position in taken),
            task_vectors=tuple(self.task_vector(position, span, base) for position in taken),
            statistics=tuple(self.statistics[position] for position in taken),
            shared_by=len(covering),
            first_row=span.row,
            rows=span.rows,
            is_whole=self.rows_are_whole,
            tensor=self.name,
            shape=self.spec.shape,
            start=span.start,
            given=None if self._given is None else self._given_vector(self._given, span, base()),
        )

    def position(self, task: str) -> int:
        """Of the part of *task*."""
        return self._positions[task]

    def rows_of(self, position: int) -> int:
        """Rows of one part."""
        return max(1, self.parts[position].numel // self.row_length)

    def task_vector(self, position: int, span: Span, base: Callable[[], Tensor]) -> Tensor:
        """Of one part that covers *span*, float32; *base* reads that of the span, where it is needed."""
        kept, part = self._kept[position], self.parts[position]
        if kept is not None:
            return kept[span.start : span.stop]
        return task_vector(base(), part.expert.checkpoint.read(part.name, span.start, span.stop))

    def _given_vector(self, given: Checkpoint, span: Span, base: Tensor) -> Tensor:
        vector = task_vector(base, given.read(self.name, span.start, span.stop))
        wrong = torch.nonzero(~torch.isfinite(vector))
        if len(wrong):
            raise NonFiniteError(
                f"merge ({given.where})",
                f"tensor {self.name!r} has NaN or infinity, or is too far from the base (element "
                f"{span.start + int(wrong[0])}); leave it out of the merged model, or mend the weights",
            )
        return vector

    def _spans(self, cuts: Sequence[int], target: int) -> Iterator[Span]:
        start = 0
        step = max(1, target // self.row_length) * self.row_length if self.rows_are_whole else target
        for cut in cuts:
            while start < cut:
                stop = min(start + step, cut)
                if not self.rows_are_whole:
                    stop = min(stop, (start // self.row_length + 1) * self.row_length)
                row = start // self.row_length
                yield Span(start, stop, row, (stop - start) // self.row_length if self.rows_are_whole else 1)
                start = stop


def result_dtype(part: Part) -> torch.dtype:
    """The expert's own dtype, in which its tensor is rebuilt."""
    return TORCH_DTYPES[part.spec.dtype]
