"""Bundles whose tensors are of every form that a device decodes, small; and what decoders make of them on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tallstore
from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.payloads import row_count
from tallstore.loading.device_expert import DeviceExpert
from tallstore.loading.device_memory import DeviceMemory
from tallstore.loading.device_pieces import Opener, is_for_device
from tests import reference
from tests.bundle_builder import Bundle, Group, Task
from tests.number_cases import base_patterns, numbers_for, specials

CPU = torch.device("cpu")
NARROW = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
SHARED = ("LOG4", "I8", "F16", "BF16", "F32")
SHAPES = ((13,), (7, 5), (3, 16), (), (2, 3, 2, 2), (30, 40), (3, 500))
LARGE = CHUNK_NUMEL + 8 * 1024 + 7  # rows of 5
R13 = (1.0, -0.75, 0.0, 2.0**-60, 2.0**58, 1 + 2.0**-12, -(1 + 4095 * 2.0**-12), 2.0**-9)


def forms() -> Iterator[tuple[str, str, str | None, dict[str, Any]]]:
    """Kind, dtype of merged, dtype of merged_lo and options of every coded form."""
    for shared, lower in zip(SHARED, (*SHARED[1:], SHARED[0]), strict=True):
        yield "mask", shared, None, {}
        yield "signed", shared, None, {}
        yield "two-level", shared, lower, {}
    yield "sign", "", None, {}
    for dtype in ("F16", "BF16", "F32"):
        yield "sparse", dtype, None, {"values_dtype": dtype}
    for levels in (3, 4, 8, 16):
        yield "uniform", "", None, {"levels": levels}


def vector(group: Group, name: str, role: str, shared: str, random: np.random.Generator) -> None:
    """A shared vector of numbers that are hard on the base's, steps a row where it has steps."""
    base = group.base[name]
    steps = None
    if shared in {"LOG4", "I8"}:
        steps = random.choice([0.0, 0.25, 1.0, 1 + 2.0**-12, 3.0], row_count(tuple(base.shape), 1)).tolist()
    group.vector(name, shared, numbers_for(shared, random, base), steps=steps, role=role)


def codes_for(kind: str, levels: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Bits or fields."""
    return random.integers(-1 if kind == "signed" else 0, {"uniform": levels}.get(kind, 2), count)


def write_bundle(root: Path, base_dtype: torch.dtype, result: torch.dtype, turn: int = 0) -> Bundle:
    """One task with two tensors of every form: with one scale, and with a scale a row and a centre.

    What forms are combined with (shapes, dtypes of the centre) changes from *turn* to turn.
    """
    random = np.random.default_rng(turn)
    base: dict[str, torch.Tensor] = {}
    plans = []
    for index, (kind, shared, lower, options) in enumerate(forms()):
        for by_row in (False, True):
            shape = SHAPES[(len(base) + turn) % len(SHAPES)]
            centre = SHARED[(index + turn) % len(SHARED)] if by_row else None
            name = f"{kind}.{shared}.{by_row}"
            name += f".{options['levels']}" if options.get("levels") else ""
            patterns = base_patterns(random, base_dtype, math.prod(shape))
            base[name] = reference.from_patterns(patterns, base_dtype, shape)
            plans.append((name, kind, {"merged": shared, "merged_lo": lower, "centre": centre}, by_row, options))
    group = Group(root, base)
    task = Task(group, "t")
    for name, kind, roles, by_row, options in plans:
        for role, shared in roles.items():
            if shared and (role == "centre" or kind in {"mask", "signed", "two-level"}):
                vector(group, name, role, shared, random)
        codes = codes_for(kind, options.get("levels", 0), base[name].numel(), random)
        scales = random.choice(R13, row_count(tuple(base[name].shape), 1)).tolist()
        more = dict(options)
        if kind == "sparse":
            near = numbers_for(options["values_dtype"], random, base[name])
            more["own"] = torch.from_numpy(near[np.asarray(codes) == 1])
        more |= {"gains": scales} if by_row else {"gain": scales[0]}
        task.coded(kind, name, codes, dtype=result, **more)
    return Bundle(root, base, [group], [task])


def write_copies(root: Path) -> Bundle:
    """One task whose tensors are stored whole, as in the base, resized or tied; specials in all of them."""
    base = {}
    for name, dtype in {**NARROW, "F64": torch.float64}.items():
        patterns = specials(dtype) * 3
        base[name] = reference.from_patterns(patterns, dtype, [len(patterns) // 8, 8])
    base |= {"ids": torch.arange(5), "flags": torch.tensor([True, False, True]), "empty": torch.empty(0, 3)}
    group = Group(root, base)
    task = Task(group, "t")
    for name, tensor in base.items():
        if name not in NARROW:
            task.same(name)
        task.private(f"own.{name}", tensor.flip(0))
    task.private("count", torch.tensor(-7))
    task.private("complex", torch.tensor([1 + 2j, complex("nan")], dtype=torch.complex64))
    task.same("cast", base="F32", dtype=torch.bfloat16)
    task.same("wide", base="F64", dtype=torch.float16)
    task.alias("tied", "own.BF16")
    for name in ("F16", "F32"):
        group.vector(name, "I8", np.arange(base[name].numel()) % 100, steps=[0.5] * len(base[name]))
        further = torch.full((2, 8), 3.0, dtype=base[name].dtype)
        task.extended(name, "mask", further, len(base[name]), np.arange(base[name].numel()) % 2, gain=0.25)
    task.extended("BF16", "same", torch.full((1, 8), -0.0, dtype=torch.bfloat16), len(base["BF16"]))
    return Bundle(root, base, [group], [task])


def write_unmoved(root: Path, dtype: torch.dtype) -> Bundle:
    """One task whose tensors are the base's, under codes, scales and values of nothing; all have a centre."""
    patterns = specials(dtype)
    count = len(patterns)
    coded: dict[str, tuple[list[int], dict[str, Any]]] = {
        "mask": ([0] * count, {}),
        "signed": ([0] * count, {}),
        "sparse": ([0] * count, {}),
        "zeros": ([2] * count, {"kind": "signed"}),
        "scaled": ([1] * count, {"kind": "mask", "gain": 0.0}),
        "sign": ([1] * count, {"gain": 0.0}),
        "own": ([1] * count, {"kind": "sparse", "own": [0.0] * count}),
        "uniform": ([1] * count, {"levels": 3}),
    }
    base = {name: reference.from_patterns(patterns, dtype, [count]) for name in coded}
    group = Group(root, base)
    task = Task(group, "t")
    for name, (codes, options) in coded.items():
        group.vector(name, "I8", [7] * count, steps=[0.5], role="centre")
        if name in {"mask", "signed", "scaled", "zeros"}:
            group.vector(name, "I8", [0 if name == "zeros" else 9] * count, steps=[1.0])
        task.coded(options.pop("kind", name), name, np.array(codes), **options)
    return Bundle(root, base, [group], [task])


def write_large(root: Path, kinds: Iterable[str]) -> Bundle:
    """One task with tensors of two chunks, rows across the border, and small ones before and behind."""
    random = np.random.default_rng(7)
    base = {kind: torch.from_numpy(random.standard_normal(LARGE).astype(np.float32)).view(-1, 5) for kind in kinds}
    base = {name: tensor.to(torch.bfloat16) for name, tensor in base.items()}
    base |= {"first": torch.ones(3), "last": torch.ones(3)}
    group = Group(root, base)
    task = Task(group, "t", codec="zstd")
    task.private("first", torch.tensor([1.0, 2.0, 3.0]))
    for kind in kinds:
        for role in {"mask": ["merged"], "signed": ["merged"], "two-level": ["merged", "merged_lo"]}.get(kind, []):
            steps = random.choice([0.5, 1.0, 2.0], len(base[kind])).tolist()
            group.vector(kind, "I8", random.integers(-127, 128, LARGE), steps=steps, role=role)
        codes = codes_for(kind, 4, LARGE, random)
        options: dict[str, Any] = {"levels": 4} if kind == "uniform" else {}
        if kind == "sparse":
            options = {"own": torch.from_numpy(random.standard_normal(int(codes.sum()))), "values_dtype": "F16"}
        task.coded(
            kind, kind, codes, gains=random.choice([0.5, 2.0], len(base[kind])).tolist(), expect=False, **options
        )
    task.private("last", torch.tensor([4.0, 5.0, 6.0]))
    return Bundle(root, base, [group], [task])


def on_device(bundle: tallstore.Bundle, decode: Callable[..., None] | None) -> DeviceExpert:
    """The expert of the task "t", decoded on the CPU as if it were another device."""
    expert = bundle._expert("t")
    return DeviceExpert(expert, bundle._files, bundle._pinned(), torch.device("cpu"), decode)


def decoded(root: Path, decode: Callable[..., None], wanted: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of the task "t"."""
    with tallstore.open_bundle(root) as bundle:
        return on_device(bundle, decode).tensors(bundle.keys("t"), None if wanted is None else getattr(torch, wanted))


def remembered(root: Path, decode: Callable[..., None], device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """The coded tensors of the task "t", from a device's memory of what they are made of."""
    with tallstore.open_bundle(root) as bundle:
        expert = bundle._expert("t")
        specs = {name: expert.spec(name) for name in bundle.keys("t")}
        found = {
            name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=device) for name, spec in specs.items()
        }
        targets = {
            name: tensor.view(-1)
            for name, tensor in found.items()
            if is_for_device(expert.task, expert.task.tensor(name), specs[name].dtype)
        }
        memory = DeviceMemory(device, decode, 0)
        memory.hold(Opener(expert.task, bundle._files, bundle._pinned()), targets, {"t"})
        bundle.close()  # nothing is read any more
    for tensor in targets.values():
        tensor.view(torch.uint8).fill_(0xA5)
    memory.write("t")
    return {name: found[name] for name in targets}


def differing(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same, but for the payloads of NaNs."""
    assert found.keys() == expected.keys()
    return [
        name
        for name, tensor in found.items()
        if not torch.equal(tensor.isnan(), expected[name].isnan())
        or not reference.same_bits(tensor[~tensor.isnan()], expected[name][~tensor.isnan()])
    ]


class Net(nn.Module):
    """Parameters of one dtype, of another and not contiguous, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 3, bias=False)
        self.turned = nn.Parameter(torch.zeros(40, 3).t(), requires_grad=False)
        self.narrow = nn.Parameter(torch.zeros(3, 40, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))


def write_net(root: Path) -> Bundle:
    """Tasks "a" and "b" for it."""
    random = np.random.default_rng(3)
    names = ("layer.weight", "turned", "narrow")
    base = {name: torch.from_numpy(random.standard_normal((3, 40))).float() for name in names}
    base["count"] = torch.tensor(1)
    group = Group(root, base)
    tasks = []
    for name in names:
        group.vector(name, "I8", random.integers(-127, 128, 120), steps=[0.5, 0.25, 1.0])
    for number, task in enumerate((Task(group, "a"), Task(group, "b"))):
        for name in names:
            task.mask(name, random.integers(0, 2, 120))
        task.private("count", torch.tensor(10 + number))
        tasks.append(task)
    return Bundle(root, base, [group], tasks)


def holds(model: nn.Module, expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model has these tensors, in its own dtypes."""
    return all(reference.same_bits(t, expected[name].to(t.dtype)) for name, t in model.state_dict().items())
