"""Everything that can be wrong with the shards of one owner, a group or a task, found chunk by chunk.

As in `tables`, every ``check_…`` is a generator of problems; here they read files, and hold one chunk at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import pairwise
from operator import attrgetter, itemgetter
from pathlib import Path

import numpy as np

from tallstore.errors import FormatError
from tallstore.format import layout
from tallstore.format.dtypes import CHUNK_NUMEL, chunk_count, chunk_span
from tallstore.format.encodings import POOL
from tallstore.format.manifest import (
    Payload,
    Pool,
    Shard,
    TaskTable,
    Vector,
)
from tallstore.format.payloads import (
    BaseTensors,
    Coded,
    Shape,
    Stored,
    Vectors,
    coded_part,
    gains_of,
    row_count,
    vector_step_of,
)
from tallstore.format.r13 import in_range, row_scales
from tallstore.format.shard_reader import LocalFile, PayloadReader, ShardReader
from tallstore.format.shards import POOL_KEY
from tallstore.verifying.findings import OpenFile, Problems, attempt

_MAX_OPEN_SHARDS = 8
# What the checks of the tables have reported already, before any shard was opened.
_RULES_OF_TABLES = frozenset({"TAB-6", "COD-4"})


class OwnedShards:
    """The shards of a group or a task that are here, opened when they are needed, and only a few at a time."""

    def __init__(
        self,
        directory: str,
        shards: tuple[Shard, ...],
        places: Mapping[str, Path],
        open_file: OpenFile = LocalFile,
    ) -> None:
        """Open nothing yet.

        Args:
            directory: of the shards, in the bundle.
            shards: as payloads number them.
            places: the files that are here, by path.
            open_file: opens one of them.
        """
        self.shards, self._open_file = shards, open_file
        self.paths = tuple(f"{directory}/{shard.file}" for shard in shards)
        self._places = places
        self._open = OrderedDict[int, tuple[LocalFile, ShardReader]]()

    def is_here(self, number: int) -> bool:
        """Whether the file of a shard is in its place."""
        return self.paths[number] in self._places

    def reader(self, number: int) -> ShardReader:
        """A shard that is here, its header and index checked.

        Raises:
            FormatError: ST-1 to ST-5, IDX-1.
            OSError: it cannot be read.
        """
        if number not in self._open:
            path = self.paths[number]
            file = self._open_file(self._places[path], path)
            try:
                self._open[number] = file, ShardReader(file, self.shards[number])
            except BaseException:
                file.close()
                raise
            if len(self._open) > _MAX_OPEN_SHARDS:
                _, (oldest, _) = self._open.popitem(last=False)
                oldest.close()
        return self._open[number][1]

    def payload(self, stored: Stored) -> PayloadReader | None:
        """The chunks of a payload; None where its shard is not here.

        Raises:
            FormatError: as `reader` and `ShardReader.payload`.
            OSError: as `reader`.
        """
        number = stored.payload.shard
        if number >= len(self.shards) or not self.is_here(number):
            return None
        return self.reader(number).payload(stored.key, stored.payload, stored.encoding, stored.numel, stored.set_count)

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            _, (file, _) = self._open.popitem()
            file.close()


# --- shards -----------------------------------------------------------------------------------------------------------


def check_shards(owned: OwnedShards, payloads: Iterable[Stored], *, complete: bool) -> Problems:
    """The rules of shards, indexes and codecs, and those of the payloads' contents.

    Args:
        owned: the shards; those that are not here are passed over.
        payloads: what the owner's table refers to.
        complete: whether *payloads* are all that should be in the shards; False where a table could not be read, or
            not be understood: then nothing in them is called superfluous.
    """
    members = defaultdict[int, list[Stored]](list)
    for stored in payloads:
        members[stored.payload.shard].append(stored)
    seen = set[str]()
    for number, shard in enumerate(owned.shards):
        if not owned.is_here(number) or owned.paths[number] in seen:
            continue
        seen.add(owned.paths[number])
        reader = yield from attempt(owned.paths[number], partial(owned.reader, number))
        if reader is None:
            continue
        if complete:
            yield from _check_keys(reader, members[number], shard.pool)
            yield from _check_records(reader, members[number], shard.pool)
            yield from _check_pool(reader, members[number], shard.pool)
        yield from _check_members(reader, members[number])


def _check_keys(reader: ShardReader, members: list[Stored], pool: Pool | None) -> Problems:
    expected = {stored.key for stored in members if stored.payload.codec != "pooled"}
    if pool is not None:
        expected.add(POOL_KEY)
    for key in sorted(reader.keys - expected):
        yield FormatError("ST-6", reader.where, f"has {key[:200]!r}, which no table refers to")


def _check_records(reader: ShardReader, members: list[Stored], pool: Pool | None) -> Problems:
    """IDX-2: every record belongs to a payload, and payloads stand in the file as their records do in the index."""
    spans = [(stored.payload.at, stored.records, stored.key) for stored in members if stored.records]
    if pool is not None:
        spans.append((pool.at, chunk_count(pool.nbytes), POOL_KEY))
    spans.sort(key=itemgetter(0))
    taken = 0
    for at, records, _ in [*spans, (reader.record_count, 0, "")]:
        if taken < at <= reader.record_count:
            yield FormatError("IDX-2", reader.where, f"its index records {taken} to {at - 1} belong to no payload")
        taken = max(taken, at + records)
    entries = reader.header.tensors
    for before, after in pairwise(key for _, _, key in spans if key in entries):
        if entries[before].start > entries[after].start:
            problem = f"{before[:200]!r} stands behind {after[:200]!r}, its index records stand before"
            yield FormatError("IDX-2", reader.where, problem)


def _check_members(reader: ShardReader, members: list[Stored]) -> Problems:
    for stored in sorted(members, key=attrgetter("payload.at")):  # so that the pool is read from end to end
        try:
            payload = reader.payload(stored.key, stored.payload, stored.encoding, stored.numel, stored.set_count)
        except FormatError as error:
            if error.rule not in _RULES_OF_TABLES:
                yield error
            continue
        for index in range(chunk_count(payload.numel)):
            yield from attempt(reader.where, partial(payload.chunk, index))
        if stored.records:
            yield from _check_padding(reader, stored.key, stored.payload.at + stored.records - 1)


def _check_padding(reader: ShardReader, key: str, last_record: int) -> Problems:
    padding = yield from attempt(reader.where, partial(reader.padding, key, last_record))
    if padding is not None and np.any(padding):
        yield FormatError(
            "IDX-4", f"{reader.where}, {key!r}", "the bytes between its last chunk and its end are not zero"
        )


def _check_pool(reader: ShardReader, members: list[Stored], pool: Pool | None) -> Problems:
    """The pool: its chunks, and the bytes in it that are no member's (IDX-4)."""
    if pool is None:
        return
    where = f"{reader.where}, {POOL_KEY!r}"
    whole = Payload(shard=0, codec=pool.codec, at=pool.at)
    payload = yield from attempt(reader.where, lambda: reader.payload(POOL_KEY, whole, POOL, pool.nbytes))
    if payload is None:
        return
    gaps = _gaps(members, pool.nbytes)
    stops = [stop for _, stop in gaps]
    for index in range(chunk_count(pool.nbytes)):
        chunk = yield from attempt(reader.where, partial(payload.chunk, index))
        begin = index * CHUNK_NUMEL
        for start, stop in gaps[bisect_right(stops, begin) :]:
            if chunk is None or start >= begin + chunk.size:
                break
            if np.any(chunk[max(0, start - begin) : stop - begin]):
                yield FormatError("IDX-4", where, f"bytes {start} to {stop - 1} are no payload's, and not zero")
    if pool.nbytes:
        yield from _check_padding(reader, POOL_KEY, pool.at + chunk_count(pool.nbytes) - 1)


def _gaps(members: list[Stored], nbytes: int) -> list[tuple[int, int]]:
    """Ranges of the pool's bytes that are in no member, ascending."""
    gaps, taken = [], 0
    pooled = [stored for stored in members if stored.payload.codec == "pooled"]
    for stored in sorted(pooled, key=attrgetter("payload.at")):
        if taken < stored.payload.at:
            gaps.append((taken, min(stored.payload.at, nbytes)))
        taken = max(taken, stored.payload.at + stored.encoding.nbytes(stored.numel))
    if taken < nbytes:
        gaps.append((taken, nbytes))
    return gaps


# --- scales -----------------------------------------------------------------------------------------------------------


def check_scales(
    table: TaskTable, base: BaseTensors, vectors: Vectors, owned: OwnedShards, shared: OwnedShards
) -> Problems:
    """NUM-3: no row's gain times its step is above 2^60.

    What has another problem is passed over: it was reported where it is.

    Args:
        table: the task's.
        base: the tensors of base.json.
        vectors: those of the task's group.
        owned: the task's shards.
        shared: the group's shards.
    """
    for coded in filter(None, map(coded_part, table.tensors)):
        gains, source = gains_of(coded), base.get(coded.base_name)
        for role in coded.roles:
            vector = vectors.get((coded.base_name, role))
            if vector is None or source is None or not _rows_agree(coded, vector, source.shape):
                continue
            step = vector_step_of(vector, source.shape)
            try:
                steps = shared.payload(step) if step is not None else None
                by_row = owned.payload(gains) if gains is not None else None
                if steps is not None and _exceeds(coded, by_row, steps, row_count(coded.shape, vector.row_axes)):
                    problem = "a row's gain times its step is above 2^60"
                    where = f"{layout.task_table(table.slug)}, tensor {coded.name[:200]!r}"
                    yield FormatError("NUM-3", where, problem)
            except (FormatError, OSError):
                continue


def _rows_agree(coded: Coded, vector: Vector, whole: Shape) -> bool:
    """Whether the coded rows are the first ones of the base tensor's, and gains and steps count the same rows."""
    shape = coded.shape
    same_axes = coded.code.gains is None or coded.code.row_axes == vector.row_axes
    return same_axes and len(shape) == len(whole) and shape[1:] == whole[1:] and shape[:1] <= whole[:1]


def _exceeds(coded: Coded, gains: PayloadReader | None, steps: PayloadReader, rows: int) -> bool:
    with np.errstate(over="ignore"):
        one = np.array([coded.code.gain or 0.0], np.float32)
    for index in range(chunk_count(rows)):
        first, last = chunk_span(rows, index)
        some = one if gains is None else gains.chunk(index).view("<f4")
        scales = row_scales(some, steps.chunk(index).view("<f4")[: last - first])
        if np.all(in_range(some)) and not np.all(in_range(scales)):
            return True
    return False
