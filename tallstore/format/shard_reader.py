"""Reads shards: single chunks, checked and decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from tallstore import forking
from tallstore.errors import FormatError, IntegrityError
from tallstore.format import bits, codecs, layout
from tallstore.format.bits import Bytes
from tallstore.format.codecs import Codec
from tallstore.format.dtypes import CHUNK_NUMEL, chunk_count, chunk_span
from tallstore.format.encodings import POOL, Encoding
from tallstore.format.manifest import MAX_RECORDS, Payload, Pool, Shard
from tallstore.format.safetensors_header import LENGTH_NBYTES, Header, HeaderProblem, header_nbytes, parse_header
from tallstore.format.shards import (
    ALIGNMENT,
    INDEX_KEY,
    METADATA_KEY,
    POOL_ALIGNMENT,
    POOL_KEY,
    RECORD_NBYTES,
    largest_stored,
    padded,
)

_CHANGED = "changed since it was written; fetch the file again"

Verify = Literal["first-read", "never", "always"]


class RangeFile(Protocol):
    """A file of which ranges are read, by several threads.

    Attributes:
        where: what messages call it.
        nbytes: its size.
    """

    where: str
    nbytes: int

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop), in memory of their own."""

    def expect(self, start: int, stop: int) -> None:
        """Bytes [start, stop) are about to be read, by and by: a file that is far away has them come now."""

    def version(self) -> Hashable:
        """What is another one after somebody wrote to the file."""

    def close(self) -> None:
        """Give back what is held."""


class LocalFile:
    """Ranges of a file on disk, and a count of the bytes that were read."""

    def __init__(self, path: Path, where: str, tell: Callable[[int], object] | None = None) -> None:
        """Open it.

        Args:
            path: the file.
            where: what messages call it.
            tell: is told the bytes of each read, by whatever thread reads.

        Raises:
            FormatError: FILE-4, the system cannot read it.
            FileNotFoundError, NotADirectoryError: it is not there.
        """
        self.where, self._tell = where, tell
        with layout.readable(where):
            self._file = path.open("rb", buffering=0)
            self.nbytes = os.fstat(self._file.fileno()).st_size
        self.nbytes_read = 0
        self._lock = forking.lock()

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop), in memory of their own.

        Raises:
            IntegrityError: ST-2, the file is shorter.
            FormatError: FILE-4, the system cannot read it.
        """
        buffer = np.empty(stop - start, np.uint8)
        done = 0
        while done < buffer.size:
            try:
                count = self._read_at(start + done, buffer[done:].data)
            except OSError as error:
                raise layout.unreadable(self.where, error) from None
            if not count:
                raise IntegrityError("ST-2", self.where, f"ends at byte {start + done}, before byte {stop}")
            done += count
        with self._lock:
            self.nbytes_read += done
        if self._tell is not None:
            self._tell(done)
        return buffer

    def _read_at(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):  # a forked process shares the file's position, so none is kept
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer)

    def expect(self, start: int, stop: int) -> None:
        """As `RangeFile.expect`: they are here."""

    def version(self) -> Hashable:
        """Size and times of change: one of the two times cannot be set back."""
        with layout.readable(self.where):
            status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def close(self) -> None:
        """Give the file handle back."""
        self._file.close()


@dataclass(frozen=True)
class PayloadReader:
    """The chunks of one payload, checked and decoded one at a time.

    Attributes:
        numel: elements of the whole payload.
        encoding: what the decoded bytes mean.
    """

    numel: int
    encoding: Encoding
    where: str
    _fetch: Callable[[int], Bytes]
    _ranks: Callable[[], Sequence[int]] | None = None  # a chunk each, and behind them how many bits are set in all

    def chunk(self, index: int) -> Bytes:
        """Decoded bytes of chunk *index*.

        Raises:
            IntegrityError: IDX-3, the stored bytes are not the ones that were written.
            FormatError: COD-1 to COD-5, or a content rule of the encoding; IDX-5 or TAB-9, bits of a sparse tensor are
                not as many as its ranks say.
        """
        start, stop = chunk_span(self.numel, index)
        decoded = self._fetch(index)
        self.encoding.check(decoded, stop - start, f"{self.where}, chunk {index}")
        if self._ranks is not None:
            self._check_set_count(decoded, index, self._ranks())
        return decoded

    def rank(self, index: int) -> int:
        """How many bits of a sparse tensor are set in the chunks before *index*.

        Raises:
            FormatError: as `chunk`; the pool was read to count them.
        """
        if self._ranks is None:
            raise AssertionError("only the bits of sparse tensors are counted")
        return self._ranks()[index]

    def _check_set_count(self, decoded: Bytes, index: int, ranks: Sequence[int]) -> None:
        found, due = bits.set_count(decoded), ranks[index + 1] - ranks[index]
        if found != due:
            is_last = index + 2 == len(ranks)
            problem = f"has {found} bits set, {'the count' if is_last else 'the next rank'} leaves {due} for it"
            raise FormatError("TAB-9" if is_last else "IDX-5", f"{self.where}, chunk {index}", problem)

    def all(self) -> Bytes:
        """Decoded bytes of every chunk together; for small payloads."""
        if 0 < self.numel <= CHUNK_NUMEL:
            return self.chunk(0)
        chunks = [self.chunk(index) for index in range(chunk_count(self.numel))]
        return np.concatenate(chunks) if chunks else np.empty(0, np.uint8)


class ShardReader:
    """One shard of a bundle, opened.

    Header and index are read and checked, payloads are not touched until they are asked for. Threads may share it.
    """

    def __init__(self, file: RangeFile, shard: Shard, verify: Verify = "first-read") -> None:
        """Read and check the header and the index.

        Raises:
            FormatError: ST-1 to ST-5, IDX-1.
        """
        self.where = file.where
        self._file, self._shard, self._verify = file, shard, verify
        self.header = _read_header(file, shard.header_xxh3)
        self._ends, self._digests = self._read_index()
        self._verified = file.version(), bytearray(len(self._ends))  # of which version of the file
        self._pool_is_checked = False
        self._last_pool_chunk: tuple[int, Bytes] | None = None  # members of one pool are read one after the other

    @property
    def record_count(self) -> int:
        """Records of the index."""
        return len(self._ends)

    @property
    def keys(self) -> set[str]:
        """Keys of the payloads, the pool's included."""
        return self.header.tensors.keys() - {INDEX_KEY}

    def payload(
        self, key: str, payload: Payload, encoding: Encoding, numel: int, set_count: int | None = None
    ) -> PayloadReader:
        """The payload at *payload* in this shard, of *numel* elements.

        Args:
            key: its name.
            payload: where it is.
            encoding: what its bytes mean.
            numel: how many elements it has.
            set_count: how many bits are set, for those of a sparse tensor: its records have ranks.

        Raises:
            FormatError: ST-6, IDX-2, IDX-5, COD-4, TAB-6: the shard has no such payload.
        """
        where = f"{self.where}, {key!r}"
        if payload.codec == "pooled":
            return self._pooled(payload.at, encoding, numel, where, set_count)
        if payload.codec == "planes-zstd" and not encoding.is_float:
            raise FormatError("COD-4", where, f"planes-zstd is for floating-point payloads, not for {encoding.name}")
        reader = self._stored(key, payload.codec, payload.at, encoding, numel, set_count=set_count)
        entry = self.header.tensors[key]
        self._file.expect(entry.start, entry.stop)
        return reader

    def _stored(
        self, key: str, codec: Codec, at: int, encoding: Encoding, numel: int, *, set_count: int | None = None
    ) -> PayloadReader:
        where = f"{self.where}, {key!r}"
        entry = self.header.tensors.get(key)
        if entry is None:
            raise FormatError("ST-6", where, "is not in the shard")
        count = chunk_count(numel)
        if at + count > self.record_count:
            raise FormatError(
                "IDX-2", where, f"takes index records {at} to {at + count - 1}, there are {self.record_count}"
            )
        ends = self._ends[at : at + count].tolist()
        ascending = all(before < after for before, after in zip([0, *ends], ends, strict=False))
        if not ascending or padded(ends[-1] if ends else 0) != entry.stop - entry.start:
            raise FormatError("IDX-2", where, "its index records do not add up to its bytes")
        starts = [0, *ends]
        for index in range(count):
            first, last = chunk_span(numel, index)
            if ends[index] - starts[index] > largest_stored(encoding.nbytes(last - first)):
                raise FormatError(
                    "IDX-2", f"{where}, chunk {index}", "its index record gives it more bytes than it needs"
                )
        ranks: list[int] = self._ranks[at : at + count].tolist()
        if set_count is not None:
            ranks.append(set_count)
            _check_ranks(ranks, where)
        elif any(ranks):
            raise FormatError("IDX-5", where, "its index records count bits, which only those of sparse tensors do")

        def fetch(index: int) -> Bytes:
            return self._decoded(key, codec, at, encoding, numel, index)

        return PayloadReader(numel, encoding, where, fetch, None if set_count is None else lambda: ranks)

    def _decoded(  # noqa: PLR0917 - what `_stored` was given, and which chunk
        self, key: str, codec: Codec, at: int, encoding: Encoding, numel: int, index: int
    ) -> Bytes:
        """Chunk *index* of a payload whose records were checked."""
        start, record = self.header.tensors[key].start, at + index
        begin = start + (int(self._ends[record - 1]) if index else 0)
        first, last = chunk_span(numel, index)
        place = f"{self.where}, {key!r}, chunk {index}"
        stored = self._read_chunk(record, begin, start + int(self._ends[record]), place)
        return codecs.decode(codec, stored, encoding.nbytes(last - first), encoding.itemsize, place)

    def _pooled(self, at: int, encoding: Encoding, numel: int, where: str, set_count: int | None) -> PayloadReader:
        nbytes = encoding.nbytes(numel)
        pool = self._shard.pool
        if at % POOL_ALIGNMENT or at + nbytes > (pool.nbytes if pool else 0):
            problem = f"bytes {at} to {at + nbytes} are not in the shard's pool, or not aligned"
            raise FormatError("TAB-6", where, problem)

        def fetch(index: int) -> Bytes:
            first, last = chunk_span(numel, index)
            start = at + encoding.nbytes(first)
            return self.pool_bytes(start, start + encoding.nbytes(last - first))

        if set_count is None:
            return PayloadReader(numel, encoding, where, fetch)

        @cache
        def counted() -> Sequence[int]:
            counts = [bits.set_count(fetch(index)) for index in range(chunk_count(numel) - 1)]
            return [0, *accumulate(counts), set_count]

        return PayloadReader(numel, encoding, where, fetch, counted)

    def padding(self, key: str, last_record: int) -> Bytes:
        """The bytes behind the last chunk of the payload *key*, up to its boundary; *last_record* is that chunk's."""
        entry = self.header.tensors[key]
        return self._file.read(entry.start + int(self._ends[last_record]), entry.stop)

    def pool_bytes(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of the decoded pool, in memory of their own; reads the chunks that they lie in."""
        pool = self._shard.pool
        if pool is None:
            raise FormatError("TAB-6", self.where, "has no pool")
        first, last = start // CHUNK_NUMEL, -(-stop // CHUNK_NUMEL)
        pieces = [np.empty(0, np.uint8)]
        for index in range(first, last):
            begin = index * CHUNK_NUMEL
            pieces.append(self._pool_chunk(pool, index)[max(0, start - begin) : stop - begin])
        return np.concatenate(pieces)

    def _pool_chunk(self, pool: Pool, index: int) -> Bytes:
        last = self._last_pool_chunk  # another thread may put its own there at any moment
        if last is None or last[0] != index or self._verify == "always":
            if not self._pool_is_checked:  # all its records: not again for each of its many payloads
                self._stored(POOL_KEY, pool.codec, pool.at, POOL, pool.nbytes)
                self._pool_is_checked = True
            last = self._last_pool_chunk = (
                index,
                self._decoded(POOL_KEY, pool.codec, pool.at, POOL, pool.nbytes, index),
            )
        return last[1]

    def _read_chunk(self, record: int, start: int, stop: int, where: str) -> Bytes:
        if self._verify == "never":
            return self._file.read(start, stop)
        verified = self._verified_now()
        stored = self._file.read(start, stop)
        if self._verify == "always" or not verified[record] or self._verified_now() is not verified:
            if xxhash.xxh3_128_digest(stored.data) != self._digests[record].tobytes():
                raise IntegrityError("IDX-3", where, f"its bytes {_CHANGED}")
            verified[record] = 1
        return stored

    def _verified_now(self) -> bytearray:
        """Which chunks were verified since somebody last wrote to the file."""
        version, (known, verified) = self._file.version(), self._verified
        if version != known:
            verified = bytearray(len(self._ends))
            self._verified = version, verified
        return verified

    def _read_index(self) -> tuple[NDArray[np.uint64], Bytes]:
        entry = self.header.tensors.get(INDEX_KEY)
        if entry is None or entry.shape != ((entry.stop - entry.start) // RECORD_NBYTES, RECORD_NBYTES):
            raise FormatError("IDX-1", self.where, f"has no index of {RECORD_NBYTES}-byte records")
        if entry.stop != self._file.nbytes:
            raise FormatError("IDX-1", self.where, "its index is not the last tensor")
        if entry.shape[0] > MAX_RECORDS:
            raise FormatError("LIM-1", self.where, f"its index has more than {MAX_RECORDS} records")
        raw = self._file.read(entry.start, entry.stop)
        if xxhash.xxh3_128_hexdigest(raw.data) != self._shard.index_xxh3:
            raise IntegrityError("IDX-1", self.where, f"its index {_CHANGED}")
        records = raw.reshape(-1, RECORD_NBYTES)
        numbers = np.ascontiguousarray(records[:, 16:]).view("<u8")
        self._ranks = numbers[:, 1]
        return numbers[:, 0].astype(np.uint64), np.ascontiguousarray(records[:, :16])


def _check_ranks(ranks: Sequence[int], where: str) -> None:
    """IDX-5, as far as the records tell; behind *ranks* is the count, which is checked with the last chunk (TAB-9)."""
    too_many = any(after - before > CHUNK_NUMEL for before, after in pairwise(ranks[:-1]))
    if ranks[0] != 0 or too_many or any(after < before for before, after in pairwise(ranks)):
        raise FormatError("IDX-5", where, "the ranks of its index records do not count up from 0 to its count")


def _read_header(file: RangeFile, expected: str) -> Header:
    try:
        nbytes = header_nbytes(file.read(0, min(LENGTH_NBYTES, file.nbytes)).tobytes(), file.nbytes)
        raw = file.read(0, nbytes).tobytes()
        if xxhash.xxh3_128_hexdigest(raw) != expected:
            raise IntegrityError("ST-5", file.where, f"its header {_CHANGED}")
        header = parse_header(raw, file.nbytes)
    except HeaderProblem as error:
        raise FormatError(error.rule, file.where, error.problem) from None
    if set(header.metadata) != {METADATA_KEY}:
        raise FormatError("ST-4", file.where, f"its __metadata__ is not the one key {METADATA_KEY!r}")
    for key, entry in header.tensors.items():
        if entry.dtype != "U8" or (key != INDEX_KEY and len(entry.shape) != 1) or entry.start % ALIGNMENT:
            raise FormatError("ST-3", file.where, f"{key!r} is not a U8 payload on a {ALIGNMENT}-byte boundary")
    return header
