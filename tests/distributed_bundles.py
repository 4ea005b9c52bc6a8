"""What ranks load: bundles of every form and kind, beside the experts as this process rebuilds them whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import tallstore
from tests.bundle_builder import Bundle, Group, Task
from tests.device_cases import write_bundle, write_large
from tests.distributed_ranks import new_net
from tests.packing_cases import normal, tuned

KINDS = ("mask", "signed", "two-level", "sign", "sparse", "uniform")


def write_all(root: Path) -> None:
    """Every bundle that a case asks for, with its expert in a file beside it."""
    write_bundle(root / "forms", torch.bfloat16, torch.bfloat16).seal()
    write_kinds(root / "kinds").seal()
    write_large(root / "large", KINDS).seal()
    for name in ("forms", "kinds", "large"):
        with tallstore.open_bundle(root / name) as bundle:
            torch.save(bundle.state_dict("t"), root / f"{name}.pt")
    write_wide(root)
    write_net(root)


def write_kinds(root: Path) -> Bundle:
    """One task with tensors that are stored in other ways than by a code alone, and tied ones."""
    random = np.random.default_rng(5)
    base = {
        "mask": normal(9, 14, seed=1),
        "leading": normal(6, 11, seed=2),
        "kept": normal(5, 6, seed=3),
        "kept in bfloat16": normal(5, 6, seed=4),
        "grown": normal(4, 7, seed=5),
        "gone": normal(3, seed=6),
    }
    group = Group(root, base)
    task = Task(group, "t")
    for name in ("mask", "leading"):
        group.vector(name, "F32", normal(*base[name].shape, seed=7))
    task.mask("mask", random.integers(0, 2, 9 * 14))
    task.alias("tied to mask", "mask")
    task.extended("leading", "mask", normal(3, 11, seed=8), 6, random.integers(0, 2, 6 * 11))
    task.extended("grown", "same", normal(5, 7, seed=9), 4)
    task.same("kept")
    task.same("kept in bfloat16", dtype=torch.bfloat16)
    task.private("integers", torch.arange(35).view(5, 7))
    task.private("cube", normal(3, 4, 5, seed=10))
    task.private("scalar", torch.tensor(3.5, dtype=torch.float64))
    task.private("flag", torch.tensor(True))
    task.private("nothing", torch.empty(0, 3))
    task.dropped("gone")
    return Bundle(root, base, [group], [task])


def write_wide(root: Path) -> None:
    """A tensor of four chunks; and a copy of its bundle with one changed byte in the last of them."""
    base = {"wide": normal(4096, 1024, seed=11).bfloat16()}
    experts = {"t": tuned(base, 1), "u": tuned(base, 2)}
    for name in ("wide", "broken"):
        save_file(base, root / f"{name}-base.safetensors")
    tallstore.pack(base, experts, root / "wide")
    shutil.copytree(root / "wide", root / "broken")
    (shard,) = (root / "broken" / "tasks" / "t").glob("mask-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) * 7 // 8] ^= 1
    shard.write_bytes(content)


def write_net(root: Path) -> None:
    """Two experts of the model that the ranks cut."""
    base = new_net().state_dict()
    save_file({name: tensor for name, tensor in base.items() if name != "head.weight"}, root / "net-base.safetensors")
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", 1)}
    for expert in experts.values():
        expert["head.weight"] = expert["embed.weight"]
    tallstore.pack(base, experts, root / "net")
