"""What others make of the same experts: bytes, and how often what comes back predicts what the true expert predicts.

    pip install zipnn==0.5.4 deltatensors==0.2.0 fireworks-delta-compression==0.1.0 peft==0.21.2
    python benchmarks/peers.py --experts DIR [--examples 400] [--dtypes float32 bfloat16] [--only TEXT]

DIR is as for fidelity.py. Every peer writes its files, reads them back, and is scored on what came back; one that
returns every bit is not scored, it agrees always. A peer that is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from fidelity import copy_as, run_experts, score
from peer_stores import Expert, Peer, peers
from safetensors.torch import load_file, save_file
from torch import Tensor

import tallstore
from tallstore.exporting import export
from tallstore.fit import Method

METHODS = {
    "tallstore, Uniform(levels=16)": tallstore.Uniform(levels=16),
    "tallstore, Uniform(levels=8)": tallstore.Uniform(levels=8),
    "tallstore, TallMask()": tallstore.TallMask(),
    "tallstore, SignedMask()": tallstore.SignedMask(),
    "tallstore, Sign(scale='row')": tallstore.Sign(scale="row"),
}


@dataclass(frozen=True)
class Cost:
    """One way to store one expert: bytes beside the base, and agreement in percent (None: every bit came back)."""

    nbytes: float
    agreement: float | None


@dataclass(frozen=True)
class Row:
    """One way to store all experts."""

    name: str
    release: str
    costs: tuple[Cost, ...]


@dataclass(frozen=True)
class Trial:
    """The experts of one dtype: where they are scored from, built in float32 with configs, and stored as."""

    folder: Path
    wide: Path
    checkpoints: Path
    examples: int

    def agreements(self, task: str, files: list[Path]) -> list[float]:
        """Percent of each file, against the task's expert."""
        scores = score(self.folder, self.checkpoints, task, files, self.examples) if files else []
        return [100 * agreement for agreement, _ in scores]


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def measure_peers(trial: Trial, chosen: list[Peer], task: str) -> list[Cost]:
    """What each of *chosen* makes of one task."""
    expert = Expert(trial.checkpoints / "base", trial.checkpoints / task, trial.wide / "base")
    truth = load_file(expert.finetuned_file)
    sizes, scored = [], {}
    with tempfile.TemporaryDirectory(prefix="tallstore-peers-") as scratch:
        for number, peer in enumerate(chosen):
            place = Path(scratch) / str(number)
            place.mkdir()
            stored = peer.store(expert, place)
            sizes.append(stored.nbytes)
            if not same_bits(stored.weights, truth):
                scored[number] = place / "back.safetensors"
                save_file({name: value.contiguous() for name, value in stored.weights.items()}, scored[number])
        found = dict(zip(scored, trial.agreements(task, list(scored.values())), strict=True))
    return [Cost(size, found.get(number)) for number, size in enumerate(sizes)]


def measure_bundle(trial: Trial, method: Method, tasks: list[str]) -> list[Cost]:
    """Each task's equal share of one bundle, companion files left out as they are for the peers."""
    with tempfile.TemporaryDirectory(prefix="tallstore-peers-") as scratch:
        path, base = Path(scratch) / "bundle", trial.checkpoints / "base"
        tallstore.pack(base, {task: trial.checkpoints / task for task in tasks}, path, method=method)
        files = [file for file in path.rglob("*") if file.is_file() and file.parent.name != "files"]
        share = sum(file.stat().st_size for file in files) / len(tasks)
        costs = []
        with tallstore.open_bundle(path, base=base) as bundle:
            for task in tasks:
                export(bundle, task, Path(scratch) / task)
                costs.append(Cost(share, trial.agreements(task, [Path(scratch) / task / "model.safetensors"])[0]))
    return costs


def table(rows: list[Row], parameters: int) -> str:
    """Markdown, the largest first."""
    lines = [
        "| stored as | with | MB an expert | bits a parameter | agreement % | worst task % |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -statistics.mean(cost.nbytes for cost in row.costs)):
        nbytes = statistics.mean(cost.nbytes for cost in row.costs)
        lossy = [cost.agreement for cost in row.costs if cost.agreement is not None]
        agreements = [100.0 if cost.agreement is None else cost.agreement for cost in row.costs]
        told = f"{statistics.mean(agreements):.2f} | {min(agreements):.2f}" if lossy else "exact | exact"
        lines.append(f"| {row.name} | {row.release} | {nbytes / 1e6:.2f} | {8 * nbytes / parameters:.2f} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Build, store, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path, required=True, help="a folder with experts.py and the fine-tunes")
    parser.add_argument("--examples", type=int, default=400, help="test examples a task")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"], help="of all experts"
    )
    parser.add_argument("--only", default="", help="leave out what has not this text in its name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tallstore-peers-") as scratch:
        wide = Path(scratch) / "float32"
        run_experts(arguments.experts, "build", str(wide))
        tasks = sorted(path.name for path in wide.iterdir() if path.is_dir() and path.name != "base")
        parameters = sum(value.numel() for value in load_file(wide / "base" / "model.safetensors").values())
        print(f"{len(tasks)} experts, {parameters:,} parameters; Python {platform.python_version()}")
        for dtype in arguments.dtypes:
            trial = Trial(arguments.experts, wide, Path(scratch) / dtype, arguments.examples)
            if dtype != "float32":
                copy_as(getattr(torch, dtype), wide, trial.checkpoints)
            wanted = [peer for peer in peers(dtype) if arguments.only in peer.name]
            for reason in filter(None, (peer.missing() for peer in wanted)):
                print(reason, file=sys.stderr)
            chosen = [peer for peer in wanted if peer.missing() is None]
            costs = [measure_peers(trial, chosen, task) for task in tasks]
            rows = [
                Row(peer.name, peer.release(), tuple(of_task[number] for of_task in costs))
                for number, peer in enumerate(chosen)
            ]
            for name in (name for name in METHODS if arguments.only in name):
                shares = measure_bundle(trial, METHODS[name], tasks)
                rows.append(Row(name, f"tallstore {tallstore.__version__}", tuple(shares)))
            print(f"\nExperts in {dtype}:\n\n{table(rows, parameters)}", flush=True)


if __name__ == "__main__":
    main()
