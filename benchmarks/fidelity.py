"""How often a packed expert predicts what the true expert predicts, beside the dense float64 formula of the same fit.

    python benchmarks/fidelity.py --experts DIR [--limit 400]

DIR holds fine-tunes and an `experts.py` that builds their checkpoints (`build OUT`) and scores reconstructions
(`score OUT TASK FILE...`). Every expert is packed, loaded back from the bundle's bytes, written with `export`, and
scored.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from dense_fits import DenseFit, signed_mask, tall_mask
from safetensors.torch import load_file, save_file

import tallstore
from tallstore.exporting import export

FITS: dict[str, tuple[tallstore.SignedMask | tallstore.TallMask, DenseFit]] = {
    "SignedMask()": (tallstore.SignedMask(), signed_mask(1.2)),
    "TallMask()": (tallstore.TallMask(), tall_mask(1.0, ties=False, one=True)),
    "TallMask.published()": (tallstore.TallMask.published(), tall_mask(0.4, ties=True, one=False)),
}


@dataclass(frozen=True)
class Row:
    """One fit in one dtype: agreement by task, from the formula and from the bundle, and what the bundle costs."""

    dtype: str
    fit: str
    dense: Mapping[str, float]
    packed: Mapping[str, float]
    accuracy: Mapping[str, float]
    bits: float
    cosine: float
    nbytes: int
    seconds: float


def run_experts(folder: Path, *arguments: str) -> str:
    """What experts.py prints."""
    command = [sys.executable, str(folder / "experts.py"), "--folder", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def score(folder: Path, checkpoints: Path, task: str, files: list[Path], limit: int) -> list[tuple[float, float]]:
    """Agreement and accuracy of each file."""
    printed = run_experts(folder, "score", str(checkpoints), task, *map(str, files), "--limit", str(limit))
    found = re.findall(r"agreement ([0-9.]+) accuracy ([0-9.]+)", printed)
    return [(float(agreement), float(accuracy)) for agreement, accuracy in found]


def copy_as(dtype: torch.dtype, source: Path, target: Path) -> None:
    """The same checkpoints in another dtype."""
    for directory in sorted(path for path in source.iterdir() if path.is_dir()):
        (target / directory.name).mkdir(parents=True)
        weights = {name: value.to(dtype) for name, value in load_file(directory / "model.safetensors").items()}
        save_file(weights, target / directory.name / "model.safetensors", {"format": "pt"})


def measure(folder: Path, checkpoints: Path, dtype: str, limit: int, scratch: Path) -> list[Row]:
    """Pack with every fit, and score against the dense formula."""
    tasks = sorted(path.name for path in checkpoints.iterdir() if path.is_dir() and path.name != "base")
    base = load_file(checkpoints / "base" / "model.safetensors")
    experts = {task: load_file(checkpoints / task / "model.safetensors") for task in tasks}
    files: dict[str, list[Path]] = {task: [] for task in tasks}
    reports, seconds = {}, {}
    for number, (name, (method, dense)) in enumerate(FITS.items()):
        for task, weights in dense(base, experts).items():
            path = scratch / f"{dtype}-{number}-{task}-dense.safetensors"
            save_file(weights, path)
            files[task].append(path)
        bundle_path = scratch / f"{dtype}-{number}"
        begun = time.perf_counter()
        reports[name] = tallstore.pack(
            checkpoints / "base", {task: checkpoints / task for task in tasks}, bundle_path, method=method
        )
        seconds[name] = time.perf_counter() - begun
        with tallstore.open_bundle(bundle_path, base=checkpoints / "base") as bundle:
            for task in tasks:
                out = scratch / f"{dtype}-{number}-{task}-packed"
                export(bundle, task, out)
                files[task].append(out / "model.safetensors")
    scores = {task: score(folder, checkpoints, task, files[task], limit) for task in tasks}
    rows = []
    for number, (name, report) in enumerate(reports.items()):
        rows.append(
            Row(
                dtype=dtype,
                fit=name,
                dense={task: 100 * scores[task][2 * number][0] for task in tasks},
                packed={task: 100 * scores[task][2 * number + 1][0] for task in tasks},
                accuracy={task: 100 * scores[task][2 * number + 1][1] for task in tasks},
                bits=statistics.mean(task.bits or 0.0 for task in report.tasks),
                cosine=statistics.mean(task.cosine or 0.0 for task in report.tasks),
                nbytes=report.bundle_nbytes,
                seconds=seconds[name],
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Markdown."""
    tasks = list(rows[0].packed)
    lines = [
        "| dtype | fit | "
        + " | ".join(tasks)
        + " | mean | dense float64 mean | difference | bits a parameter | cosine | bundle MB | pack s |",
        "|---" * (len(tasks) + 9) + "|",
    ]
    for row in rows:
        packed, dense = statistics.mean(row.packed.values()), statistics.mean(row.dense.values())
        cells = " | ".join(f"{row.packed[task]:.2f} ({row.dense[task]:.2f})" for task in tasks)
        lines.append(
            f"| {row.dtype} | {row.fit} | {cells} | {packed:.2f} | {dense:.2f} | {packed - dense:+.2f} |"
            f" {row.bits:.2f} | {row.cosine:.4f} | {row.nbytes / 1e6:.1f} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Build, pack, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path, required=True, help="a folder with experts.py and the fine-tunes")
    parser.add_argument("--limit", type=int, default=400, help="test examples a task")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tallstore-fidelity-") as scratch_name:
        scratch = Path(scratch_name)
        wide = scratch / "float32"
        run_experts(arguments.experts, "build", str(wide))
        rows = measure(arguments.experts, wide, "float32", arguments.limit, scratch)
        narrow = scratch / "bfloat16"
        copy_as(torch.bfloat16, wide, narrow)
        rows += measure(arguments.experts, narrow, "bfloat16", arguments.limit, scratch)
        print("Agreement with the true expert in %, from the bundle (from the dense float64 formula):\n")
        print(table(rows))


if __name__ == "__main__":
    main()
