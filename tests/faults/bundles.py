"""What the fault tests damage: checkpoints with every kind of tensor, and what is in the bundles made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import tallstore

ROWS, COLUMNS = 64, 64  # the fewest elements that are coded
OUTSIDE = frozenset({"README.md", ".gitattributes"})  # the user's to edit

Digests = dict[Path, str]
Weights = dict[str, dict[str, Tensor]]


def small_inputs(root: Path, *, moved: float = 1.0) -> tuple[Path, dict[str, Path]]:
    """A base and two experts with companion files, a few kB each: directories that are made in *root*.

    Packed, "cars" has a coded tensor and one tied to it, private ones in the pool and beside it, and one that equals
    the base's; "birds" has a resized one, and lacks one of the base's.

    Args:
        root: is there already.
        moved: the share of the coded elements in which the experts differ from the base.
    """
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(ROWS, COLUMNS, generator=generator)
    positions = torch.arange(4)
    bias = torch.randn(5, generator=generator)

    def finetuned(further: int) -> Tensor:
        step = 0.01 * torch.randn(ROWS, COLUMNS, generator=generator)
        step *= torch.rand(ROWS, COLUMNS, generator=generator) < moved
        return torch.cat([embed + step, torch.randn(further, COLUMNS, generator=generator)]).bfloat16()

    states = {
        "base": {"embed": embed.bfloat16(), "bias": bias, "positions": positions, "old": torch.ones(3)},
        "cars": {"embed": finetuned(0), "bias": bias + 1, "positions": positions, "old": torch.ones(3)},
        "birds": {"embed": finetuned(2), "bias": bias - 1, "positions": positions, "scale": torch.tensor(2.0)},
    }
    states["cars"]["head"] = states["cars"]["embed"]
    states["cars"]["causal"] = torch.ones(ROWS, COLUMNS, dtype=torch.bool).tril()
    for name, state in states.items():
        (root / name).mkdir()
        torch.save(state, root / name / "pytorch_model.bin")
        (root / name / "config.json").write_text(json.dumps({"of": name}))
    return root / "base", {"cars": root / "cars", "birds": root / "birds"}


def large_inputs(root: Path, *, tensors: int, numel: int) -> tuple[Path, dict[str, Path]]:
    """A base and two experts, each of *tensors* float32 tensors of *numel* elements: safetensors files in *root*."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layer.{i}": torch.randn(numel // 1024, 1024, generator=generator) for i in range(tensors)}
    paths = {}
    for name, step in (("base", 0.0), ("cars", 0.01), ("birds", 0.01)):
        state = {key: weight + step * torch.randn(weight.shape, generator=generator) for key, weight in base.items()}
        paths[name] = root / f"{name}.safetensors"
        save_file(state, paths[name])
    return paths.pop("base"), paths


def protected_files(bundle: Path) -> list[Path]:
    """Every file of *bundle* whose bytes may not change."""
    files = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    return [path for path in files if path.relative_to(bundle).as_posix() not in OUTSIDE]


def digests(root: Path) -> Digests:
    """The sha256 of every file under *root*, by its path there."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(directory: Path) -> list[str]:
    """What is in a directory, hidden or not."""
    return sorted(path.name for path in directory.iterdir())


def load(bundle: Path, base: Path | None = None) -> Weights:
    """The weights of every task."""
    with tallstore.open_bundle(bundle, base=base) as opened:
        return {task: opened.state_dict(task) for task in opened.tasks}


def same(ours: Weights, theirs: Weights) -> bool:
    """Whether two loads gave the same tasks, names, dtypes, shapes and bits."""
    return _bits(ours) == _bits(theirs)


def _bits(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, str], tuple[torch.dtype, torch.Size, bytes]]:
    return {
        (task, name): (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for task, state in weights.items()
        for name, tensor in state.items()
    }
