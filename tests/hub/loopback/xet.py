"""What arrives by Xet: xorbs, which are chunks one after another, and shards, which say what chunks make a file.

After https://huggingface.co/docs/xet. Nothing is decoded here: whoever asks for a file is told where its chunks are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from tests.hub.loopback.shards import Shard, Term, XetFile

TOKEN = "xet_loopback"  # noqa: S105 - good for nothing else
"""What the store wants to be shown, by whomever the Hub lets it see."""

_CHUNK_HEADER_NBYTES = 8


@dataclass(frozen=True)
class Chunk:
    """Where a chunk is in its xorb, its header included, and how long it is when it is decoded."""

    start: int
    stop: int
    nbytes: int


class XetStore:
    """The xorbs in a directory, and the files that shards made of them."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self._root = root
        self._files: dict[str, XetFile] = {}  # by sha256 and by name: neither is ever the other
        self._shards: dict[str, Shard] = {}  # by the chunks that they tell of

    def put_xorb(self, name: str, content: bytes) -> bool:
        """Keep a xorb; whether it is new."""
        path = self._root / name
        is_new = not path.is_file()
        path.write_bytes(content)
        return is_new

    def read_xorb(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def put_shard(self, content: bytes) -> None:
        """Learn of files.

        Raises:
            FileNotFoundError: they are made of a xorb that did not arrive.
        """
        shard = Shard.parse(content)
        for file in shard.files:
            for term in file.terms:
                self._chunks(term)
        self._files |= {key: file for file in shard.files for key in (file.name, file.sha256)}
        self._shards |= dict.fromkeys(shard.chunks, shard)

    def file(self, name: str) -> XetFile | None:
        """A file by its sha256 or Xet's hash of it."""
        return self._files.get(name)

    def shard_of(self, chunk: str) -> bytes | None:
        """A shard that tells in which xorb a chunk is."""
        return self._shards[chunk].answer if chunk in self._shards else None

    def stored_nbytes(self) -> int:
        """How much was kept of all files: a chunk that several have in common is there once."""
        return sum(path.stat().st_size for path in self._root.iterdir())

    def reconstruct(self, file: XetFile, start: int, stop: int, xorbs_url: str) -> dict[str, Any]:
        """Where the chunks are that make the bytes from *start* up to *stop*, as the client is told."""
        terms: list[dict[str, Any]] = []
        places: dict[str, list[dict[str, Any]]] = {}
        offset = 0
        for position, term in _positions(file.terms):
            chunks = self._chunks(term)
            borders = list(accumulate((chunk.nbytes for chunk in chunks), initial=position))
            wanted = [n for n, (begin, end) in enumerate(pairwise(borders)) if begin < stop and end > start]
            if not wanted:
                continue
            first, last = wanted[0], wanted[-1]
            if not terms:
                offset = start - borders[first]
            indices = {"start": term.first + first, "end": term.first + last + 1}
            nbytes = borders[last + 1] - borders[first]
            terms.append({"hash": term.xorb, "unpacked_length": nbytes, "range": indices})
            byte_range = {"start": chunks[first].start, "end": chunks[last].stop - 1}
            place = {"range": indices, "url": f"{xorbs_url}/{term.xorb}", "url_range": byte_range}
            places.setdefault(term.xorb, []).append(place)
        return {"offset_into_first_range": offset, "terms": terms, "fetch_info": places}

    def _chunks(self, term: Term) -> tuple[Chunk, ...]:
        return _chunks_in(self._root / term.xorb)[term.first : term.stop]


def _positions(terms: tuple[Term, ...]) -> Iterator[tuple[int, Term]]:
    """Where in its file each term begins."""
    return zip(accumulate((term.nbytes for term in terms), initial=0), terms, strict=False)


@lru_cache
def _chunks_in(path: Path) -> tuple[Chunk, ...]:
    xorb, at, chunks = path.read_bytes(), 0, []
    while at < len(xorb):
        packed_nbytes = int.from_bytes(xorb[at + 1 : at + 4], "little")
        nbytes = int.from_bytes(xorb[at + 5 : at + 8], "little")
        stop = at + _CHUNK_HEADER_NBYTES + packed_nbytes
        chunks.append(Chunk(at, stop, nbytes))
        at = stop
    return tuple(chunks)
