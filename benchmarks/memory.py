"""Anonymous memory and time of `pack` against the size and the number of its inputs.

    python benchmarks/memory.py [--sizes 256 1024] [--experts 4]
    python benchmarks/memory.py --sizes 256 --experts 2 4 8 16

Memory must not grow with them, and time in proportion. Each pair runs in a process of its own, which reads its RssAnon
every 5 ms. Mapped inputs are not anonymous: the system takes their pages back whenever it wants.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import tallstore

WIDTH = 2048  # of a square tensor; 16 MiB in float32


def write_checkpoints(root: Path, megabytes: int, experts: int) -> None:
    """A random base and random fine-tunes of it, *megabytes* MiB each in float32."""
    generator = torch.Generator().manual_seed(0)
    layers = megabytes * (1 << 20) // (WIDTH * WIDTH * 4)
    base = {f"layers.{layer}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for layer in range(layers)}
    save_file(base, root / "base.safetensors")
    for number in range(experts):
        moved = {name: weight + 0.01 * torch.randn(weight.shape, generator=generator) for name, weight in base.items()}
        save_file(moved, root / f"expert-{number}.safetensors")


def anonymous_nbytes() -> int:
    """This process's anonymous memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon")


def pack_and_watch(root: Path) -> dict[str, float]:
    """Pack what is in *root*; the peak of anonymous memory over what the imports took, and the seconds."""
    experts = {path.stem: path for path in sorted(root.glob("expert-*.safetensors"))}
    before = peak = anonymous_nbytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_nbytes())

    thread = threading.Thread(target=watch)
    thread.start()
    begun = time.perf_counter()
    tallstore.pack(root / "base.safetensors", experts, root / "bundle")
    seconds = time.perf_counter() - begun
    done.set()
    thread.join()
    return {"imports": before, "peak": peak, "seconds": seconds}


def main() -> None:
    """Run every size, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="MiB an expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[4])
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        print(json.dumps(pack_and_watch(arguments.watch)))
        return
    print(
        "| experts | MiB each | peak anonymous MiB | against the first | after the imports | s | s a GiB of experts |"
    )
    print("|---|---|---|---|---|---|---|")
    first = 0.0
    for size, experts in itertools.product(arguments.sizes, arguments.experts):
        with tempfile.TemporaryDirectory(prefix="tallstore-memory-") as name:
            write_checkpoints(Path(name), size, experts)
            command = [sys.executable, __file__, "--watch", name]
            watched = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peak = watched["peak"] / (1 << 20)
        first = first or peak
        print(
            f"| {experts} | {size} | {peak:.0f} | {peak / first:.3f} | {peak - watched['imports'] / (1 << 20):.0f} |"
            f" {watched['seconds']:.1f} | {watched['seconds'] / (experts * size / 1024):.2f} |"
        )


if __name__ == "__main__":
    main()
