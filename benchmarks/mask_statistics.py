"""Seconds and memory that `bundle.statistics()` takes, and the seconds of `bundle.consensus()` beside it.

    python benchmarks/mask_statistics.py [--tasks 20] [--millions 10] [--method tall signed localize]

A random base and random fine-tunes of it in bfloat16 are written to a temporary directory (2 bytes a parameter each)
and packed. The statistics run in a process of their own, which has no torch, each time on a bundle that was just
opened: every byte is verified. The files are in the system's cache. Masks of random task vectors are about as dense as
real ones of the same method.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 3
WIDTH = 2048  # of a square tensor: 4.2 million parameters, four chunks


def write_checkpoints(root: Path, layers: int, tasks: int) -> dict[str, Path]:
    """A base in *root*, and fine-tunes of it by task."""
    import torch  # noqa: PLC0415 - the process that counts has none
    from safetensors.torch import save_file  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{layer}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for layer in range(layers)}
    save_file({name: tensor.bfloat16() for name, tensor in base.items()}, root / "base.safetensors")
    experts = {}
    for task in range(tasks):
        moved = {}
        for name, tensor in base.items():
            step = torch.randn(WIDTH, WIDTH, generator=generator)
            moved[name] = step.mul_(0.05).add_(tensor).bfloat16()
        experts[f"task-{task:02}"] = root / f"{task}.safetensors"
        save_file(moved, experts[f"task-{task:02}"])
    return experts


def peak_nbytes() -> int:
    """This process's largest memory so far, files that it maps included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell VmHWM")


def measure(bundle: Path) -> dict[str, float]:
    """Count, a few times; the least seconds, and what it found."""
    from tallstore.format.bundle_files import BundleFiles  # noqa: PLC0415 - before torch, if there is any
    from tallstore.inspecting.statistics import measure_masks  # noqa: PLC0415

    before, seconds = peak_nbytes(), []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        found = measure_masks(BundleFiles(bundle))
        seconds.append(time.perf_counter() - begun)
    memory = peak_nbytes() - before
    return {"seconds": min(seconds), "memory": memory, "numel": found.numel, "density": found.density or 0.0}


def consensus_seconds(bundle: Path, base: Path) -> float:
    """The least seconds of a few runs, each on a bundle that was just opened."""
    import tallstore  # noqa: PLC0415 - not in the process that counts

    seconds = []
    for _ in range(REPEATS):
        with tallstore.open_bundle(bundle, base=base) as opened:
            begun = time.perf_counter()
            opened.consensus()
            seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> None:
    """Pack with every method, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--millions", type=int, default=10, help="parameters of a task, about")
    parser.add_argument("--method", nargs="+", choices=["tall", "signed", "localize"], default=["tall", "signed"])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    import tallstore  # noqa: PLC0415 - not in the process that counts

    methods = {"tall": tallstore.TallMask(), "signed": tallstore.SignedMask(), "localize": tallstore.Localize(0.05)}
    print("| method | tasks | parameters each | density % | masks MB | statistics s | its memory MiB | consensus s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="tallstore-statistics-") as name:
        root = Path(name)
        experts = write_checkpoints(root, max(1, round(arguments.millions * 1e6 / WIDTH**2)), arguments.tasks)
        for method in arguments.method:
            bundle, base = root / method, root / "base.safetensors"
            tallstore.pack(base, experts, bundle, method=methods[method])
            command = [sys.executable, __file__, "--measure", str(bundle)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            nbytes = sum(path.stat().st_size for path in bundle.glob("tasks/*/mask-*"))
            consensus = f"{consensus_seconds(bundle, base):.2f}" if method == "tall" else "–"
            print(
                f"| {method} | {arguments.tasks} | {found['numel']:,} | {100 * found['density']:.1f} |"
                f" {nbytes / 1e6:.0f} | {found['seconds']:.2f} | {found['memory'] / (1 << 20):.0f} | {consensus} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
