"""Small bundles for tests, put together from the format layer: what the format allows, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from tallstore import files
from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from tallstore.format import bits, encodings, layout, manifest, parsing, tables
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import Encoding
from tallstore.format.payloads import row_count
from tallstore.format.shard_writer import ShardWriter
from tests import reference

METHOD = manifest.Method(name="test", parameters={})
TENSORS = {kind.__struct_config__.tag: kind for kind in get_args(manifest.CodedTensor)}
CODES = {kind.__struct_config__.tag: kind for kind in get_args(manifest.RowsCode)}


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """The little-endian bytes of a tensor's elements."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


@dataclass
class Shared:
    """A shared vector as the reference takes it."""

    values: list[float]
    steps: list[float] | None
    row_axes: int


class Owner:
    """What groups and tasks have in common: a directory with shards."""

    def __init__(self, root: Path, directory: str, codec: str | None) -> None:
        self.root, self.directory, self.codec = root, directory, codec
        (root / directory).mkdir(parents=True)
        self.writer = ShardWriter(root / directory)

    def store(
        self, stem: str, key: str, encoding: Encoding, units: np.ndarray, numel: int, *, ranked: bool = False
    ) -> manifest.Payload:
        """Write a payload: one code a byte where an element takes less, else the elements' bytes."""
        if self.codec is None:
            decoded = bits.pack(units, encoding.width) if encoding.width < 8 else units
            return self.writer.whole(stem, key, encoding, numel, decoded, ranked=ranked)
        codec = "zstd" if self.codec == "planes-zstd" and not encoding.is_float else self.codec
        writer = self.writer.payload(stem, key, encoding, codec, ranked=ranked)
        writer.append(units)
        return writer.finish()

    def singles(self, stem: str, key: str, encoding: Encoding, numbers: Sequence[float]) -> manifest.Payload:
        """Write float32 numbers."""
        units = np.asarray(numbers, np.float32).view(np.uint8)
        return self.store(stem, key, encoding, units, len(numbers))


class Group(Owner):
    """A group that is being written."""

    def __init__(self, root: Path, base: Mapping[str, Tensor], number: int = 1, codec: str | None = None) -> None:
        self.id, self.base = f"g{number:04d}", base
        super().__init__(root, layout.group_directory(self.id), codec)
        self.vectors: list[manifest.Vector] = []
        self.shared: dict[tuple[str, str], Shared] = {}

    def vector(
        self,
        tensor: str,
        dtype: str,
        numbers: np.ndarray | Tensor,
        *,
        steps: Sequence[float] | None = None,
        row_axes: int = 1,
        role: str = "merged",
    ) -> None:
        """Add a shared vector: codes for LOG4 and I8, values otherwise."""
        numel = math.prod(self.base[tensor].shape)
        if dtype in tables.STEPPED:
            codes = np.asarray(numbers).reshape(-1)
            units = codes.astype(np.uint8) if dtype == "LOG4" else codes.astype(np.int8).view(np.uint8)
            values = [reference.log4(code) if dtype == "LOG4" else float(code) for code in codes.tolist()]
        else:
            stored = torch.as_tensor(numbers).to(TORCH_DTYPES[dtype])
            units, values = raw_bytes(stored), stored.view(-1).tolist()
        step = None
        if steps is not None:
            step = self.singles("merged", f"{role}.step/{tensor}", encodings.STEPS, steps)
        payload = self.store("merged", f"{role}/{tensor}", encodings.SHARED[dtype], units, numel)
        self.vectors.append(
            manifest.Vector(tensor=tensor, role=role, dtype=dtype, row_axes=row_axes, values=payload, step=step)
        )
        self.shared[tensor, role] = Shared(values, None if steps is None else list(steps), row_axes)


class Task(Owner):
    """A task that is being written, and what the reference makes of it."""

    def __init__(self, group: Group, name: str, codec: str | None = None) -> None:
        self.group, self.name, self.slug = group, name, layout.slugify(name, ())
        super().__init__(group.root, layout.task_directory(self.slug), codec)
        self.tensors: list[Any] = []
        self.expected: dict[str, Tensor] = {}
        self.companions: list[manifest.CompanionFile] = []
        self.required_features: tuple[str, ...] = ()

    def mask(self, name: str, sides: np.ndarray, **options: Any) -> None:
        """A tensor that takes merged where *sides* is 1."""
        self.coded("mask", name, sides, **options)

    def signed(self, name: str, sides: np.ndarray, **options: Any) -> None:
        """A tensor that takes +merged, -merged or nothing, by *sides*."""
        self.coded("signed", name, sides, **options)

    def coded(self, kind: str, name: str, codes: np.ndarray, **options: Any) -> None:
        """A tensor of any coded kind, of these bits or fields; -1 stands for the code 2 of ``signed``.

        Options are the tensor's fields, ``own`` the values of a sparse one; ``expect=False`` leaves out what the
        reference makes of it, where that would take too long.
        """
        base = self.group.base[options.get("base") or name]
        fields, expected = self._code(kind, name, codes, base, **options)
        dtype = DTYPE_NAMES[options.get("dtype") or base.dtype]
        made = TENSORS[kind]
        self.tensors.append(made(name=name, base=options.get("base"), dtype=dtype, shape=tuple(base.shape), **fields))
        self.expected[name] = expected

    def private(self, name: str, tensor: Tensor) -> None:
        """A tensor that is stored whole."""
        dtype = DTYPE_NAMES[tensor.dtype]
        values = None
        if tensor.numel():
            values = self.store("private", f"values/{name}", encodings.WHOLE[dtype], raw_bytes(tensor), tensor.numel())
        shape = tuple(tensor.shape)
        self.tensors.append(manifest.PrivateTensor(name=name, dtype=dtype, shape=shape, values=values))
        self.expected[name] = tensor

    def extended(
        self, name: str, kind: str, further: Tensor | None, rows: int, sides: np.ndarray | None = None, **options: Any
    ) -> None:
        """A tensor whose first *rows* rows are of *kind*, with *further* rows behind them."""
        base = self.group.base[name]
        dtype = options.get("dtype") or base.dtype
        if kind == "same":
            leading: Any = manifest.SameCode()
            head = base[:rows].to(dtype)
        else:
            fields, head = self._code(kind, name, sides, base[:rows], **options)
            leading = CODES[kind](**fields)
        payload = None
        if further is not None:
            encoding = encodings.WHOLE[DTYPE_NAMES[dtype]]
            payload = self.store("private", f"further/{name}", encoding, raw_bytes(further), further.numel())
            head = torch.cat([head, further])
        self.expected[name] = head
        shape = tuple(head.shape)
        self.tensors.append(
            manifest.ExtendedTensor(
                name=name, dtype=DTYPE_NAMES[dtype], shape=shape, rows=rows, leading=leading, further=payload
            )
        )

    def same(self, name: str, base: str | None = None, dtype: torch.dtype | None = None) -> None:
        """A tensor that equals the base's."""
        source = self.group.base[base or name]
        self.expected[name] = source if dtype is None else source.to(dtype)
        named = DTYPE_NAMES[self.expected[name].dtype]
        self.tensors.append(manifest.SameTensor(name=name, base=base, dtype=named, shape=tuple(source.shape)))

    def alias(self, name: str, of: str) -> None:
        """A tensor that is tied to another."""
        self.expected[name] = self.expected[of]
        self.tensors.append(manifest.AliasTensor(name=name, of=of))

    def dropped(self, name: str) -> None:
        """A tensor that the expert lacks."""
        self.tensors.append(manifest.DroppedTensor(name=name))

    def _code(
        self,
        kind: str,
        name: str,
        codes: np.ndarray,
        over: Tensor,
        *,
        gain: float = 1.0,
        gains: Sequence[float] | None = None,
        row_axes: int = 1,
        dtype: torch.dtype | None = None,
        own: Sequence[float] | Tensor = (),
        values_dtype: str = "F32",
        levels: int | None = None,
        expect: bool = True,
        **options: Any,
    ) -> tuple[dict[str, Any], Tensor]:
        """The fields of a code *over* a base, and what the reference makes of it (unless it would take too long)."""
        codes = np.asarray(codes).reshape(-1)
        units = np.where(codes < 0, 2, codes).astype(np.uint8)
        fields: dict[str, Any] = {"gain": gain if gains is None else None, "row_axes": row_axes}
        if gains is not None:
            fields["gains"] = self.singles("mask", f"gains/{name}", encodings.GAINS, gains)
        is_field = kind in {"signed", "uniform"}
        encoding = {"signed": encodings.SIGNED, "uniform": encodings.UNIFORM.get(levels)}.get(kind, encodings.BITS)
        role = "fields" if is_field else "bits"
        fields[role] = self.store("mask", f"{role}/{name}", encoding, units, codes.size, ranked=kind == "sparse")
        if kind == "uniform":
            fields["levels"] = levels
        values = torch.as_tensor(own).to(TORCH_DTYPES[values_dtype])
        if kind == "sparse":
            fields |= {"count": values.numel(), "values_dtype": values_dtype}
            if values.numel():
                key, raw = f"values/{name}", raw_bytes(values)
                fields["values"] = self.store("mask", key, encodings.SHARED[values_dtype], raw, values.numel())
        if not expect:
            return fields, over
        return fields, self._expected(
            kind,
            units.tolist(),
            over,
            named=options.get("base") or name,
            gains=[gain] if gains is None else gains,
            row_axes=row_axes,
            dtype=dtype,
            own=values.tolist(),
            levels=levels,
        )

    def _expected(
        self,
        kind: str,
        codes: Sequence[int],
        base: Tensor,
        *,
        named: str,
        gains: Sequence[float],
        row_axes: int,
        dtype: torch.dtype | None,
        own: Sequence[float],
        levels: int | None,
    ) -> Tensor:
        """What the reference makes of a code over *base*."""
        numel, shape = base.numel(), tuple(base.shape)
        found = self.group.shared
        shared = {role: found[named, role] for role in ("merged", "merged_lo", "centre") if (named, role) in found}
        steps = {role: by_element(vector.steps, numel, shape, vector.row_axes) for role, vector in shared.items()}
        gain = by_element(gains if len(gains) > 1 else gains * numel, numel, shape, row_axes)
        values = {role: vector.values for role, vector in shared.items()}
        chosen = reference.sides(kind, codes, values, own, levels)
        scales = [
            gain[i]
            if side is None or side.role is None or steps[side.role] is None
            else reference.r13(gain[i] * steps[side.role][i])
            for i, side in enumerate(chosen)
        ]
        centre = None
        if "centre" in shared:
            step = steps["centre"] or [1.0] * numel
            centre = [reference.rounded(step[i] * values["centre"][i], "F32") for i in range(numel)]
        return reference.rebuild(
            base,
            [0 if side is None else 1 for side in chosen],
            [0.0 if side is None else side.value for side in chosen],
            scales,
            dtype,
            centre=centre,
        )


def by_element(rows: Sequence[float] | None, numel: int, shape: tuple[int, ...], row_axes: int) -> list[float] | None:
    """A number a row as a number an element of *shape*; None for None. Rows beyond *shape* are left out."""
    if rows is None:
        return None
    length = numel // row_count(shape, row_axes)
    return [rows[i // length] for i in range(numel)]


@dataclass
class Bundle:
    """What `seal` writes. Each ``edit_…`` gets a table and returns the one to write."""

    root: Path
    base: Mapping[str, Tensor]
    groups: Sequence[Group]
    tasks: Sequence[Task]
    base_aliases: Mapping[str, str] = field(default_factory=dict)
    embed: bool = True
    repo_id: str | None = None
    edit_base: Callable[[Any], Any] = lambda table: table
    edit_group: Callable[[Any], Any] = lambda table: table
    edit_task: Callable[[Any], Any] = lambda table: table
    edit_manifest: Callable[[Any], Any] = lambda table: table

    def seal(self) -> Path:
        """Write tables and manifest; the bundle's path."""
        written: dict[str, files.Written] = {}
        self._write_base(written)
        groups = tuple(self._write_group(group, written) for group in self.groups)
        tasks = tuple(self._write_task(task, written) for task in self.tasks)
        listed = tuple(
            manifest.FileEntry(
                path=path,
                size=file.size,
                sha256=file.sha256,
                git_oid=None if path.endswith(".safetensors") else file.git_oid,
            )
            for path, file in sorted(written.items())
        )
        table = manifest.Manifest(
            format="tallstore",
            format_version=manifest.FORMAT_VERSION,
            manifest_sha256="0" * 64,
            generator="tests",
            required_features=(),
            base=manifest.BasePin(repo_id=self.repo_id, revision=None, embedded=self.embed),
            next_group=max((layout.group_number(group.id) for group in groups), default=0) + 1,
            groups=groups,
            tasks=tasks,
            files=listed,
        )
        raw = parsing.serialise_manifest(self.edit_manifest(table))
        files.write_file(self.root / layout.MANIFEST, raw)
        return self.root

    def _write_base(self, written: dict[str, files.Written]) -> None:
        tensors = []
        for name, tensor in self.base.items():
            alias = self.base_aliases.get(name)
            nbytes = CHUNK_NUMEL * tensor.element_size()
            raw = raw_bytes(tensor).tobytes()
            chunks = () if alias else [raw[start : start + nbytes] for start in range(0, len(raw), nbytes)]
            tensors.append(
                manifest.BaseTensor(
                    name=name,
                    dtype=DTYPE_NAMES[tensor.dtype],
                    shape=tuple(tensor.shape),
                    chunks=tuple(map(xxhash.xxh3_128_hexdigest, chunks)),
                    alias_of=alias,
                )
            )
        table = self.edit_base(manifest.BaseTable(format="tallstore.base", tensors=tuple(tensors)))
        written[layout.BASE_TABLE] = files.write_file(self.root / layout.BASE_TABLE, parsing.serialise(table))
        if self.embed:
            path = self.root / layout.BASE_DIRECTORY / "model.safetensors"
            path.parent.mkdir()
            save_file({name: t.contiguous() for name, t in self.base.items() if name not in self.base_aliases}, path)
            written[f"{layout.BASE_DIRECTORY}/{path.name}"] = files.hash_file(path)

    def _write_group(self, group: Group, written: dict[str, files.Written]) -> manifest.GroupEntry:
        shards, by_name = group.writer.finish()
        written |= {f"{group.directory}/{name}": file for name, file in by_name.items()}
        table = manifest.GroupTable(
            format="tallstore.group",
            id=group.id,
            required_features=(),
            method=METHOD,
            shards=shards,
            vectors=tuple(group.vectors),
        )
        path = layout.group_table(group.id)
        written[path] = files.write_file(self.root / path, parsing.serialise(self.edit_group(table)))
        return manifest.GroupEntry(id=group.id, method=METHOD)

    def _write_task(self, task: Task, written: dict[str, files.Written]) -> manifest.TaskEntry:
        shards, by_name = task.writer.finish()
        written |= {f"{task.directory}/{name}": file for name, file in by_name.items()}
        table = manifest.TaskTable(
            format="tallstore.task",
            name=task.name,
            slug=task.slug,
            group=task.group.id,
            required_features=task.required_features,
            shards=shards,
            tensors=tuple(task.tensors),
            files=tuple(task.companions),
            fidelity=manifest.Fidelity(cosine=None, gain=None, estimates={}),
        )
        path = layout.task_table(task.slug)
        written[path] = files.write_file(self.root / path, parsing.serialise(self.edit_task(table)))
        parameters = sum(math.prod(tensor.shape) for tensor in task.tensors if isinstance(tensor, manifest.Whole))
        return manifest.TaskEntry(
            name=task.name, slug=task.slug, group=task.group.id, parameters=parameters, cosine=None, gain=None
        )


def with_tensor(name: str, **changes: Any) -> Callable[[Any], Any]:
    """An ``edit_…`` that changes fields of one tensor of a task or the base, or of the vector of one tensor."""

    def edit(table: Any) -> Any:
        key = "vectors" if isinstance(table, manifest.GroupTable) else "tensors"
        changed = tuple(
            msgspec.structs.replace(row, **changes)
            if name == getattr(row, "name", None) or name == getattr(row, "tensor", None)
            else row
            for row in getattr(table, key)
        )
        return msgspec.structs.replace(table, **{key: changed})

    return edit
