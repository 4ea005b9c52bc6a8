"""Elements of an expert as a device gets them: packed, those of many tensors together, laid out as decoders read them.

A batch is one run of bytes. In it, pieces of one form lie one behind the other in each of the form's regions: all base
elements, all codes, all shared values. A piece begins at a multiple of `BLOCK_NUMEL` elements in each of them: a block
belongs to one piece, no byte to two, and every region is aligned. What is behind a piece's end is never written out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.forking import cached_property
from tallstore.format.bits import Bytes
from tallstore.format.dtypes import CHUNK_NUMEL, Dtype, itemsize
from tallstore.format.encodings import SHARED
from tallstore.format.manifest import SharedDtype
from tallstore.loading.parallel import Job

BLOCK_NUMEL: Final = 1024
"""Elements that a kernel's program decodes; also those that have one rank of a sparse tensor's values."""

COLUMNS: Final = 16
"""Numbers of a piece in the table: address, elements, first block; for each of `SCALED` its first scale's place in
`scales`, how many of the piece's elements that scale is for, and how many each further one; for each of `PLACED` where
the piece begins there, in the region's units."""

BITS: Final[Mapping[int, tuple[Dtype, torch.dtype]]] = {
    1: ("U8", torch.uint8),
    2: ("I16", torch.int16),
    4: ("I32", torch.int32),
    8: ("I64", torch.int64),
}
"""Integers that hold an element's bits, by its bytes: what is copied as such keeps every bit."""

NARROW: Final = frozenset({"F16", "BF16", "F32"})
"""What is summed in float32 and cast between each other; sums in float64, and casts from it, are plain torch's."""

Kind: TypeAlias = Literal["same", "mask", "signed", "two-level", "sign", "sparse", "uniform"]
Scaled: TypeAlias = Literal["values", "values_lo", "centre"]
Region: TypeAlias = Literal["table", "blocks", "scales", "base", "codes", "values", "values_lo", "centre", "ranks"]
Source: TypeAlias = Callable[[], Bytes]

SCALED: Final[tuple[Scaled, ...]] = ("values", "values_lo", "centre")
PLACED: Final[tuple[Region, ...]] = ("base", "values", "values_lo", "centre")
"""Regions that may lie elsewhere, piece by piece: what tasks have in common."""

PLACES: Final = 3 + 3 * len(SCALED)
"""The first of the table's columns for `PLACED`."""

ALIGNMENT: Final = 512
"""Bytes: of the pieces that lie elsewhere."""

_REGIONS: Final[tuple[Region, ...]] = (
    "table", "blocks", "scales", "base", "codes", "values", "values_lo", "centre", "ranks",
)  # fmt: skip
_ALIGNMENT: Final = 128
_JOB_NUMEL: Final = CHUNK_NUMEL // 2  # a job costs about as much as copying a few thousand elements


@dataclass(frozen=True, slots=True)
class Form:
    """What elements are made of and become: what a kernel is compiled for.

    Attributes:
        kind: of the code; "same" are the base's own elements, or any others that are only copied.
        base: of the base's elements.
        result: of the expert's.
        wanted: what those are cast to when they are finished.
        levels: of uniform fields, else 0.
        values: of the merged vector, or of a sparse tensor's own values.
        values_lo: of the vector merged_lo.
        centre: of the centre.
    """

    kind: Kind
    base: Dtype
    result: Dtype
    wanted: Dtype
    levels: int = 0
    values: SharedDtype | None = None
    values_lo: SharedDtype | None = None
    centre: SharedDtype | None = None

    @property
    def code_width(self) -> int:
        """Bits of an element's code; 0 without codes."""
        if self.kind in {"signed", "uniform"}:
            return 4 if self.levels > 4 else 2
        return 0 if self.kind == "same" else 1

    @property
    def widths(self) -> Mapping[Region, int]:
        """Bits an element, by the regions that have something for every element."""
        shared: Mapping[Region, SharedDtype | None] = {
            "values": None if self.kind == "sparse" else self.values,
            "values_lo": self.values_lo,
            "centre": self.centre,
        }
        widths: dict[Region, int] = {name: SHARED[dtype].width for name, dtype in shared.items() if dtype is not None}
        return {"base": 8 * itemsize(self.base), "codes": self.code_width, **widths}

    def unit_nbytes(self, name: Region) -> int:
        """Bytes of what a region's elements are read as: one element, or eight whose fields make up an integer."""
        width = self.widths[name]
        return width if width < 8 else width // 8


@dataclass(frozen=True, slots=True)
class Rows:
    """The scales of the rows that a piece's elements lie in.

    Attributes:
        scales: float32, at least one.
        first: how many of the elements the first one is for.
        length: how many each further one, but for the last; a chunk's number of them, where that is less.
    """

    scales: NDArray[np.float32]
    first: int
    length: int

    @classmethod
    def of(cls, scales: NDArray[np.float32], row_length: int, start: int, count: int) -> Rows:
        """Those of elements [start, start + count) of a tensor whose rows have *row_length* elements.

        Args:
            scales: of all rows, or one for the whole tensor.
            row_length: elements of a row.
            start: in the flat tensor.
            count: of elements, at least one.
        """
        if scales.size == 1:
            return cls(scales, count, count)
        row, inside = divmod(start, row_length)
        first = min(count, row_length - inside)
        last = (start + count - 1) // row_length
        return cls(scales[row : last + 1], first, min(row_length, CHUNK_NUMEL))


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of one tensor, from one chunk.

    Attributes:
        form: theirs.
        destination: [n], on the device, the integers that have the wanted dtype's bits.
        sources: the packed bytes of a region, by its name; each reads and checks when it is called.
        rows: the scales of each of `SCALED` that the form has.
        value_count: values of a sparse tensor among `sources`.
        keys: of sources that other tasks have, too: what one is called wherever it is the same.
    """

    form: Form
    destination: Tensor
    sources: Mapping[Region, Source]
    rows: Mapping[Scaled, Rows]
    value_count: int = 0
    keys: Mapping[Region, Hashable] = field(default_factory=dict)

    @property
    def block_count(self) -> int:
        """Blocks that it takes."""
        return -(-self.destination.numel() // BLOCK_NUMEL)

    def nbytes(self, elsewhere: Container[Hashable] = ()) -> int:
        """About how many bytes it takes of a batch, but for what has its key in *elsewhere*; never less."""
        away = {name for name, key in self.keys.items() if key in elsewhere}
        bits = self.block_count * BLOCK_NUMEL * sum(w for name, w in self.form.widths.items() if name not in away)
        values = 4 * self.value_count + 4 * sum(rows.scales.size for rows in self.rows.values())
        return bits // 8 + values + 8 * COLUMNS + 8 * self.block_count + len(_REGIONS) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Packed:
    """Pieces of one form on the device: what a decoder takes.

    Attributes:
        form: theirs.
        destinations: one a piece, in the order of the table.
        runs: for each of `SCALED`, from which place on a piece's elements may have another scale than those before:
            from every one (1), from every eighth (8), or from none (0).
        regions: uint8 tensors, each aligned and of whole blocks; those that the form has.
        elsewhere: the regions that do not lie there, as one such tensor a piece.
    """

    form: Form
    destinations: Sequence[Tensor]
    runs: Mapping[Scaled, int]
    regions: Mapping[Region, Tensor]
    elsewhere: Mapping[Region, Sequence[Tensor]] = field(default_factory=dict)

    @property
    def block_count(self) -> int:
        """Blocks of all pieces."""
        return self.regions["blocks"].numel() // 4

    @property
    def nbytes(self) -> int:
        """Of the regions that are not elsewhere."""
        return sum(region.nbytes for region in self.regions.values())

    def region(self, name: Region, dtype: torch.dtype) -> Tensor:
        """The elements of a region; of its first piece, where that is elsewhere."""
        found = self.elsewhere[name][0] if name in self.elsewhere else self.regions[name]
        return found.view(dtype)

    def together(self) -> Packed:
        """The same with copies of what is elsewhere: every region is one run of bytes."""
        if not self.elsewhere:
            return self
        copied = {name: torch.cat(list(pieces)) for name, pieces in self.elsewhere.items()}
        return Packed(self.form, self.destinations, self.runs, {**self.regions, **copied})


Decode: TypeAlias = Callable[[Packed], None]
"""Writes every piece of its argument to its destination, by the algebra of the specification; returns at once where the
device works on its own."""


class Batch:
    """Pieces that are brought to a device together.

    Attributes:
        nbytes: of the run of bytes that holds all of it.
    """

    def __init__(self, pieces: Sequence[Piece], elsewhere: Mapping[Hashable, Tensor] | None = None) -> None:
        """Read nothing yet.

        Args:
            pieces: at least one.
            elsewhere: sources that are on the device, by their keys: uint8 [whole blocks], at multiples of `ALIGNMENT`.
        """
        by_form: dict[Form, list[Piece]] = {}
        for piece in pieces:
            by_form.setdefault(piece.form, []).append(piece)
        self.nbytes = 0
        self._groups: list[_Group] = []
        for form, members in by_form.items():
            self._groups.append(_Group(form, members, self.nbytes, elsewhere or {}))
            self.nbytes = self._groups[-1].stop

    def fill(self, host: Bytes) -> Iterator[Job]:
        """Jobs that together write the batch to *host*, uint8 [nbytes]; they read and check what it is made of.

        Raises:
            TallstoreError: by a job, as the sources.
        """
        pending: list[Job] = []
        numel = 0
        for group in self._groups:
            group.write_tables(host)
            for index, piece in enumerate(group.pieces):
                pending.append(partial(group.write_piece, index, host))
                numel += piece.destination.numel()
                if numel >= _JOB_NUMEL:
                    yield partial(_run, pending)
                    pending, numel = [], 0
        if pending:
            yield partial(_run, pending)

    def packed(self, staged: Tensor) -> Iterator[Packed]:
        """The batch in *staged*, uint8 [nbytes], where what `fill` wrote was copied to."""
        return (group.packed(staged) for group in self._groups)


class _Group:
    """Pieces of one form, and where in the batch they lie."""

    def __init__(self, form: Form, pieces: Sequence[Piece], start: int, elsewhere: Mapping[Hashable, Tensor]) -> None:
        self.form, self.pieces = form, pieces
        self.elsewhere: dict[Region, list[Tensor]] = {}
        for name in PLACED:
            if all(piece.keys.get(name) in elsewhere for piece in pieces):
                self.elsewhere[name] = [elsewhere[piece.keys[name]] for piece in pieces]
        self.blocks = _starts([piece.block_count for piece in pieces])
        self.values = _starts([piece.value_count for piece in pieces])
        self.runs = {name: _run_of([piece.rows[name] for piece in pieces if name in piece.rows]) for name in SCALED}
        self.scales = np.concatenate([np.empty(0, np.float32), *(r.scales for p in pieces for r in p.rows.values())])
        self.spans: dict[Region, tuple[int, int]] = {}
        for name in _REGIONS:
            nbytes = self._nbytes(name)
            if nbytes is not None:
                self.spans[name] = start, start + nbytes
                start += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.stop = start

    def write_tables(self, host: Bytes) -> None:
        """What is known before anything is read."""
        table = self._view(host, "table").view(np.int64).reshape(-1, COLUMNS)
        first_scale = 0
        for index, piece in enumerate(self.pieces):
            table[index] = 0
            table[index, :3] = piece.destination.data_ptr(), piece.destination.numel(), self.blocks[index]
            for name, rows in piece.rows.items():
                column = 3 + 3 * SCALED.index(name)
                table[index, column : column + 3] = first_scale, rows.first, rows.length
                first_scale += rows.scales.size
            table[index, PLACES:] = [self._place(name, index) for name in PLACED]
        counts = np.diff(self.blocks)
        self._view(host, "blocks").view(np.int32)[:] = np.repeat(np.arange(len(self.pieces), dtype=np.int32), counts)
        self._view(host, "scales").view(np.float32)[:] = self.scales

    def write_piece(self, index: int, host: Bytes) -> None:
        """Read a piece, and write it to its place in every region."""
        piece, first, last = self.pieces[index], self.blocks[index], self.blocks[index + 1]
        for name, source in piece.sources.items():
            if name in self.elsewhere:
                continue
            view = self._view(host, name)
            if name == "values" and self.form.kind == "sparse":
                width = SHARED[self._values_dtype].itemsize
                view[self.values[index] * width : self.values[index + 1] * width] = source()
                continue
            block_nbytes = BLOCK_NUMEL * self.form.widths[name] // 8
            place = view[first * block_nbytes : last * block_nbytes]
            elements = source()
            place[: elements.size] = elements
            if name == "codes" and self.form.kind == "sparse":
                place[elements.size :] = 0  # behind the end, there are no values that a bit could stand for
                self._view(host, "ranks").view(np.int32)[first:last] = self.values[index] + _ranks(place)

    def packed(self, staged: Tensor) -> Packed:
        """The group in the batch's bytes on the device."""
        regions = {name: staged[start:stop] for name, (start, stop) in self.spans.items()}
        return Packed(self.form, [piece.destination for piece in self.pieces], self.runs, regions, self.elsewhere)

    def _place(self, name: Region, index: int) -> int:
        """Where in a region a piece begins, in units; of what is elsewhere, seen from its first piece."""
        if name not in self.form.widths:
            return 0
        unit = self.form.unit_nbytes(name)
        if name in self.elsewhere:
            first, piece = self.elsewhere[name][0], self.elsewhere[name][index]
            return (piece.data_ptr() - first.data_ptr()) // unit
        return self.blocks[index] * (BLOCK_NUMEL * self.form.widths[name] // 8) // unit

    @cached_property
    def _values_dtype(self) -> SharedDtype:
        if self.form.values is None:
            raise AssertionError("a sparse tensor without a dtype of its values")
        return self.form.values

    def _nbytes(self, name: Region) -> int | None:
        """Of a region; None where the form has none."""
        if name in self.elsewhere:
            return None
        block_count = self.blocks[-1]
        fixed: Mapping[Region, int] = {
            "table": 8 * COLUMNS * len(self.pieces),
            "blocks": 4 * block_count,
            "scales": self.scales.nbytes,
        }
        if name in fixed:
            return fixed[name]
        if self.form.kind == "sparse" and name in {"values", "ranks"}:
            return 4 * block_count if name == "ranks" else self.values[-1] * SHARED[self._values_dtype].itemsize
        width = self.form.widths.get(name)
        return None if not width else block_count * BLOCK_NUMEL * width // 8

    def _view(self, host: Bytes, name: Region) -> Bytes:
        start, stop = self.spans[name]
        return host[start:stop]


def _starts(counts: Sequence[int]) -> list[int]:
    """Where each begins that has so many, and where the last one ends."""
    return [0, *np.cumsum(counts, dtype=np.int64).tolist()]


def _ranks(codes: Bytes) -> NDArray[np.int64]:
    """How many bits are set before each block of whole blocks of bits."""
    words = np.bitwise_count(codes.view(np.uint64)).reshape(-1, BLOCK_NUMEL // 64)
    counts: NDArray[np.int64] = words.sum(axis=1, dtype=np.int64)
    return counts.cumsum() - counts


def _run_of(rows: Sequence[Rows]) -> int:
    """As `Packed.runs` has it."""
    several = [one for one in rows if one.scales.size > 1]
    if not several:
        return 0
    return 8 if all(one.first % 8 == 0 and one.length % 8 == 0 for one in several) else 1


def _run(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job()
