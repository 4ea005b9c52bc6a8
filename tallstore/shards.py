"""Shards: safetensors files whose U8 tensors are the payloads of a bundle, with one index of chunk hashes behind them.

`ShardWriter` streams payloads into numbered shards; `ShardReader` reads, checks and decodes single chunks. No tensor is
ever held whole on either side.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from tallstore import bits, codecs, files, layout
from tallstore.bits import Bytes
from tallstore.codecs import Codec
from tallstore.dtypes import CHUNK_NUMEL, chunk_count, chunk_span
from tallstore.encodings import POOL, Encoding
from tallstore.errors import FormatError, IntegrityError
from tallstore.files import Written
from tallstore.manifest import FORMAT_VERSION, Payload, Pool, Shard
from tallstore.safetensors_header import LENGTH_NBYTES, Header, HeaderProblem, header_nbytes, parse_header

ALIGNMENT = 64
RECORD_NBYTES = 32
INDEX_KEY = "index"
POOL_KEY = "pool"
METADATA_KEY = "tallstore"
POOL_ALIGNMENT = 8
POOLED_NUMEL = 4096  # payloads of fewer elements go to the pool
MAX_SHARD_NBYTES = 4 << 30  # a shard takes no further payload beyond this
MAX_SHARD_PAYLOADS = 1 << 15  # nor beyond this: the longest names must leave the header under its limit
WORTHWHILE = 0.97  # coded bytes must be under this share of the raw ones
_TRIAL_CHUNKS = 8  # how many chunks decide whether a payload is worth coding
_CHANGED = "changed since it was written; fetch the file again"

Verify = Literal["first-read", "never", "always"]


def padded(nbytes: int) -> int:
    """*nbytes* rounded up to the alignment of payloads."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class _Body:
    """A shard being written: its payloads stream into a file that gets its header at the end."""

    stem: str
    number: int
    path: Path
    nbytes: int = 0
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)  # key -> start and stop in the data
    records: list[bytes] = field(default_factory=list)
    pool: bytearray = field(default_factory=bytearray)

    @property
    def is_full(self) -> bool:
        """Whether no further payload may begin here."""
        return self.nbytes + len(self.pool) > MAX_SHARD_NBYTES or len(self.tensors) >= MAX_SHARD_PAYLOADS

    def append(self, data: bytes) -> None:
        # Opened for each chunk: a thousand tasks are a thousand shards, more than a process may hold open.
        with self.path.open("ab") as file:
            file.write(data)
        self.nbytes += len(data)


class ShardWriter:
    """Streams the payloads of one owner, a group or a task, into shards in *directory*.

    Payloads of one stem are written one after the other. `finish` writes headers and indexes, and gives what the
    owner's table and the manifest list.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._bodies: list[_Body] = []

    def payload(self, stem: str, key: str, encoding: Encoding, codec: Codec | None = None) -> PayloadWriter:
        """Begin a payload in the current shard of *stem*.

        Args:
            stem: what the shard's file name begins with.
            key: the payload's name in the shard.
            encoding: what its bytes mean.
            codec: how to store it; None takes the smaller, raw unless coding saves 3 %.
        """
        return PayloadWriter(self._body(stem), key, encoding, codec, self._shard_number(stem))

    def whole(self, stem: str, key: str, encoding: Encoding, numel: int, decoded: Bytes) -> Payload:
        """Write a payload that is at hand as decoded bytes: into the pool if it is small."""
        if numel >= POOLED_NUMEL:
            writer = self.payload(stem, key, encoding)
            width = encoding.width
            writer.append(decoded if width >= 8 else bits.unpack(decoded, numel, width))
            return writer.finish()
        body = self._body(stem)
        at = len(body.pool)
        body.pool += decoded.tobytes()
        body.pool += bytes(-len(body.pool) % POOL_ALIGNMENT)
        return Payload(shard=self._shard_number(stem), codec="pooled", at=at)

    def finish(self) -> tuple[tuple[Shard, ...], dict[str, Written]]:
        """Write pools, indexes and headers.

        Returns:
            the shards in the order that payloads number them by, and each file's size and hashes by file name.
        """
        counts: dict[str, int] = {}
        for body in self._bodies:
            counts[body.stem] = max(counts.get(body.stem, 0), body.number)
        shards, written = [], {}
        for body in self._bodies:
            name = layout.shard_name(body.stem, body.number, counts[body.stem])
            shard, file = _finish_body(body, self._directory / name)
            shards.append(shard)
            written[name] = file
        return tuple(shards), written

    def _shard_number(self, stem: str) -> int:
        return max(position for position, body in enumerate(self._bodies) if body.stem == stem)

    def _body(self, stem: str) -> _Body:
        """The shard that the next payload of *stem* goes to."""
        current = [body for body in self._bodies if body.stem == stem]
        if current and not current[-1].is_full:
            return current[-1]
        number = len(current) + 1
        body = _Body(stem, number, self._directory / f"{stem}-{number:05d}.body")
        body.path.touch()
        self._bodies.append(body)
        return body


class PayloadWriter:
    """One payload: elements come in pieces of any size and leave in chunks."""

    def __init__(self, body: _Body, key: str, encoding: Encoding, codec: Codec | None, shard: int) -> None:
        self._body, self._key, self._encoding, self._shard = body, key, encoding, shard
        self._codec = codec
        self._pending: list[Bytes] = []  # decoded chunks that wait for the choice of the codec
        self._buffer = np.empty(CHUNK_NUMEL * encoding.itemsize, np.uint8)
        self._filled = 0
        self._start, self._at, self._end = body.nbytes, len(body.records), 0

    def append(self, units: Bytes) -> None:
        """Add elements: one code a byte for encodings of less than a byte, their bytes for the others."""
        while units.size:
            room = self._buffer.size - self._filled
            piece, units = units[:room], units[room:]
            self._buffer[self._filled : self._filled + piece.size] = piece
            self._filled += piece.size
            if self._filled == self._buffer.size:
                self._close_chunk()

    def finish(self) -> Payload:
        """Write what is left; where the payload is."""
        if self._filled:
            self._close_chunk()
        self._choose_codec()
        self._body.append(bytes(padded(self._end) - self._end))
        self._body.tensors[self._key] = (self._start, self._body.nbytes)
        return Payload(shard=self._shard, codec=self._codec or "raw", at=self._at)

    def discard(self) -> None:
        """Take back everything that was written; nothing may have followed."""
        self._pending, self._filled = [], 0
        os.truncate(self._body.path, self._start)
        self._body.nbytes = self._start
        del self._body.records[self._at :]

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the chunks stored so far."""
        return self._end

    def _close_chunk(self) -> None:
        filled, self._filled = self._buffer[: self._filled], 0
        chunk = bits.pack(filled, self._encoding.width) if self._encoding.width < 8 else filled.copy()
        if self._codec is not None:
            self._store(codecs.encode(self._codec, chunk, self._encoding.itemsize))
            return
        self._pending.append(chunk)
        if len(self._pending) == _TRIAL_CHUNKS:
            self._choose_codec()

    def _choose_codec(self) -> None:
        """Take the smaller codec for the chunks so far, and for all that follow."""
        if self._codec is not None:
            return
        coding: Codec = "planes-zstd" if self._encoding.is_float else "zstd"
        coded = [codecs.encode(coding, chunk, self._encoding.itemsize) for chunk in self._pending]
        raw = [chunk.tobytes() for chunk in self._pending]
        worthwhile = sum(map(len, coded)) < WORTHWHILE * sum(map(len, raw))
        self._codec = coding if worthwhile else "raw"
        for stored in coded if worthwhile else raw:
            self._store(stored)
        self._pending = []

    def _store(self, stored: bytes) -> None:
        self._body.append(stored)
        self._end += len(stored)
        rank = 0  # only payloads of `sparse` tensors count
        self._body.records.append(
            xxhash.xxh3_128_digest(stored) + self._end.to_bytes(8, "little") + rank.to_bytes(8, "little")
        )


def _finish_body(body: _Body, path: Path) -> tuple[Shard, Written]:
    pool = None
    if body.pool:
        writer = PayloadWriter(body, POOL_KEY, POOL, None, 0)
        writer.append(np.frombuffer(bytes(body.pool), np.uint8))
        placed = writer.finish()
        pool = Pool(nbytes=len(body.pool), codec="zstd" if placed.codec == "zstd" else "raw", at=placed.at)
    index = b"".join(body.records)
    entries: dict[str, object] = {"__metadata__": {METADATA_KEY: FORMAT_VERSION}}
    for key, (start, stop) in body.tensors.items():
        entries[key] = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
    stop = body.nbytes + len(index)
    entries[INDEX_KEY] = {
        "dtype": "U8",
        "shape": [len(body.records), RECORD_NBYTES],
        "data_offsets": [body.nbytes, stop],
    }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (padded(LENGTH_NBYTES + len(text)) - LENGTH_NBYTES - len(text))
    header = len(text).to_bytes(LENGTH_NBYTES, "little") + text
    written = files.write_file(path, header, body.path, index)
    body.path.unlink()
    shard = Shard(
        file=path.name,
        header_xxh3=xxhash.xxh3_128_hexdigest(header),
        index_xxh3=xxhash.xxh3_128_hexdigest(index),
        pool=pool,
    )
    return shard, written


# --- reading ----------------------------------------------------------------------------------------------------------


class LocalFile:
    """Ranges of a file on disk, and a count of the bytes that were read."""

    def __init__(self, path: Path, where: str) -> None:
        self.where = where
        self._file = path.open("rb", buffering=0)
        self.nbytes = os.fstat(self._file.fileno()).st_size
        self.nbytes_read = 0
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop), in memory of their own.

        Raises:
            IntegrityError: ST-2, the file is shorter.
        """
        buffer = np.empty(stop - start, np.uint8)
        done = 0
        while done < buffer.size:
            count = self._read_at(start + done, buffer[done:].data)
            if not count:
                raise IntegrityError("ST-2", self.where, f"ends at byte {start + done}, before byte {stop}")
            done += count
        with self._lock:
            self.nbytes_read += done
        return buffer

    def _read_at(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):  # a forked process shares the file's position, so none is kept
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer)

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

    def chunk(self, index: int) -> Bytes:
        """Decoded bytes of chunk *index*.

        Raises:
            IntegrityError: IDX-3, the stored bytes are not the ones that were written.
            FormatError: COD-1 to COD-5, or a content rule of the encoding.
        """
        start, stop = chunk_span(self.numel, index)
        decoded = self._fetch(index)
        self.encoding.check(decoded, stop - start, f"{self.where}, chunk {index}")
        return decoded

    def all(self) -> Bytes:
        """Decoded bytes of every chunk together; for small payloads."""
        chunks = [self.chunk(index) for index in range(chunk_count(self.numel))]
        return np.concatenate(chunks) if chunks else np.empty(0, np.uint8)


class ShardReader:
    """One shard of a bundle, opened.

    Header and index are read and checked, payloads are not touched until they are asked for. Threads may share it.
    """

    def __init__(self, file: LocalFile, shard: Shard, verify: Verify = "first-read") -> None:
        """Read and check the header and the index.

        Raises:
            FormatError: ST-1 to ST-5, IDX-1.
        """
        self.where = file.where
        self._file, self._shard, self._verify = file, shard, verify
        self.header = _read_header(file, shard.header_xxh3)
        self._ends, self._digests = self._read_index()
        self._verified = bytearray(len(self._ends))
        self._last_pool_chunk: tuple[int, Bytes] | None = None  # members of one pool are read one after the other

    @property
    def record_count(self) -> int:
        """Records of the index."""
        return len(self._ends)

    @property
    def keys(self) -> set[str]:
        """Keys of the payloads, the pool's included."""
        return self.header.tensors.keys() - {INDEX_KEY}

    def index_entry(self, record: int) -> tuple[int, bytes, int]:
        """End offset, hash and rank of a record."""
        return int(self._ends[record]), self._digests[record].tobytes(), int(self._ranks[record])

    def payload(self, key: str, payload: Payload, encoding: Encoding, numel: int) -> PayloadReader:
        """The payload at *payload* in this shard, of *numel* elements.

        Raises:
            FormatError: ST-6, IDX-2, IDX-5, COD-4, TAB-6: the shard has no such payload.
        """
        where = f"{self.where}, {key!r}"
        if payload.codec == "pooled":
            return self._pooled(payload.at, encoding, numel, where)
        if payload.codec == "planes-zstd" and not encoding.is_float:
            raise FormatError("COD-4", where, f"planes-zstd is for floating-point payloads, not for {encoding.name}")
        return self._stored(key, payload.codec, payload.at, encoding, numel)

    def _stored(self, key: str, codec: Codec, at: int, encoding: Encoding, numel: int) -> PayloadReader:
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
        if np.any(self._ranks[at : at + count]):
            raise FormatError("IDX-5", where, "its index records count bits, which only those of sparse tensors do")

        def fetch(index: int) -> Bytes:
            start = entry.start + (ends[index - 1] if index else 0)
            first, last = chunk_span(numel, index)
            place = f"{where}, chunk {index}"
            stored = self._read_chunk(at + index, start, entry.start + ends[index], place)
            return codecs.decode(codec, stored, encoding.nbytes(last - first), encoding.itemsize, place)

        return PayloadReader(numel, encoding, where, fetch)

    def _pooled(self, at: int, encoding: Encoding, numel: int, where: str) -> PayloadReader:
        nbytes = encoding.nbytes(numel)
        pool = self._shard.pool
        if at % POOL_ALIGNMENT or at + nbytes > (pool.nbytes if pool else 0):
            problem = f"bytes {at} to {at + nbytes} are not in the shard's pool, or not aligned"
            raise FormatError("TAB-6", where, problem)

        def fetch(index: int) -> Bytes:
            first, last = chunk_span(numel, index)
            start = at + encoding.nbytes(first)
            return self.pool_bytes(start, start + encoding.nbytes(last - first))

        return PayloadReader(numel, encoding, where, fetch)

    def padding(self, key: str, last_record: int) -> Bytes:
        """The bytes behind the last chunk of the payload *key*, up to its boundary; *last_record* is that chunk's."""
        entry = self.header.tensors[key]
        return self._file.read(entry.start + int(self._ends[last_record]), entry.stop)

    def pool_bytes(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of the decoded pool, in memory of their own; reads the chunks that they lie in."""
        pool = self._shard.pool
        if pool is None:
            raise FormatError("TAB-6", self.where, "has no pool")
        reader = self._stored(POOL_KEY, pool.codec, pool.at, POOL, pool.nbytes)
        first, last = start // CHUNK_NUMEL, -(-stop // CHUNK_NUMEL)
        pieces = [np.empty(0, np.uint8)]
        for index in range(first, last):
            begin = index * CHUNK_NUMEL
            pieces.append(self._pool_chunk(reader, index)[max(0, start - begin) : stop - begin])
        return np.concatenate(pieces)

    def _pool_chunk(self, reader: PayloadReader, index: int) -> Bytes:
        last = self._last_pool_chunk  # another thread may put its own there at any moment
        if last is None or last[0] != index or self._verify == "always":
            last = self._last_pool_chunk = (index, reader.chunk(index))
        return last[1]

    def _read_chunk(self, record: int, start: int, stop: int, where: str) -> Bytes:
        stored = self._file.read(start, stop)
        if self._verify == "always" or (self._verify == "first-read" and not self._verified[record]):
            if xxhash.xxh3_128_digest(stored.data) != self._digests[record].tobytes():
                raise IntegrityError("IDX-3", where, f"its bytes {_CHANGED}")
            self._verified[record] = 1
        return stored

    def _read_index(self) -> tuple[NDArray[np.uint64], Bytes]:
        entry = self.header.tensors.get(INDEX_KEY)
        if entry is None or entry.shape != ((entry.stop - entry.start) // RECORD_NBYTES, RECORD_NBYTES):
            raise FormatError("IDX-1", self.where, f"has no index of {RECORD_NBYTES}-byte records")
        if entry.stop != self._file.nbytes:
            raise FormatError("IDX-1", self.where, "its index is not the last tensor")
        raw = self._file.read(entry.start, entry.stop)
        if xxhash.xxh3_128_hexdigest(raw.data) != self._shard.index_xxh3:
            raise IntegrityError("IDX-1", self.where, f"its index {_CHANGED}")
        records = raw.reshape(-1, RECORD_NBYTES)
        numbers = np.ascontiguousarray(records[:, 16:]).view("<u8")
        self._ranks = numbers[:, 1]
        return numbers[:, 0].astype(np.uint64), np.ascontiguousarray(records[:, :16])


def _read_header(file: LocalFile, expected: str) -> Header:
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
