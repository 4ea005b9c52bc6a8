"""Time to load one expert against the number of tasks in its bundle: it must not grow with them.

    python benchmarks/growth.py [--tasks 2 8 32 128] [--numel 2_000_000] [--repeats 9] [--threads N]

A random base and random fine-tunes of it, float32, packed with the default method into a bundle for each number of
tasks. Loads are as in load.py: `open_bundle` and `state_dict` of one task, each in a forked process of its own, in
turns, files in the page cache, hashes compared. Beside it, what one load reads, the base included, and the same without
the manifest, which lists all tasks.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from functools import partial
from operator import truediv
from pathlib import Path

import torch
from apart import apart
from load import Loader, load_expert, rounds
from safetensors.torch import save_file

from tallstore import __version__, open_bundle, pack
from tallstore.format import layout

WIDTH = 512
TASK = "task-{:03d}"


def write_checkpoints(root: Path, tasks: int, numel: int) -> None:
    """A base and as many fine-tunes of it, in square layers."""
    generator = torch.Generator().manual_seed(0)
    layers = max(1, numel // WIDTH**2)
    base = {f"layers.{layer}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for layer in range(layers)}
    save_file(base, root / "base.safetensors")
    for number in range(tasks):
        moved = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_file(moved, root / f"{TASK.format(number)}.safetensors")


def bundle_of(root: Path, tasks: int) -> Path:
    """Where the bundle of so many tasks is."""
    return root / f"bundle-{tasks}"


def write_bundle(root: Path, tasks: int) -> None:
    """Pack the first of the checkpoints."""
    experts = {name: root / f"{name}.safetensors" for name in map(TASK.format, range(tasks))}
    pack(root / "base.safetensors", experts, bundle_of(root, tasks))


def bytes_read(bundle: Path, base: Path) -> tuple[int, int]:
    """By one load, and by that alone once the bundle is open."""
    with open_bundle(bundle, base=base) as opened:
        opened.state_dict(TASK.format(0))
        return opened.bytes_read, opened.bytes_read - (bundle / layout.MANIFEST).stat().st_size


def main() -> None:
    """Pack the bundles, load from each in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--numel", type=int, default=2_000_000, help="parameters of an expert")
    parser.add_argument("--repeats", type=int, default=9, help="5 or more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tallstore {__version__}"
    print(f"{os.cpu_count()} processors, {arguments.threads} threads; {versions}", flush=True)
    with tempfile.TemporaryDirectory(prefix="tallstore-growth-") as name:
        root, base = Path(name), Path(name) / "base.safetensors"
        apart(partial(write_checkpoints, root, max(arguments.tasks), arguments.numel))
        for tasks in arguments.tasks:
            apart(partial(write_bundle, root, tasks))
        compared = [
            Loader(
                str(tasks),
                partial(partial, load_expert, bundle_of(root, tasks), base, TASK.format(0), "first-read"),
                (),
            )
            for tasks in arguments.tasks
        ]
        rounds(compared, 1, arguments.threads, cold=False)  # fills the page cache
        found = rounds(compared, arguments.repeats, arguments.threads, cold=False)
        walls = {tasks: [measured.wall for measured in found[str(tasks)]] for tasks in arguments.tasks}
        print(f"\n{base.stat().st_size / 4e6:.1f} M parameters an expert, medians of {arguments.repeats}\n")
        print("| tasks | load ms | against the first | lowest, highest ratio of a turn | MB read | less the manifest |")
        print("|---|---|---|---|---|---|")
        for tasks, seconds in walls.items():
            ratios = sorted(map(truediv, seconds, walls[arguments.tasks[0]]))
            read, own = apart(partial(bytes_read, bundle_of(root, tasks), base))
            print(
                f"| {tasks} | {1e3 * statistics.median(seconds):.1f} | {statistics.median(ratios):.2f} |"
                f" {ratios[0]:.2f}, {ratios[-1]:.2f} | {read / 1e6:.2f} | {own / 1e6:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
