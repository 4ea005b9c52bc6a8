"""New inputs from old ones: JSON edited as JSON, all else byte by byte. The same generator gives the same input."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

from tests.fuzz.bundles import dump
from tests.fuzz.choices import Choices
from tests.fuzz.json_edits import edit

Mutation = Callable[[random.Random, Sequence[bytes]], bytes]
_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"-0", b"1.0", b"\0"),
    *(b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"---\n", b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"? "),
    *(
        b"../",
        b"C:\\",
        b"true",
        b"null",
        b"0" * 5000,
        b"[" * 2000,
        b"\x28\xb5\x2f\xfd",
        b"\x50\x2a\x4d\x18",
        b"\x80\x02",
    ),
)


def random_bytes(generator: random.Random, _seeds: Sequence[bytes]) -> bytes:
    """Bytes for what takes them as decisions."""
    return generator.randbytes(generator.choice((8, 24, 48, 96)))


def havoc(generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of *seeds*, a few bytes of it changed."""
    data = bytearray(generator.choice(seeds))
    for _ in range(1 << generator.randrange(4)):
        at = generator.randrange(len(data) + 1)
        match generator.randrange(6):
            case 0:
                data[at : at + 1] = generator.randbytes(1)
            case 1:
                data[at:at] = generator.choice(_TOKENS)
            case 2:
                del data[at : at + (1 << generator.randrange(7))]
            case 3:
                data[at : at + 8] = generator.choice((0, 1, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1)).to_bytes(
                    8, "little"
                )
            case 4:
                other = generator.choice(seeds)
                start = generator.randrange(len(other) + 1)
                data[at : at + 32] = other[start : start + 64]
            case _:
                if at < len(data):
                    data[at] ^= 1 << generator.randrange(8)
    return bytes(data)


def json_or_havoc(generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of *seeds*, edited as JSON three times out of four, if that is what it is."""
    return _edited(generator, generator.choice(seeds)) or havoc(generator, seeds)


def prefixed_json_or_havoc(generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """As `json_or_havoc`, for a byte that says what follows, and JSON behind it."""
    seed = generator.choice(seeds)
    edited = _edited(generator, seed[1:])
    return havoc(generator, seeds) if edited is None else seed[:1] + edited


def safetensors_or_havoc(generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """As `json_or_havoc`, for the header of a safetensors file, whose length is mended."""
    seed = generator.choice(seeds)
    start = 8 + int.from_bytes(seed[:8], "little")
    edited = _edited(generator, seed[8:start])
    return havoc(generator, seeds) if edited is None else len(edited).to_bytes(8, "little") + edited + seed[start:]


def _edited(generator: random.Random, raw: bytes) -> bytes | None:
    if generator.randrange(4) == 0:
        return None
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    for _ in range(generator.randint(1, 4)):
        edit(document, Choices(generator.randbytes(12)))
    return dump(document)
