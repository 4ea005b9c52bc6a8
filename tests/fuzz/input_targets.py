"""Checkpoints that are given to be packed, or as a base: whoever made them."""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path

import torch

from tallstore.checkpoints import Checkpoint, open_checkpoint
from tallstore.errors import TallstoreError
from tests.fuzz import seeds
from tests.fuzz.outcomes import Broken, typed

_MAX_NBYTES = 32 << 20


def write_old(path: Path, content: bytes) -> None:
    """Write a file as if it had long been there: of a new one, a reader waits until it is surely complete."""
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))


def read_all(path: Path) -> None:
    """Open a checkpoint and read what it says it has."""
    opened = typed(lambda: open_checkpoint(path))
    if not isinstance(opened, Checkpoint):
        return
    with opened:
        total = sum(opened.spec(name).nbytes for name in opened.names)
        if total > _MAX_NBYTES:
            raise Broken(f"a file of a few kB is said to hold {total} bytes")
        for name in opened.names:
            read = typed(lambda name=name: opened.read(name))
            if not isinstance(read, TallstoreError) and read.numel() != opened.spec(name).numel:
                raise Broken(f"{name!r} has other elements than it said")


class Checkpoints:
    """One .safetensors file."""

    def __init__(self, place: Path) -> None:
        self._path = place / "model.safetensors"

    def __call__(self, data: bytes) -> None:
        """Write it, open it, read all of it."""
        write_old(self._path, data)
        read_all(self._path)


def checkpoint_seeds() -> list[bytes]:
    """Small files, tensors included."""
    found = [path.read_bytes() for path in sorted(seeds.VECTORS.rglob("*.safetensors"))]
    return sorted({raw for raw in found if len(raw) < 1 << 14})


class TorchFiles:
    """One file of torch.save."""

    def __init__(self, place: Path) -> None:
        self._path = place / "model.pt"

    def __call__(self, data: bytes) -> None:
        """Write it, open it, read all of it."""
        write_old(self._path, data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_all(self._path)


def torch_seeds() -> list[bytes]:
    """State dicts in both of torch's formats, plain, tied, expanded and nested; and pickles that are none."""
    weight = torch.arange(6.0).reshape(2, 3)
    states: list[object] = [
        {"w": weight, "tied": weight, "view": weight[1], "half": weight.half(), "ids": torch.arange(3)},
        {"state_dict": {"w": weight.t(), "b": torch.ones(1).expand(4), "flag": torch.tensor(data=True)}},
        {"w": weight, "step": 3},
        [weight],
        {1: weight},
        {"q": torch.nn.Linear(2, 2)},
    ]
    found = []
    for state in states:
        for is_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(state, buffer, _use_new_zipfile_serialization=is_zip)
            found.append(buffer.getvalue())
    return found


class Indices:
    """A directory: an index of shards, or a config, by the first byte; beside shards that are sound."""

    def __init__(self, place: Path) -> None:
        self._place = place
        source = seeds.VECTORS / "valid" / "base-sharded" / "bundle" / "base"
        for path in source.glob("*.safetensors"):
            (place / path.name).write_bytes(path.read_bytes())
        self._names = ("model.safetensors.index.json", "config.json", "pytorch_model.bin.index.json")

    def __call__(self, data: bytes) -> None:
        """Write it, open the directory, read all of it."""
        for name in self._names:
            (self._place / name).unlink(missing_ok=True)
        write_old(self._place / self._names[data[0] % 3 if data else 0], data[1:])
        read_all(self._place)


def index_seeds() -> list[bytes]:
    """Indices and configs."""
    index = (seeds.VECTORS / "valid" / "base-sharded" / "bundle" / "base" / "model.safetensors.index.json").read_bytes()
    configs = [{"quantization_config": {"quant_method": "gptq"}}, {"model_type": "bert"}, []]
    return [b"\0" + index, b"\2" + index, *(b"\1" + json.dumps(each).encode() for each in configs)]
