"""What tests of growing bundles share: a bundle, fine-tunes to add, and what a directory holds, byte by byte."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import tallstore
from tests.packing_cases import Model, normal
from tests.reference import same_bits

BASE: Model = {"norm.weight": normal(40, seed=4), "block.weight": normal(70, 65, seed=2), "ids": torch.arange(5)}


def expert(number: int) -> Model:
    """A fine-tune of the base: its coded tensor moved a little, a small one that is stored whole, one that is kept."""
    return {
        "block.weight": BASE["block.weight"] + normal(70, 65, seed=100 + number, scale=0.01),
        "norm.weight": BASE["norm.weight"] + number + 1,
        "ids": BASE["ids"],
    }


def experts(names: str) -> dict[str, Model]:
    """Fine-tunes by task: a letter each, the same letter always the same."""
    return {name: expert(ord(name)) for name in names}


def packed(path: Path, names: str = "abc", **options: object) -> Path:
    """A bundle of these tasks."""
    tallstore.pack(BASE, experts(names), path, **options)
    return path


def weights(path: Path, names: str | None = None) -> dict[str, dict[str, Tensor]]:
    """What the bundle rebuilds: every task, or these."""
    with tallstore.open_bundle(path, base=BASE) as bundle:
        return {name: bundle.state_dict(name) for name in (bundle.tasks if names is None else names)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


def state(root: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file but the manifest."""
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and path.name != "tallstore.json"
    }
