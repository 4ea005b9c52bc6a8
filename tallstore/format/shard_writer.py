"""Writes shards: payloads stream in element by element and leave as hashed chunks; no tensor is ever held whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import xxhash

from tallstore import files
from tallstore.files import Written
from tallstore.format import bits, codecs, layout
from tallstore.format.bits import Bytes
from tallstore.format.codecs import Codec
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import POOL, Encoding
from tallstore.format.manifest import FORMAT_VERSION, Payload, Pool, Shard
from tallstore.format.safetensors_header import LENGTH_NBYTES
from tallstore.format.shards import (
    INDEX_KEY,
    METADATA_KEY,
    POOL_ALIGNMENT,
    POOL_KEY,
    RECORD_NBYTES,
    padded,
)

POOLED_NUMEL = 4096  # payloads of fewer elements go to the pool
MAX_SHARD_NBYTES = 4 << 30  # a shard takes no further payload beyond this
MAX_SHARD_PAYLOADS = 1 << 15  # nor beyond this: the longest names must leave the header under its limit
WORTHWHILE = 0.97  # coded bytes must be under this share of the raw ones
_TRIAL_CHUNKS = 8  # how many chunks decide whether a payload is worth coding
_COPIED_NBYTES = 1 << 20


@dataclass
class Body:
    """Payloads that stream into a file, one after the other; a shard's gets its header at the end."""

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
        """Add to the file."""
        # Opened for each chunk: a thousand tasks are a thousand shards, more than a process may hold open.
        with self.path.open("ab") as file:
            file.write(data)
        self.nbytes += len(data)


@dataclass(frozen=True)
class Recorded:
    """A payload that was written elsewhere, to be put into a shard.

    Attributes:
        stem, key: as `ShardWriter.payload` takes them.
        codec: how its chunks are stored.
        start, stop: of its bytes in the file that it was written to, padding included.
        records: of its chunks.
        pooled: its decoded bytes, where it goes to the pool; it has no others then.
    """

    stem: str
    key: str
    codec: Codec
    start: int
    stop: int
    records: tuple[bytes, ...]
    pooled: bytes | None = None


class PayloadSink(Protocol):
    """What takes payloads: a `ShardWriter`, or a `ShardRecorder`."""

    def payload(
        self, stem: str, key: str, encoding: Encoding, codec: Codec | None = None, *, ranked: bool = False
    ) -> PayloadWriter:
        """Begin a payload, as `ShardWriter.payload` does."""

    def whole(
        self, stem: str, key: str, encoding: Encoding, numel: int, decoded: Bytes, *, ranked: bool = False
    ) -> Payload:
        """Write a payload that is at hand, as `ShardWriter.whole` does."""


class ShardWriter:
    """Streams the payloads of one owner, a group or a task, into shards in *directory*.

    Payloads of one stem are written one after the other. `finish` writes headers and indexes, and gives what the
    owner's table and the manifest list.
    """

    def __init__(self, directory: Path, *, compress: bool = True) -> None:
        """Write nothing yet.

        Args:
            directory: of the owner; there before the first payload.
            compress: whether payloads and pools take the smaller codec where none is asked for; False stores them raw.
        """
        self._directory = directory
        self._codec: Codec | None = None if compress else "raw"
        self._bodies: list[Body] = []

    def payload(
        self, stem: str, key: str, encoding: Encoding, codec: Codec | None = None, *, ranked: bool = False
    ) -> PayloadWriter:
        """Begin a payload in the current shard of *stem*.

        Args:
            stem: what the shard's file name begins with.
            key: the payload's name in the shard.
            encoding: what its bytes mean.
            codec: how to store it; None takes the smaller, raw unless coding saves 3 %, where the writer compresses.
            ranked: whether its records count the codes that are not 0 in the chunks before: those of the bits of a
                sparse tensor do.
        """
        body = self._body(stem)
        return PayloadWriter(body, key, encoding, codec or self._codec, self._shard_number(stem), ranked=ranked)

    def whole(
        self, stem: str, key: str, encoding: Encoding, numel: int, decoded: Bytes, *, ranked: bool = False
    ) -> Payload:
        """Write a payload that is at hand as decoded bytes: into the pool if it is small."""
        if numel >= POOLED_NUMEL:
            return self.payload(stem, key, encoding, ranked=ranked).take_all(decoded, numel)
        return self._pool(stem, decoded.tobytes())

    def _pool(self, stem: str, decoded: bytes) -> Payload:
        body = self._body(stem)
        at = len(body.pool)
        body.pool += decoded
        body.pool += bytes(-len(body.pool) % POOL_ALIGNMENT)
        return Payload(shard=self._shard_number(stem), codec="pooled", at=at)

    def place(self, recorded: Recorded, file: BinaryIO) -> Payload:
        """Put in a payload that a `ShardRecorder` took: the same shards come of it as if it had been written here.

        Args:
            recorded: the payload.
            file: the recorder's, open for reading.
        """
        if recorded.pooled is not None:
            return self._pool(recorded.stem, recorded.pooled)
        body = self._body(recorded.stem)
        start, at = body.nbytes, len(body.records)
        file.seek(recorded.start)
        for first in range(recorded.start, recorded.stop, _COPIED_NBYTES):
            body.append(file.read(min(_COPIED_NBYTES, recorded.stop - first)))
        body.records.extend(recorded.records)
        body.tensors[recorded.key] = (start, body.nbytes)
        return Payload(shard=self._shard_number(recorded.stem), codec=recorded.codec, at=at)

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
            shard, file = _finish_body(body, self._directory / name, self._codec)
            shards.append(shard)
            written[name] = file
        return tuple(shards), written

    def _shard_number(self, stem: str) -> int:
        return max(position for position, body in enumerate(self._bodies) if body.stem == stem)

    def _body(self, stem: str) -> Body:
        """The shard that the next payload of *stem* goes to."""
        current = [body for body in self._bodies if body.stem == stem]
        if current and not current[-1].is_full:
            return current[-1]
        number = len(current) + 1
        body = Body(stem, number, self._directory / f"{stem}-{number:05d}.body")
        body.path.touch()
        self._bodies.append(body)
        return body


class PayloadWriter:
    """One payload: elements come in pieces of any size and leave in chunks."""

    def __init__(
        self, body: Body, key: str, encoding: Encoding, codec: Codec | None, shard: int, *, ranked: bool = False
    ) -> None:
        self._body, self._key, self._encoding, self._shard = body, key, encoding, shard
        self._codec = codec
        self._ranks = [0] if ranked else None  # of every chunk that was closed, and of the next one
        self._pending: list[Bytes] = []  # decoded chunks that wait for the choice of the codec
        self._buffer = np.empty(CHUNK_NUMEL * encoding.itemsize, np.uint8)
        self._filled = 0
        self._start, self._at, self._end = body.nbytes, len(body.records), 0
        self._stop: int | None = None
        self._records: tuple[bytes, ...] = ()

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
        self._stop, self._records = self._body.nbytes, tuple(self._body.records[self._at :])
        self._buffer = np.empty(0, np.uint8)
        return Payload(shard=self._shard, codec=self._codec or "raw", at=self._at)

    def take_all(self, decoded: Bytes, numel: int) -> Payload:
        """Append all *numel* elements, as decoded bytes, and finish."""
        width = self._encoding.width
        self.append(decoded if width >= 8 else bits.unpack(decoded, numel, width))
        return self.finish()

    def recorded(self, stem: str) -> Recorded | None:
        """What was written; None if it was taken back."""
        if self._stop is None:
            return None
        return Recorded(stem, self._key, self._codec or "raw", self._start, self._stop, self._records)

    def discard(self) -> None:
        """Take back everything that was written; nothing may have followed."""
        self._pending, self._filled = [], 0
        os.truncate(self._body.path, self._start)
        self._body.nbytes = self._start
        del self._body.records[self._at :]

    @property
    def rank(self) -> int:
        """Codes that are not 0 in the chunks closed so far, and in all once it is finished; 0 unless it is ranked."""
        return self._ranks[-1] if self._ranks is not None else 0

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the chunks stored so far."""
        return self._end

    def _close_chunk(self) -> None:
        filled, self._filled = self._buffer[: self._filled], 0
        if self._ranks is not None:
            self._ranks.append(self._ranks[-1] + int(np.count_nonzero(filled)))
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
        rank = 0 if self._ranks is None else self._ranks[len(self._body.records) - self._at]
        self._body.records.append(
            xxhash.xxh3_128_digest(stored) + self._end.to_bytes(8, "little") + rank.to_bytes(8, "little")
        )


def about_stored(decoded: Bytes, encoding: Encoding, numel: int) -> int:
    """Bytes that a payload written `whole` takes, about: those of a pool are compressed together."""
    codec: Codec = "planes-zstd" if encoding.is_float and numel >= POOLED_NUMEL else "zstd"
    return min(decoded.size, len(codecs.encode(codec, decoded, encoding.itemsize)))


def _finish_body(body: Body, path: Path, codec: Codec | None) -> tuple[Shard, Written]:
    pool = None
    if body.pool:
        writer = PayloadWriter(body, POOL_KEY, POOL, codec, 0)
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
