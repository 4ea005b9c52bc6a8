"""Everything that can be wrong with the shards of one owner, a group or a task, found chunk by chunk.

As in `tables`, every ``check_…`` is a generator of problems; here they read files, one chunk at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np

from tallstore import layout
from tallstore.dtypes import CHUNK_NUMEL, chunk_count, chunk_span
from tallstore.encodings import POOL
from tallstore.errors import FormatError
from tallstore.manifest import (
    BaseTensor,
    ExtendedTensor,
    MaskTensor,
    Payload,
    Pool,
    SameCode,
    ScaledCode,
    Shard,
    SignedTensor,
    TaskTable,
    Vector,
)
from tallstore.payloads import (
    BaseTensors,
    Shape,
    Stored,
    Vectors,
    gains_of,
    leading_shape,
    row_count,
    vector_step_of,
)
from tallstore.r13 import in_range, row_scales
from tallstore.shards import POOL_KEY, LocalFile, PayloadReader, ShardReader

Problems = Iterator[FormatError]
Result = TypeVar("Result")

_MAX_OPEN_SHARDS = 8
# What `tables` has reported already, before any file was opened.
_RULES_OF_TABLES = frozenset({"TAB-6", "COD-4"})


def attempt(where: str, action: Callable[[], Result]) -> Generator[FormatError, None, Result | None]:
    """What *action* returns; where it is refused or the system cannot read, that is the problem, and the result None."""
    try:
        return action()
    except FormatError as error:
        yield error
    except OSError as error:
        yield FormatError("FILE-4", where, f"cannot be read ({error.strerror})")
    return None


class OwnersShards:
    """The shards of a group or a task that are here, opened when they are needed, and only a few at a time."""

    def __init__(self, directory: str, shards: tuple[Shard, ...], places: Mapping[str, Path]) -> None:
        """Open nothing yet.

        Args:
            directory: of the shards, in the bundle.
            shards: as payloads number them.
            places: the files that are here, by path.
        """
        self.shards = shards
        self.paths = tuple(f"{directory}/{shard.file}" for shard in shards)
        self._places = places
        self._open = OrderedDict[int, tuple[LocalFile, ShardReader]]()

    def is_here(self, number: int) -> bool:
        """Whether the file of a shard is here, and in its place."""
        return self.paths[number] in self._places

    def reader(self, number: int) -> ShardReader:
        """The shard of that number, its header and index checked.

        Raises:
            FormatError: ST-1 to ST-5, IDX-1.
            OSError: it cannot be read.
        """
        if number not in self._open:
            path = self.paths[number]
            file = LocalFile(self._places[path], path)
            try:
                self._open[number] = file, ShardReader(file, self.shards[number])
            except BaseException:
                file.close()
                raise
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
        return self._open[number][1]

    def payload(self, stored: Stored) -> PayloadReader:
        """The chunks of a payload.

        Raises:
            FormatError: as `reader` and `ShardReader.payload`.
            OSError: as `reader`.
        """
        reader = self.reader(stored.payload.shard)
        return reader.payload(stored.key, stored.payload, stored.encoding, stored.numel)

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.popitem()[1][0].close()


# --- shards -----------------------------------------------------------------------------------------------------------


def check_shards(shards: OwnersShards, payloads: Iterable[Stored] | None) -> Problems:
    """ST, IDX and COD rules, and those of the payloads' contents.

    Reads every byte of the shards that are here; holds one chunk at a time, and one of the pool.

    Args:
        shards: the owner's.
        payloads: all that the owner's table refers to; None where they are not known: headers and indexes only then.
    """
    members = defaultdict[int, list[Stored]](list)
    for stored in payloads or ():
        members[stored.payload.shard].append(stored)
    for number, shard in enumerate(shards.shards):
        if not shards.is_here(number):
            continue
        opening = attempt(shards.paths[number], lambda number=number: shards.reader(number))  # type: ignore[misc]
        reader = yield from opening
        if reader is not None and payloads is not None:
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
    """IDX-2: every record belongs to a payload, and they stand in the order of the payloads in the file."""
    spans = [(stored.payload.at, stored.records, stored.key) for stored in members if stored.payload.codec != "pooled"]
    if pool is not None:
        spans.append((pool.at, chunk_count(pool.nbytes), POOL_KEY))
    spans.sort(key=itemgetter(0))
    taken = 0
    for at, records, _ in [*spans, (reader.record_count, 0, "")]:
        if taken < at <= reader.record_count:
            yield FormatError("IDX-2", reader.where, f"index records {taken} to {at - 1} belong to no payload")
        taken = max(taken, at + records)
    entries = reader.header.tensors
    keys = [key for _, records, key in spans if records and key in entries]
    for before, after in zip(keys, keys[1:], strict=False):
        if entries[before].start > entries[after].start:
            problem = f"the index records of {before!r} stand before those of {after!r}, and its bytes behind"
            yield FormatError("IDX-2", reader.where, problem)


def _check_members(reader: ShardReader, members: list[Stored]) -> Problems:
    for stored in sorted(members, key=attrgetter("payload.at")):  # the pool is read from its beginning to its end
        payload = None
        for problem in (opening := _Returning(attempt(reader.where, lambda stored=stored: _open(reader, stored)))):  # type: ignore[misc]
            if problem.rule not in _RULES_OF_TABLES:
                yield problem
        payload = opening.result
        if payload is not None:
            yield from _check_chunks(payload)
            if stored.records:
                yield from _check_padding(reader, stored.key, stored.payload.at + stored.records - 1)
