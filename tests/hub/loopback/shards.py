"""Xet's shards: what a client sends to say what chunks make its files, and is sent to learn of chunks that are there.

After https://huggingface.co/docs/xet/shard: a header, a section of files, a section of xorbs, in an answer a footer.
Records have one size, and a section ends with a record that begins with all bits set.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

_RECORD_NBYTES = 48
_HASH_NBYTES = 32
_FOOTER_NBYTES = 200
_END = b"\xff" * _HASH_NBYTES + bytes(_RECORD_NBYTES - _HASH_NBYTES)
_HEADER_VERSION, _FOOTER_VERSION = 2, 1
_WITH_CHECKS = 0x80000000
_WITH_SHA256 = 0x40000000
_USABLE_SECONDS = 3600


@dataclass(frozen=True)
class Term:
    """A part of a file: the chunks of a xorb from *first* up to, not including, *stop*."""

    xorb: str
    first: int
    stop: int
    nbytes: int


@dataclass(frozen=True)
class XetFile:
    """A file that arrived; `name` is Xet's hash of it."""

    name: str
    sha256: str
    terms: tuple[Term, ...]

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.terms)


@dataclass(frozen=True)
class Shard:
    """What a client says.

    Attributes:
        files: made of xorbs that are there, sent before or by others.
        chunks: the names of those in the xorbs that are new.
        answer: the shard that tells other clients of these chunks, and of no file.
    """

    files: tuple[XetFile, ...]
    chunks: tuple[str, ...]
    answer: bytes

    @classmethod
    def parse(cls, shard: bytes) -> Shard:
        files, at = [], _RECORD_NBYTES
        while not _is_end(shard, at):
            flags, count = struct.unpack_from("<2I", shard, at + _HASH_NBYTES)
            records = _records(at + _RECORD_NBYTES, count)
            sha256_at = records.stop + (count * _RECORD_NBYTES if flags & _WITH_CHECKS else 0)
            if not flags & _WITH_SHA256:
                raise ValueError("a file without its sha256")
            terms = tuple(_term(shard, record) for record in records)
            files.append(XetFile(_hash(shard, at), _hash(shard, sha256_at), terms))
            at = sha256_at + _RECORD_NBYTES
        xorbs = at + _RECORD_NBYTES
        return cls(tuple(files), tuple(_chunks(shard, xorbs)), _answer(shard[:_HASH_NBYTES], shard[xorbs:]))


def _term(shard: bytes, at: int) -> Term:
    _, nbytes, first, stop = struct.unpack_from("<4I", shard, at + _HASH_NBYTES)
    return Term(_hash(shard, at), first, stop, nbytes)


def _chunks(shard: bytes, at: int) -> Iterator[str]:
    while not _is_end(shard, at):
        (count,) = struct.unpack_from("<I", shard, at + _HASH_NBYTES + 4)
        records = _records(at + _RECORD_NBYTES, count)
        yield from (_hash(shard, record) for record in records)
        at = records.stop


def _answer(magic: bytes, xorbs: bytes) -> bytes:
    header = magic + struct.pack("<2Q", _HEADER_VERSION, _FOOTER_NBYTES)
    files_at, xorbs_at = len(header), len(header) + len(_END)
    footer_at = xorbs_at + len(xorbs)
    no_indices = (footer_at, 0) * 3  # without entries, but hf_xet takes the first for where the xorbs end
    now, no_key = int(time.time()), bytes(_HASH_NBYTES)
    footer = struct.pack("<9Q", _FOOTER_VERSION, files_at, xorbs_at, *no_indices) + no_key
    footer += struct.pack("<2Q72xQ", now, now + _USABLE_SECONDS, footer_at)
    return header + _END + xorbs + footer


def _records(at: int, count: int) -> range:
    """Where so many records begin."""
    return range(at, at + count * _RECORD_NBYTES, _RECORD_NBYTES)


def _is_end(shard: bytes, at: int) -> bool:
    return shard[at : at + _HASH_NBYTES] == _END[:_HASH_NBYTES]


def _hash(shard: bytes, at: int) -> str:
    """A hash as Xet writes it: four words, each the other way round."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, at))
