"""How a checkpoint's bytes are best read when they are used once: mapped, with which advice, or copied by pread.

    python benchmarks/reading.py [--mib 256] [--repeats 9]

A file in the page cache is gone through in chunks of 4 MiB, and one is added to every float32 of it: what a load does
with its base. Ways take turns; medians of processor time, since that is what a load on all processors is short of. The
page faults are those of one chunk.

- mapped by chunk: a private mapping of each chunk, given back when the chunk is done. What tallstore does: no more than
  a few chunks of a file count as memory of the process.
- one mapping: of the whole file, which stays; "again" when all of its pages have been touched before.
- pread: into a buffer of a chunk, used over and over, or of a size that stays in the processor's cache.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHUNK = 4 << 20
TILE = 1 << 18  # elements
POPULATE_READ = 22  # of Linux 5.14; the mmap module has no name for it


def consume(chunk: Tensor, destination: Tensor) -> None:
    """Touch every byte once, tile by tile."""
    for start in range(0, chunk.numel(), TILE):
        tile = chunk[start : start + TILE]
        torch.add(tile, 1, out=destination[: tile.numel()])


def as_floats(raw: mmap.mmap, start: int = 0, count: int = CHUNK) -> Tensor:
    """Bytes of a mapping as float32."""
    return torch.from_numpy(np.frombuffer(raw, np.float32, count // 4, start))


def by_chunk(path: Path, destination: Tensor, advice: int | None = None) -> None:
    """A mapping a chunk."""
    with path.open("rb") as file:
        for start in range(0, path.stat().st_size, CHUNK):
            mapped = mmap.mmap(file.fileno(), CHUNK, access=mmap.ACCESS_COPY, offset=start)
            if advice is not None:
                mapped.madvise(advice)
            consume(as_floats(mapped), destination)


def one_mapping(path: Path, destination: Tensor, mapped: mmap.mmap | None = None) -> None:
    """One mapping of all."""
    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped is None else mapped
    for start in range(0, path.stat().st_size, CHUNK):
        consume(as_floats(whole, start), destination)


def pread(path: Path, destination: Tensor, nbytes: int) -> None:
    """Copies into one buffer of *nbytes*."""
    buffer = torch.zeros(nbytes // 4)
    with path.open("rb", buffering=0) as file:
        for start in range(0, path.stat().st_size, nbytes):
            if os.preadv(file.fileno(), [buffer.numpy().data.cast("B")], start) != nbytes:
                raise SystemExit(f"{path} ended early")
            consume(buffer, destination)


def measured(way: Callable[[], None]) -> tuple[float, int]:
    """Processor seconds, and minor page faults."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    way()
    return time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before.ru_minflt


def table(path: Path, repeats: int) -> Iterator[str]:
    """The lines of the table."""
    destination, nbytes = torch.zeros(TILE), path.stat().st_size
    with path.open("rb") as file:
        kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    one_mapping(path, destination, kept)
    ways: dict[str, Callable[[], None]] = {
        "mapped by chunk": partial(by_chunk, path, destination),
        "mapped by chunk, MADV_SEQUENTIAL": partial(by_chunk, path, destination, mmap.MADV_SEQUENTIAL),
        "mapped by chunk, MADV_WILLNEED": partial(by_chunk, path, destination, mmap.MADV_WILLNEED),
        "mapped by chunk, MADV_POPULATE_READ": partial(by_chunk, path, destination, POPULATE_READ),
        "one mapping": partial(one_mapping, path, destination),
        "one mapping, again": partial(one_mapping, path, destination, kept),
        "pread, 4 MiB": partial(pread, path, destination, CHUNK),
        "pread, 256 KiB": partial(pread, path, destination, CHUNK // 16),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(measured(way))
    first = statistics.median(seconds for seconds, _ in found["mapped by chunk"])
    yield "| way | GB/s | time, against the first | page faults a chunk |"
    yield "|---|---|---|---|"
    for name, runs in found.items():
        seconds = statistics.median(seconds for seconds, _ in runs)
        yield f"| {name} | {nbytes / seconds / 1e9:.1f} | {seconds / first:.2f} | {runs[-1][1] * CHUNK / nbytes:.0f} |"


def main() -> None:
    """Write a file, read it every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the file, a multiple of 4")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tallstore-reading-") as scratch:
        path = Path(scratch) / "file"
        with path.open("wb") as file:
            for _ in range(arguments.mib // 4):
                file.write(np.random.default_rng(0).standard_normal(CHUNK // 4, np.float32).data)
        print(f"{platform.platform()}, torch {torch.__version__}, one thread\n")
        for line in table(path, arguments.repeats):
            print(line)


if __name__ == "__main__":
    main()
