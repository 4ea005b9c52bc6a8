"""Payloads, and the shards that they lie in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import xxhash

from second.elements import CHUNK, NBITS, Array, Json
from second.frames import frame, planes

FORMAT_VERSION = "1.0"
ALIGNMENT = 64


def compact(document: object) -> bytes:
    """JSON without white space."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Payload:
    """Elements to be stored, and how. It stands in a table where its reference will.

    Attributes:
        key: ``<role>/<tensor>``.
        cells: what an element is, a key of `NBITS`.
        count: how many there are.
        raw: their decoded bytes.
        codec: raw, zstd, planes-zstd or pooled.
        file: the shard that it goes to.
        stored: its chunks as they stand in the file, where they are not what `store` makes of *raw*.
        ranked: whether its records have ranks: the bits of a sparse tensor.
    """

    key: str
    cells: str
    count: int
    raw: bytes
    codec: str = "raw"
    file: str = "mask-00001-of-00001.safetensors"
    stored: tuple[bytes, ...] | None = None
    ranked: bool = False

    def chunks(self) -> list[bytes]:
        """Its decoded bytes, a chunk each (CHK-1, CHK-2)."""
        nbytes = CHUNK * NBITS[self.cells] // 8
        return [self.raw[start : start + nbytes] for start in range(0, len(self.raw), nbytes)]


def store(payload: Payload) -> tuple[bytes, ...]:
    """The chunks of *payload*, as they stand in the file."""
    if payload.stored is not None:
        return payload.stored
    if payload.codec == "zstd":
        return tuple(map(frame, payload.chunks()))
    if payload.codec == "planes-zstd":
        return tuple(frame(planes(chunk, NBITS[payload.cells] // 8)) for chunk in payload.chunks())
    return tuple(payload.chunks())


def ranks(payload: Payload) -> list[int]:
    """A rank for each chunk: of a sparse tensor's bits how many are set in the chunks before, of all others 0."""
    counts = [int.from_bytes(chunk, "little").bit_count() for chunk in payload.chunks()]
    return [sum(counts[:number]) if payload.ranked else 0 for number in range(len(counts))]


@dataclass
class Entry:
    """One tensor of a shard. Without a key its bytes are in the file, and not in the header: a hole."""

    key: str | None
    shape: list[int]
    data: bytes
    dtype: str = "U8"


@dataclass
class Record:
    """One chunk in the index: hash of its stored bytes, where it ends in its payload, bits set before it (sparse)."""

    digest: bytes
    end: int
    rank: int = 0

    def pack(self) -> bytes:
        """Its 32 bytes."""
        return self.digest + self.end.to_bytes(8, "little") + self.rank.to_bytes(8, "little")


@dataclass
class Shard:
    """A safetensors file: payloads, and behind them their index."""

    entries: list[Entry] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    metadata: Json | None = field(default_factory=lambda: {"tallstore": FORMAT_VERSION})
    index_columns: int = 32
    index_position: int | None = None
    header_edits: list[Callable[[Json], Json]] = field(default_factory=list)
    header_text: Callable[[bytes], bytes] = bytes
    header_alignment: int = ALIGNMENT
    file_edit: Callable[[bytes], bytes] = bytes

    def add(self, payload: Payload) -> int:
        """Append a payload; the number of its first record."""
        at, data = len(self.records), b""
        for chunk, rank in zip(store(payload), ranks(payload), strict=True):
            data += chunk
            self.records.append(Record(xxhash.xxh3_128_digest(chunk), len(data), rank))
        data += bytes(-len(data) % ALIGNMENT)
        self.entries.append(Entry(payload.key, [len(data)], data))
        return at

    def entry(self, key: str) -> Entry:
        """The tensor of that key."""
        return next(entry for entry in self.entries if entry.key == key)

    def index(self) -> bytes:
        """The index's bytes."""
        return b"".join(record.pack() for record in self.records)

    def pack(self) -> tuple[bytes, bytes]:
        """The whole file, and the part of it that the header's hash is of."""
        index = self.index()
        entries = [*self.entries]
        position = len(entries) if self.index_position is None else self.index_position
        entries.insert(position, Entry("index", [len(index) // self.index_columns, self.index_columns], index))
        header: Json = {} if self.metadata is None else {"__metadata__": self.metadata}
        data = b""
        for entry in entries:
            offsets = [len(data), len(data) + len(entry.data)]
            if entry.key is not None:
                header[entry.key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
            data += entry.data
        for edit in self.header_edits:
            header = edit(header)
        text = self.header_text(compact(header))
        text += b" " * (-(8 + len(text)) % self.header_alignment)
        file = self.file_edit(len(text).to_bytes(8, "little") + text + data)
        length = int.from_bytes(file[:8], "little")
        return file, file[: 8 + length]


def safetensors(tensors: Mapping[str, Array]) -> bytes:
    """An ordinary safetensors file, its tensors in the order given."""
    header: Json = {}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.raw)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.raw
    text = compact(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data
