"""What tests of packing share: models to pack, and the bundle that came of it, verified, opened and read back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tallstore
from tallstore import Emr, LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform
from tallstore.fit import Method
from tallstore.format import bits
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import GroupTable, Role, TaskTable
from tallstore.format.parsing import parse
from tallstore.format.payloads import (
    Coded,
    coded_part,
    gains_of,
    sides_of,
    sparse_values_of,
    vector_step_of,
    vector_values_of,
)
from tallstore.packing import job, shared_vector, stack
from tests.fit_reference import LOG4
from tests.reference import same_bits

Model = dict[str, Tensor]

#: One method of every sort.
METHODS: dict[str, Method] = {
    "signed": SignedMask(),
    "signed rows": SignedMask(scale="row"),
    "tall": TallMask(),
    "tall normalised": TallMask(0.6, normalise=True),
    "tall ties": TallMask.published(),
    "tall mean": TallMask(merge="mean"),
    "emr": Emr("one"),
    "emr published": Emr("published"),
    "least squares": LeastSquares(),
    "two levels": LeastSquares(2),
    "sign": Sign(),
    "sign rows": Sign("row"),
    "sign centred": Sign(centre=True),
    "ternary": Uniform(3),
    "uniform": Uniform(4),
    "uniform tensors": Uniform(8, "tensor"),
    "uniform centred": Uniform(16, centre=True),
    "localize": Localize(0.1),
}
#: Those that code an expert of its own; the others merge two or more.
SINGLE = {"sign", "sign rows", "ternary", "uniform", "uniform tensors", "localize"}
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8, "LOG4": torch.uint8}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normally distributed float32 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def base_model(dtype: torch.dtype = torch.float32) -> Model:
    """Tensors of one to four dimensions, with rows, and with too short ones; and what is not coded."""
    return {
        "block.kernel": normal(13, 8, 3, 17, seed=1).to(dtype),
        "block.weight": normal(70, 65, seed=2).to(dtype),
        "embed.weight": normal(300, 20, seed=3).to(dtype),
        "norm.weight": normal(5003, seed=4).to(dtype),
        "head.bias": normal(7, seed=5).to(dtype),
        "position_ids": torch.arange(12),
        "is_trained": torch.tensor(True),
        "temperature": torch.tensor(2.5, dtype=dtype),
        "nothing": torch.empty(0, 3, dtype=dtype),
    }


def tuned(base: Mapping[str, Tensor], seed: int, scale: float = 0.02) -> Model:
    """A fine-tune: every floating-point tensor moved, by another amount in each row."""
    moved = {}
    for position, (name, tensor) in enumerate(sorted(base.items())):
        if tensor.is_floating_point():
            step = normal(*tensor.shape, seed=1000 * seed + position, scale=scale)
            moved[name] = (tensor.double() + step.double()).to(tensor.dtype)
        else:
            moved[name] = tensor.clone()
    return moved


def experts_of(base: Mapping[str, Tensor], count: int = 3) -> dict[str, Model]:
    """Fine-tunes that went about as far as each other, but not quite."""
    return {name: tuned(base, seed, 0.02 * (1 + seed)) for seed, name in zip(range(count), "abcdefghij", strict=False)}


class Packed:
    """A bundle that was packed: its report, its tables, its payloads, and its experts as a reader gets them."""

    def __init__(self, root: Path, report: tallstore.PackReport, base: Any) -> None:
        self.root, self.report, self.base = root, report, base
        self.files = BundleFiles(root)
        self.manifest = self.files.manifest

    @cached_property
    def states(self) -> dict[str, Model]:
        """Every expert's state dict."""
        with tallstore.open_bundle(self.root, base=self.base) as bundle:
            return {task: bundle.state_dict(task) for task in bundle.tasks}

    @cached_property
    def tables(self) -> dict[str, TaskTable]:
        """Every task.json."""
        return {task.name: self.files.task(task.name).table for task in self.manifest.tasks}

    @cached_property
    def group(self) -> GroupTable:
        """The only group.json."""
        path = "groups/g0001/group.json"
        return parse((self.root / path).read_bytes(), GroupTable, path)

    def entry(self, task: str, name: str) -> Any:
        """A tensor of a task's table; None where the task lacks it."""
        return next((tensor for tensor in self.tables[task].tensors if tensor.name == name), None)

    def kinds(self, task: str) -> dict[str, str]:
        """Kind by tensor name."""
        return {tensor.name: tensor.__struct_config__.tag for tensor in self.tables[task].tensors}

    def codes(self, task: str, name: str) -> Tensor:
        """The codes of a task's tensor, in the shape of its coded rows: bits or fields. uint8."""
        coded = self._coded(task, name)
        stored = sides_of(coded)
        raw = self.files.payload(self.files.task(task), stored).all()
        return torch.from_numpy(bits.unpack(raw, stored.numel, stored.encoding.width)).view(coded.shape)

    def sides(self, task: str, name: str) -> Tensor:
        """What a task's mask or signed mask chose, in the shape of its coded rows: 1, -1 or 0. int8."""
        return torch.tensor([0, 1, -1], dtype=torch.int8)[self.codes(task, name).long()]

    def gains(self, task: str, name: str) -> Tensor:
        """The gains of a task's tensor: one, or one a row. float32."""
        coded = self._coded(task, name)
        stored = gains_of(coded)
        if stored is None:
            return torch.tensor([coded.code.gain], dtype=torch.float32)
        return torch.from_numpy(self.files.payload(self.files.task(task), stored).all().view(np.float32).copy())

    def unit(self, task: str, name: str) -> float:
        """Of the values of a sparse tensor."""
        return self._coded(task, name).code.unit

    def values(self, task: str, name: str) -> Tensor:
        """The values of a sparse tensor, in the dtype that they are stored in."""
        coded = self._coded(task, name)
        stored = sparse_values_of(coded)
        dtype = _DTYPES[coded.code.values_dtype]
        if stored is None:
            return torch.empty(0, dtype=dtype)
        return torch.from_numpy(self.files.payload(self.files.task(task), stored).all().copy()).view(dtype)

    def shared(self, name: str, role: Role = "merged") -> tuple[Tensor, Tensor | None]:
        """Codes of a shared vector of a base tensor, in its shape, and its steps."""
        group = self.files.group("g0001")
        vector, shape = group.vector(name, role), self.files.base[name].shape
        raw = self.files.payload(group, vector_values_of(vector, shape)).all()
        if vector.dtype == "LOG4":
            raw = bits.unpack(raw, math.prod(shape), 4)
        codes = torch.from_numpy(raw.copy()).view(_DTYPES[vector.dtype]).view(shape)
        step = vector_step_of(vector, shape)
        if step is None:
            return codes, None
        return codes, torch.from_numpy(self.files.payload(group, step).all().view(np.float32).copy())

    def stored(self, name: str) -> dict[Role, Tensor]:
        """Every shared vector of a base tensor as a reader sees it at gain one, by role: float32, of its shape."""
        found: dict[Role, Tensor] = {}
        for tensor, role in self.files.group("g0001").vectors:
            if tensor == name:
                codes, steps = self.shared(name, role)
                values = torch.from_numpy(LOG4)[codes.long()] if codes.dtype == torch.uint8 else codes
                values = values.float()
                found[role] = values if steps is None else (values.view(len(steps), -1) * steps[:, None]).view_as(codes)
        return found

    def _coded(self, task: str, name: str) -> Coded:
        coded = coded_part(self.entry(task, name))
        assert coded is not None, (task, name)
        return coded

    def whole(self, task: str) -> dict[str, str]:
        """Why tensors were stored whole, by name, as the report says."""
        packed = next(found for found in self.report.tasks if found.name == task)
        return {stored.tensor: stored.reason for stored in packed.whole}


def pack(base: Any, experts: Mapping[str, Any], root: Path, **options: Any) -> Packed:
    """Pack, check that the bundle breaks no rule, and open it."""
    report = tallstore.pack(base, experts, root, **options)
    assert tallstore.verify(root) == []
    return Packed(root, report, None if options.get("embed_base") else base)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *names: str) -> None:
    """The tensors of those names, or all, have the same dtype, shape and bits."""
    if not names:
        assert sorted(found) == sorted(expected)
    for name in names or expected:
        assert same_bits(found[name], expected[name]), name


def contents(root: Path) -> dict[str, str]:
    """The sha256 of every file under *root*, by path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def forced(monkeypatch: Any, **limits: int) -> None:
    """Set limits of the streaming, so that small tensors take the paths of large ones: no unit holds any.

    Args:
        monkeypatch: pytest's.
        limits: tile, smallest_tile, longest_row (elements), kept, in_memory (bytes).
    """
    places = {
        "tile": (stack, "_TILE_NUMEL"),
        "smallest_tile": (stack, "_SMALLEST_TILE_NUMEL"),
        "longest_row": (stack, "_LONGEST_WHOLE_ROW"),
        "kept": (stack, "_KEPT_NBYTES"),
        "in_memory": (shared_vector, "_IN_MEMORY_NBYTES"),
    }
    monkeypatch.setattr(job, "_UNIT_NUMEL", 0)
    for limit, value in limits.items():
        monkeypatch.setattr(*places[limit], value)
