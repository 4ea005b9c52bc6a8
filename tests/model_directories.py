"""Small checkpoints on disk, as people have them: a base and its fine-tunes in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import tallstore

COMPANIONS = {
    "config.json": {"model_type": "tiny"},
    "modules.json": [{"path": ""}, {"path": "1_Pooling"}],
    "1_Pooling/config.json": {"pooling": "mean"},
}


def base_tensors() -> dict[str, Tensor]:
    """One tensor that is worth a code, and others."""
    generator = torch.Generator().manual_seed(0)
    return {
        "block.weight": torch.randn(80, 64, generator=generator),
        "frozen.weight": torch.randn(70, 60, generator=generator),
        "embed.weight": torch.randn(90, 50, generator=generator),
        "norm.bias": torch.randn(64, generator=generator),
        "steps": torch.arange(4),
    }


def expert_tensors(seed: int) -> dict[str, Tensor]:
    """A fine-tune with a head of its own, a larger vocabulary, and without the norm."""
    generator = torch.Generator().manual_seed(seed)
    tensors = base_tensors()
    for name in ("block.weight", "embed.weight"):
        tensors[name] = tensors[name] + 0.01 * torch.randn(tensors[name].shape, generator=generator)
    tensors["embed.weight"] = torch.cat([tensors["embed.weight"], torch.randn(2, 50, generator=generator)])
    tensors["head.weight"] = torch.randn(2 + seed, 64, generator=generator)
    del tensors["norm.bias"]
    return tensors


def save_model(directory: Path, tensors: Mapping[str, Tensor], companions: bool = True) -> Path:
    """Write one checkpoint, with its companion files; its directory."""
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
    for name, content in COMPANIONS.items() if companions else ():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    return directory


def save_models(root: Path, count: int = 3) -> Path:
    """Write ``root/base``, ``root/task1``, ``root/task2`` …; their folder."""
    save_model(root / "base", base_tensors())
    for seed in range(1, count + 1):
        save_model(root / f"task{seed}", expert_tensors(seed))
    return root


def pack_models(models: Path, out: Path, **options: object) -> Path:
    """Pack what `save_models` wrote; the bundle."""
    experts = {path.name: path for path in sorted(models.glob("task*"))}
    tallstore.pack(models / "base", experts, out, **options)
    return out
