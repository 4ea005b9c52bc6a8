"""What packing a large model on an executor costs: the workers, the process that calls `pack`, and the disk.

    python benchmarks/workers.py [--tasks 20] [--parameters 70_000_000_000] [--workers 64] [--rows 8192 --columns 7168]

One matrix in bfloat16, as large models have hundreds of, with weights of standard deviation 0.02 and fine-tunes that
moved them by 3 % of that, packed by one process of an executor with one thread. Measured there: processor time and the
peak of anonymous memory. Measured here: the processor time of gathering what was packed and writing the bundle. The
second table takes the same for each element of a model of so many parameters, on so many workers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import anonymous_nbytes
from safetensors.torch import save_file

import tallstore

WEIGHT, MOVE = 0.02, 0.0006
EXPERT = "expert-{:02d}"


peak = 0  # of the anonymous memory of a worker, in bytes


@dataclass(frozen=True)
class Measured:
    """What one matrix took.

    Attributes:
        elements: of the matrix, times the number of tasks.
        worker, caller: processor seconds.
        peak: anonymous memory of the worker, in bytes.
        shared, own: bytes of what the tasks share, and of what each has of its own.
    """

    elements: int
    worker: float
    caller: float
    peak: int
    shared: int
    own: float


def write_checkpoints(root: Path, rows: int, columns: int, tasks: int) -> None:
    """The matrix of a base, and of its fine-tunes."""
    generator = torch.Generator().manual_seed(0)
    base = (WEIGHT * torch.randn(rows, columns, generator=generator)).bfloat16()
    save_file({"weight": base}, root / "base.safetensors")
    for task in range(tasks):
        moved = base.float() + MOVE * torch.randn(rows, columns, generator=generator)
        save_file({"weight": moved.bfloat16()}, root / f"{EXPERT.format(task)}.safetensors")


def used() -> float:
    """Processor seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def watch() -> None:
    """Keep the peak of this process's anonymous memory from now on."""

    def look() -> None:
        global peak  # noqa: PLW0603 - a process has one
        while True:
            peak = max(peak, anonymous_nbytes())
            time.sleep(0.02)

    threading.Thread(target=look, daemon=True).start()


def told() -> tuple[float, int]:
    """Processor seconds and peak of this process."""
    return used(), peak


def measure(root: Path, tasks: int) -> Measured:
    """Pack what is in *root* on a worker, when both sides have imported what they need."""
    base, small = root / "base.safetensors", {"weight": torch.randn(100, 100)}
    experts = {EXPERT.format(task): root / f"{EXPERT.format(task)}.safetensors" for task in range(tasks)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), watch) as pool:
        tallstore.pack(small, {name: {"weight": torch.randn(100, 100)} for name in "ab"}, root / "warm", executor=pool)
        before, here = pool.submit(told).result()[0], used()
        tallstore.pack(base, experts, root / "bundle", executor=pool)
        here = used() - here
        after, highest = pool.submit(told).result()
    files = {path: path.stat().st_size for path in (root / "bundle").rglob("*") if path.is_file()}
    shared = sum(size for path, size in files.items() if "groups" in path.parts)
    elements = tasks * base.stat().st_size // 2
    return Measured(elements, after - before, here, highest, shared, (sum(files.values()) - shared) / tasks)


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--parameters", type=int, default=70_000_000_000)
    parser.add_argument("--workers", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tallstore {tallstore.__version__}"
    print(f"{os.cpu_count()} processors; {versions}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="tallstore-workers-") as name:
        write_checkpoints(Path(name), arguments.rows, arguments.columns, arguments.tasks)
        found = measure(Path(name), arguments.tasks)
    numel = found.elements / arguments.tasks
    print("| measured, on one matrix | |\n|---|---|")
    print(f"| elements of all experts | {found.elements / 1e9:.2f} G |")
    print(f"| worker, ns an element | {1e9 * found.worker / found.elements:.1f} |")
    print(f"| caller, ns an element | {1e9 * found.caller / found.elements:.2f} |")
    print(f"| worker, peak anonymous MiB | {found.peak / (1 << 20):.0f} |")
    print(f"| bits a parameter, shared | {8 * found.shared / numel:.2f} |")
    print(f"| bits a parameter, each task's own | {8 * found.own / numel:.2f} |")
    times = arguments.parameters / numel
    print(f"\n| {arguments.parameters / 1e9:.1f} G parameters, {arguments.tasks} experts, by multiplication | |\n|-|-|")
    print(
        f"| checkpoints in bfloat16, the base too, GB | {2 * arguments.parameters * (arguments.tasks + 1) / 1e9:,.0f} |"
    )
    print(f"| bundle, GB | {times * (found.shared + arguments.tasks * found.own) / 1e9:,.0f} |")
    print(f"| of which each expert's own, GB | {times * found.own / 1e9:,.1f} |")
    print(f"| workers, processor hours | {times * found.worker / 3600:,.1f} |")
    print(f"| on {arguments.workers} workers, minutes | {times * found.worker / arguments.workers / 60:,.1f} |")
    print(f"| caller, processor minutes | {times * found.caller / 60:,.1f} |")


if __name__ == "__main__":
    main()
