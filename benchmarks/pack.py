"""How long `pack` takes, beside reading all of its inputs once.

    python benchmarks/pack.py --experts DIR [--dtypes float32 bfloat16] [--methods signed sum] [--repeats 5]
    python benchmarks/pack.py --numel 25_000_000 --tasks 4
    python benchmarks/pack.py --built DIR

DIR of --experts is as for fidelity.py; --numel makes a random base and --tasks fine-tunes of that many parameters; DIR
of --built holds `base` and a directory a task, each with a model.safetensors. Every run is in a forked process of its
own, and they take turns. "Reading" opens every file with safetensors, copies each tensor into memory and sums it up;
the second row leaves out the copy: pages of the file are mapped and read where they are. For memory, and how both grow
with size and number of experts, see memory.py.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from apart import apart
from fidelity import copy_as
from load import built
from safetensors import safe_open

from tallstore import (
    Emr,
    LeastSquares,
    Localize,
    Sign,
    SignedMask,
    TallMask,
    Uniform,
    __version__,
    pack,  # before a process is forked: no pack is to wait for imports
)

METHODS = {
    "signed": SignedMask(),
    "sum": TallMask(),
    "ties": TallMask(merge="ties"),
    "least-squares": LeastSquares(),
    "two-levels": LeastSquares(levels=2),
    "emr": Emr(),
    "sign": Sign(),
    "ternary": Uniform(3),
    "uniform": Uniform(),
    "localize": Localize(),
}
REFERENCE = "reading: safetensors, copied and summed"
Work = Callable[[], None]


def read(paths: list[Path], *, copied: bool) -> None:
    """Every tensor of every file, summed; from memory of this process's own, or as it is mapped."""
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                (tensor.clone() if copied else tensor).sum().item()


def pack_all(checkpoints: Path, method: str, out: Path, workers: int) -> None:
    """All experts beside the base, into *out*."""
    tasks = {path.name: path for path in sorted(checkpoints.iterdir()) if path.is_dir() and path.name != "base"}
    if not workers:
        pack(checkpoints / "base", tasks, out, method=METHODS[method])
        return
    with ProcessPoolExecutor(workers) as pool:
        pack(checkpoints / "base", tasks, out, method=METHODS[method], executor=pool)


def measure(work: Work, threads: int) -> tuple[float, float]:
    """Seconds and processor seconds of *work*, in a process of its own."""

    def here() -> tuple[float, float]:
        torch.set_num_threads(threads)
        cpu, begun = time.process_time(), time.perf_counter()
        work()
        return time.perf_counter() - begun, time.process_time() - cpu

    wall, cpu = apart(here)
    return wall, cpu


def table(compared: dict[str, Work], out: Path, repeats: int, threads: int) -> Iterator[str]:
    """The lines of one table; what takes part runs in turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    for turn in range(repeats + 1):
        for name, work in compared.items():
            measured = measure(work, threads)
            shutil.rmtree(out, ignore_errors=True)
            if turn:  # the first brings the files into the cache
                found[name].append(measured)
    yield "| | median s | against the first | lowest, highest ratio of a turn | processor s |"
    yield "|---|---|---|---|---|"
    for name, runs in found.items():
        ratios = sorted(wall / first for (wall, _), (first, _) in zip(runs, found[REFERENCE], strict=True))
        wall, cpu = (statistics.median(numbers) for numbers in zip(*runs, strict=True))
        yield (
            f"| {name} | {wall:.3f} | {statistics.median(ratios):.1f} | {ratios[0]:.1f}, {ratios[-1]:.1f} | {cpu:.3f} |"
        )


def main() -> None:
    """Make or find the experts, read and pack them in turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--numel", type=int, metavar="N", help="parameters of a synthetic model")
    source.add_argument("--experts", type=Path, metavar="DIR", help="with experts.py and the fine-tunes")
    source.add_argument("--built", type=Path, metavar="DIR", help="checkpoints in float32")
    parser.add_argument("--tasks", type=int, default=4, help="of a synthetic model")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="+", default=["signed", "sum", "ties", "least-squares"], choices=METHODS)
    parser.add_argument("--repeats", type=int, default=5, help="5 or more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=0, help="processes to pack on; 0 takes threads")
    arguments = parser.parse_args()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tallstore {__version__}"
    print(f"{os.cpu_count()} processors, {arguments.threads} threads; {versions}", flush=True)
    with built(arguments) as checkpoints:
        for dtype in arguments.dtypes:
            with tempfile.TemporaryDirectory(prefix="tallstore-pack-") as name:
                scratch, cast = Path(name), checkpoints
                if dtype != "float32":
                    cast = scratch / dtype
                    apart(functools.partial(copy_as, getattr(torch, dtype), checkpoints, cast))
                paths = sorted(cast.glob("*/model.safetensors"))
                nbytes = sum(path.stat().st_size for path in paths)
                out = scratch / "bundle"
                compared: dict[str, Work] = {
                    REFERENCE: functools.partial(read, paths, copied=True),
                    "reading: mapped and summed": functools.partial(read, paths, copied=False),
                }
                for method in arguments.methods:
                    compared[f"pack, {method}"] = functools.partial(pack_all, cast, method, out, arguments.workers)
                print(f"\n{dtype}: {len(paths)} files, {nbytes / 1e6:.0f} MB\n", flush=True)
                for line in table(compared, out, arguments.repeats, arguments.threads):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
