"""Stored bytes: single chunks under every codec, and payloads of shards that are made up around them."""

from __future__ import annotations

import contextlib
import json
import math
import struct

import numpy as np
import xxhash
import zstandard

from tallstore.errors import TallstoreError
from tallstore.format import codecs, encodings
from tallstore.format.encodings import Encoding
from tallstore.format.manifest import Payload, Pool, Shard
from tallstore.format.shard_reader import ShardReader
from tests.fuzz.choices import Choices
from tests.fuzz.outcomes import Broken, typed

ENCODINGS: tuple[Encoding, ...] = (
    *(encodings.BITS, encodings.SIGNED, encodings.GAINS, encodings.STEPS, encodings.POOL),
    *encodings.UNIFORM.values(),
    *encodings.SHARED.values(),
    *encodings.WHOLE.values(),
)
SIZES = (1, 2, 4, 7, 8, 9, 13, 64, 600, 4096)


def frame_seeds() -> list[bytes]:
    """Frames, each behind the byte that says what is due."""
    contents = [bytes(range(64)), bytes(600), b"abc" * 200, b"", b"x"]
    made = [
        zstandard.ZstdCompressor(level=level, write_checksum=sure).compress(raw)
        for raw in contents
        for level in (1, 19)
        for sure in (False, True)
    ]
    streams = [zstandard.ZstdCompressor(write_content_size=False).compress(raw) for raw in contents]
    return [bytes([number]) + stored for number in range(3 * len(SIZES)) for stored in made + streams]


def frame(data: bytes) -> None:
    """One chunk: refused, or decoded to what the library makes of the same bytes, which are one frame and no more."""
    if not data:
        return
    codec = ("raw", "zstd", "planes-zstd")[data[0] // len(SIZES) % 3]
    itemsize = 4 if codec == "planes-zstd" else 1
    nbytes = max(itemsize, SIZES[data[0] % len(SIZES)] // itemsize * itemsize)
    stored = np.frombuffer(data[1:], np.uint8)
    decoded = typed(lambda: codecs.decode(codec, stored, nbytes, itemsize, "chunk"))
    if isinstance(decoded, TallstoreError):
        return
    if decoded.nbytes != nbytes:
        raise Broken(f"{decoded.nbytes} bytes came out, {nbytes} were due")
    if codec == "raw":
        expected = data[1:]
    else:
        stream = zstandard.ZstdDecompressor().decompressobj()
        expected = stream.decompress(data[1:])
        if stream.unused_data:
            raise Broken("bytes behind the frame were ignored")
        expected = np.frombuffer(expected, np.uint8).reshape(itemsize, -1).T.tobytes()
    if decoded.tobytes() != expected:
        raise Broken("the chunk is not what the library makes of it")


class _Memory:
    """A file in memory."""

    where = "shard"

    def __init__(self, content: bytes) -> None:
        self._content, self.nbytes = np.frombuffer(content, np.uint8), len(content)

    def read(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.nbytes:
            raise Broken(f"bytes {start} to {stop} of {self.nbytes} are read")
        return self._content[start:stop].copy()

    def expect(self, start: int, stop: int) -> None:
        pass

    def version(self) -> int:
        return 0

    def close(self) -> None:
        pass


def payload(data: bytes) -> None:
    """A shard that is made up: any encoding, codec, size, ends and ranks, around bytes that are mostly sound."""
    choices = Choices(data)
    encoding, numel = choices.pick(ENCODINGS), choices.pick((*SIZES, choices.below(5000)))
    codec = choices.pick(("raw", "zstd", "planes-zstd", "pooled"))
    decoded = _content(choices, encoding, numel)
    stored = decoded
    if codec in ("zstd", "planes-zstd"):
        if codec == "planes-zstd" and len(decoded) % encoding.itemsize == 0:
            stored = np.frombuffer(decoded, np.uint8).reshape(-1, encoding.itemsize).T.tobytes()
        stored = zstandard.ZstdCompressor(level=1).compress(stored)
    if choices.one_in(3):
        changed = bytearray(stored + b"\0")
        changed[choices.below(len(changed))] ^= 1 << choices.below(8)
        stored = bytes(changed[: len(stored) + choices.below(2)])
    pool_codec = choices.pick(("raw", "zstd"))
    if codec == "pooled":
        pooled = zstandard.ZstdCompressor(level=1).compress(stored) if pool_codec == "zstd" else stored
        pool_nbytes, stored = len(stored) + choices.pick((0, 0, 1, 1 << 40)), pooled
    end = len(stored) + choices.pick((0, 0, 0, 0, 1, -1, 64))
    records = [(max(0, end), choices.pick((0, 0, 0, 1, 1 << 40)))]
    if choices.one_in(5):
        records.append((max(0, end) + choices.pick((0, 1, 64)), choices.below(3)))
    key = "pool" if codec == "pooled" else "bits/w"
    content, shard = _shard(key, stored, records)
    if codec == "pooled":
        shard = Shard(
            **{name: getattr(shard, name) for name in ("file", "header_xxh3", "index_xxh3")},
            pool=Pool(nbytes=pool_nbytes, codec=pool_codec, at=0),
        )
    claimed = numel + choices.pick((0, 0, 0, 0, 1, -1 if numel else 0, 1 << 20, 1 << 40))
    at = choices.pick((0, 0, 0, 0, 1, 8, 1 << 62))
    set_count = choices.pick((None, None, numel, 0, 1 << 62))

    def read() -> np.ndarray:
        reader = ShardReader(_Memory(content), shard, choices.pick(("first-read", "never", "always")))
        found = reader.payload("bits/w", Payload(shard=0, codec=codec, at=at), encoding, claimed, set_count)
        return found.all()

    found = typed(read)
    if isinstance(found, TallstoreError):
        return
    if found.nbytes != encoding.nbytes(claimed):
        raise Broken(f"{found.nbytes} bytes came out for {claimed} elements of {encoding.name}")


def _content(choices: Choices, encoding: Encoding, numel: int) -> bytes:
    """Decoded bytes: zeros, or random ones, or numbers."""
    nbytes = encoding.nbytes(numel)
    match choices.below(3):
        case 0:
            return bytes(nbytes)
        case 1:
            return (choices.raw(16) * (nbytes // 16 + 1))[:nbytes]
        case _:
            number = choices.pick((1.0, 1.5, math.nan, math.inf, -0.0, 2.0**-61, 1e30, 4097 / 4096))
            with contextlib.suppress(OverflowError):
                return (struct.pack("<f", number) * (nbytes // 4 + 1))[:nbytes]
            return bytes(nbytes)


def _shard(key: str, stored: bytes, records: list[tuple[int, int]]) -> tuple[bytes, Shard]:
    data = stored + bytes(-len(stored) % 64)
    index, start = b"", 0
    for end, rank in records:
        digest = xxhash.xxh3_128_digest(data[start:end])
        index += digest + end.to_bytes(8, "little") + rank.to_bytes(8, "little")
        start = end
    rows = {
        "__metadata__": {"tallstore": "1.0"},
        key: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]},
        "index": {"dtype": "U8", "shape": [len(records), 32], "data_offsets": [len(data), len(data) + len(index)]},
    }
    text = json.dumps(rows).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    hashes = {"header_xxh3": xxhash.xxh3_128_hexdigest(head), "index_xxh3": xxhash.xxh3_128_hexdigest(index)}
    return head + data + index, Shard(file="mask-00001-of-00001.safetensors", **hashes)
