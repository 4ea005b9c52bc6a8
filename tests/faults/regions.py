"""What every byte of a bundle belongs to, and which bytes a load reads: what is due where one changes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tallstore.checkpoints import safetensors_file
from tallstore.format.safetensors_header import Header, parse_header
from tallstore.format.shards import INDEX_KEY, POOL_KEY, RECORD_NBYTES, padded

#: Regions of which a load reads more than it needs: they are the base's own, which hashes of its weights stand for.
OF_THE_BASE = frozenset({"header of the base's file", "other file of the base"})
_TABLES = {"tallstore.json": "manifest", "base.json": "base.json", "group.json": "group.json", "task.json": "task.json"}
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Region:
    """Bytes [start, stop) of the file at *path* in the bundle, which all have one use."""

    path: str
    start: int
    stop: int
    use: str


def regions_of(path: str, content: bytes) -> list[Region]:
    """The regions of one file, which cover it without holes and overlaps; empty ones are left out."""
    if not path.endswith(_SUFFIX):
        use = _TABLES.get(path.rpartition("/")[2]) or ("other file of the base" if path.startswith("base/") else None)
        found = [Region(path, 0, len(content), use or "companion file")]
    elif path.startswith("base/"):
        header = _header(content)
        found = [Region(path, 0, header.nbytes, "header of the base's file")]
        found += [Region(path, each.start, each.stop, "weights of the base") for each in header.tensors.values()]
    else:
        found = list(_of_a_shard(path, content))
    found = sorted((region for region in found if region.start < region.stop), key=lambda region: region.start)
    assert [region.start for region in found] == [0, *(region.stop for region in found[:-1])]
    assert found[-1].stop == len(content)
    return found


def _of_a_shard(path: str, content: bytes) -> Iterator[Region]:
    header = _header(content)
    yield Region(path, 0, 8, "length of a header")
    yield Region(path, 8, header.nbytes, "header")
    index = header.tensors[INDEX_KEY]
    records = np.frombuffer(content[index.start : index.stop], np.uint8).reshape(-1, RECORD_NBYTES)
    ends = iter(np.ascontiguousarray(records[:, 16:24]).view("<u8").ravel().tolist())
    for key, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
        if key == INDEX_KEY:
            yield Region(path, entry.start, entry.stop, "index")
            continue
        end = next(ends)
        while padded(end) != entry.stop - entry.start:
            end = next(ends)
        use = "pool" if key == POOL_KEY else f"payload {key.partition('/')[0]}"
        yield Region(path, entry.start, entry.start + end, use)
        yield Region(path, entry.start + end, entry.stop, "padding")
    assert next(ends, None) is None


def _header(content: bytes) -> Header:
    return parse_header(content[: 8 + int.from_bytes(content[:8], "little")], len(content))


class Reads:
    """The byte ranges of files in *root* that a process read, by path."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._ranges = defaultdict[str, list[tuple[int, int]]](list)
        self._whole = set[str]()

    def add(self, place: str, start: int, stop: int) -> None:
        """A range was read."""
        path = self._inside(place)
        if path is not None:
            self._ranges[path].append((start, stop))

    def add_opened(self, place: str) -> None:
        """A file was opened; those without ranges are taken for read from end to end."""
        path = self._inside(place)
        if path is not None and not path.endswith(_SUFFIX):
            self._whole.add(path)

    def reads(self, region: Region) -> bool:
        """Whether a byte of it was read."""
        ranges = self._ranges.get(region.path, ())
        return region.path in self._whole or any(a < region.stop and region.start < b for a, b in ranges)

    @property
    def nbytes(self) -> int:
        """Of all that was read of the bundle, each byte as often as it was read, but those of whole files once."""
        sizes = sum((self._root / path).stat().st_size for path in self._whole)
        return sizes + sum(stop - start for ranges in self._ranges.values() for start, stop in ranges)

    def _inside(self, place: str) -> str | None:
        found = Path(place).resolve()
        return found.relative_to(self._root).as_posix() if self._root in found.parents else None


@contextlib.contextmanager
def traced(root: Path) -> Iterator[Reads]:
    """A block whose reads of files in *root* are seen, in this thread and others."""
    reads = Reads(root)
    preadv, read, read_shard = os.preadv, safetensors_file.read_range, safetensors_file.read_shard

    def traced_preadv(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        reads.add(f"/proc/self/fd/{descriptor}", offset, offset + count)
        return count

    def traced_read(path, version, first, end):
        reads.add(str(path), first, end)
        return read(path, version, first, end)

    def traced_read_shard(path):
        reads.add(str(path), 0, 8 + int.from_bytes(path.read_bytes()[:8], "little"))
        return read_shard(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", traced_preadv)
        patch.setattr(safetensors_file, "read_range", traced_read)
        patch.setattr("tallstore.checkpoints.source.read_shard", traced_read_shard)
        _OPENED.begin(reads)
        try:
            yield reads
        finally:
            _OPENED.end()


class _Opened:
    """Files that this process opens, as Python's audit hooks see it."""

    def __init__(self) -> None:
        self._reads: Reads | None = None
        self._is_hooked = False

    def begin(self, reads: Reads) -> None:
        self._reads = reads
        if not self._is_hooked:  # for good: hooks cannot be removed
            sys.addaudithook(self._hear)
            self._is_hooked = True

    def end(self) -> None:
        self._reads = None

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._reads is not None and event == "open" and isinstance(arguments[0], str):
            self._reads.add_opened(arguments[0])


_OPENED = _Opened()


class Outcomes:
    """How many changed bytes of each use met which end."""

    def __init__(self) -> None:
        self._counts = defaultdict[str, dict[str, int]](lambda: defaultdict(int))

    def add(self, use: str, outcome: str) -> None:
        """One more."""
        self._counts[use][outcome] += 1

    def total(self, outcome: str | None = None) -> int:
        """Of one outcome, or of all."""
        return sum(
            n for counts in self._counts.values() for name, n in counts.items() if outcome is None or name == outcome
        )

    def __str__(self) -> str:
        return json.dumps(self._counts, indent=1, sort_keys=True)
