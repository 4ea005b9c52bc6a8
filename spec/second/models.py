"""What a bundle is made of: a base, groups, tasks; and beside each task, what it decodes to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from second.algebra import Scale, Vector, centre, recast, reconstruct, sides
from second.bundles import Draft
from second.content import singles
from second.elements import CHUNK, NBYTES, Array, Floats, Integers, Json, array, log4, pack, wide
from second.shards import FORMAT_VERSION, Payload, safetensors


@dataclass
class Base:
    """The base: its tensors, names that are tied to others, and where it is.

    Attributes:
        files: the files of ``base/`` and what each holds; empty when the base is by reference.
    """

    tensors: dict[str, Array]
    aliases: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def tensor(self, name: str) -> Array:
        """One tensor, through its alias."""
        return self.tensors[self.aliases.get(name, name)]

    def document(self) -> Json:
        """base.json."""
        rows: list[Json] = []
        for name in [*self.tensors, *self.aliases]:
            tensor = self.tensor(name)
            nbytes = CHUNK * NBYTES[tensor.dtype]
            chunks = [tensor.raw[start : start + nbytes] for start in range(0, len(tensor.raw), nbytes)]
            row: Json = {"name": name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            if name in self.aliases:
                rows.append(row | {"chunks": [], "alias_of": self.aliases[name]})
            else:
                rows.append(row | {"chunks": [xxhash.xxh3_128_hexdigest(chunk) for chunk in chunks]})
        return {"format": "tallstore.base", "tensors": rows}


def embedded(tensors: dict[str, Array], aliases: dict[str, str] | None = None) -> Base:
    """A base that the bundle carries, in one file as the safetensors library would write it."""
    order = sorted(tensors, key=lambda name: (-NBYTES[tensors[name].dtype], name))
    file = safetensors({name: tensors[name] for name in order})
    return Base(tensors, aliases or {}, {"model.safetensors": file})


class Group:
    """A group: shared vectors, and the table that describes them."""

    def __init__(self, base: Base, number: int = 1, method: str = "signed-mask") -> None:
        self.base, self.number, self.id = base, number, f"g{number:04d}"
        self.method: Json = {"name": method, "parameters": {"threshold": 1.2}}
        self.vectors: list[Json] = []
        self.shared: dict[tuple[str, str], Vector] = {}  # by tensor and role

    def vector(
        self,
        tensor: str,
        dtype: str,
        numbers: Integers | Floats,
        *,
        steps: Sequence[float] | None = None,
        row_axes: int = 1,
        codec: str = "raw",
        step_codec: str = "pooled",
        file: str = "merged-00001-of-00001.safetensors",
        role: str = "merged",
    ) -> None:
        """Add a vector: *numbers* are codes for I8 and LOG4, else values, which are rounded to *dtype*."""
        if dtype in ("I8", "LOG4"):
            codes = numbers.astype(np.int64)
            raw = pack(codes, 4) if dtype == "LOG4" else codes.astype(np.int8).tobytes()
            values = log4(codes) if dtype == "LOG4" else codes.astype(np.float32)
        else:
            stored = array(dtype, (numbers.size,), numbers.astype(np.float64))
            raw, values = stored.raw, wide(stored).astype(np.float32)
        step = None
        if steps is not None:
            step = Payload(f"{role}.step/{tensor}", "F32", len(steps), singles(steps), step_codec, file)
        vector = {"tensor": tensor, "role": role, "dtype": dtype, "row_axes": row_axes}
        payload = Payload(f"{role}/{tensor}", dtype, numbers.size, raw, codec, file)
        self.vectors.append(vector | {"values": payload, "step": step})
        self.shared[tensor, role] = Vector(values, None if steps is None else list(steps), row_axes)

    def document(self) -> Json:
        """group.json, with payloads."""
        head = {"format": "tallstore.group", "id": self.id, "required_features": [], "method": self.method}
        return head | {"shards": [], "vectors": self.vectors}


class Task:
    """A task: its table, and beside each tensor what it decodes to."""

    def __init__(self, group: Group, name: str, slug: str | None = None) -> None:
        self.group, self.name, self.slug = group, name, slug or name
        self.tensors: list[Json] = []
        self.companions: dict[str, bytes] = {}
        self.features: list[str] = []
        self.expected: dict[str, Array] = {}
        self.fidelity: Json = {"cosine": 0.875, "gain": 1.0, "score": None, "estimates": {}}
        self.mask_file = "mask-00001-of-00001.safetensors"
        self.private_file = "private-00001-of-00001.safetensors"

    def mask(self, name: str, bits: Integers, **options: Any) -> None:  # noqa: ANN401 - those of `_coded`
        """A tensor that takes merged where a bit is set."""
        table, self.expected[name] = self._coded("mask", name, bits, **options)
        self.tensors.append(table)

    def signed(self, name: str, side: Integers, **options: Any) -> None:  # noqa: ANN401 - those of `_coded`
        """A tensor that takes +merged, -merged or nothing, by *side*: 1, -1 or 0."""
        table, self.expected[name] = self._coded("signed", name, side, **options)
        self.tensors.append(table)

    def two_level(self, name: str, bits: Integers, **options: Any) -> None:  # noqa: ANN401 - those of `_coded`
        """A tensor that takes merged where a bit is set, and merged_lo where it is not."""
        table, self.expected[name] = self._coded("two-level", name, bits, **options)
        self.tensors.append(table)

    def sign(self, name: str, bits: Integers, **options: Any) -> None:  # noqa: ANN401 - those of `_coded`
        """A tensor that takes the scale where a bit is set, and minus the scale where it is not."""
        table, self.expected[name] = self._coded("sign", name, bits, **options)
        self.tensors.append(table)

    def sparse(self, name: str, bits: Integers, own: Array, **options: Any) -> None:  # noqa: ANN401 - those of `_coded`
        """A tensor that takes one of its *own* values where a bit is set."""
        table, self.expected[name] = self._coded("sparse", name, bits, own=own, **options)
        self.tensors.append(table)

    def uniform(self, name: str, codes: Integers, levels: int, **options: Any) -> None:  # noqa: ANN401 - of `_coded`
        """A tensor that takes one of 3, 4, 8 or 16 levels."""
        table, self.expected[name] = self._coded("uniform", name, codes, levels=levels, **options)
        self.tensors.append(table)

    def private(
        self, name: str, tensor: Array, codec: str = "raw", stored: bytes | None = None, base: str | None = None
    ) -> None:
        """A tensor that is stored whole."""
        chunks = None if stored is None else (stored,)
        values = Payload(
            f"values/{name}", tensor.dtype, tensor.count, tensor.raw, codec, self.private_file, stored=chunks
        )
        row: Json = {"kind": "private", "name": name} | ({"base": base} if base else {})
        row |= {"dtype": tensor.dtype, "shape": list(tensor.shape)}
        self.tensors.append(row | {"values": values if tensor.count else None})
        self.expected[name] = tensor

    def extended(
        self,
        name: str,
        kind: str,
        shape: tuple[int, ...],
        side: Integers | None = None,
        *,
        dtype: str | None = None,
        further: bytes = b"",
        codec: str = "raw",
        **options: Any,  # noqa: ANN401 - those of `_coded`
    ) -> None:
        """A tensor whose leading rows are of *kind*; *further* is the rest, in the result's dtype."""
        base = self.group.base.tensor(name)
        rows = min(base.shape[0], shape[0])
        dtype = dtype or base.dtype
        if side is None:
            leading, head = {"kind": kind}, recast(base.rows(rows), dtype)
        else:
            table, head = self._coded(kind, name, side, dtype=dtype, rows=rows, **options)
            leading = {key: value for key, value in table.items() if key not in ("name", "dtype", "shape")}
        rest = None
        if further:
            count = len(further) // NBYTES[dtype]
            rest = Payload(f"further/{name}", dtype, count, further, codec, self.private_file)
        row = {"kind": "extended", "name": name, "dtype": dtype, "shape": list(shape), "rows": rows}
        self.tensors.append(row | {"leading": leading, "further": rest})
        self.expected[name] = Array(dtype, shape, head.raw + further)

    def same(self, name: str, dtype: str | None = None, base: str | None = None) -> None:
        """A tensor that equals the base's."""
        source = self.group.base.tensor(base or name)
        self.expected[name] = recast(source, dtype or source.dtype)
        row: Json = {"kind": "same", "name": name} | ({"base": base} if base else {})
        self.tensors.append(row | {"dtype": dtype or source.dtype, "shape": list(source.shape)})

    def alias(self, name: str, of: str) -> None:
        """A tensor that is tied to another."""
        self.tensors.append({"kind": "alias", "name": name, "of": of})
        self.expected[name] = self.expected[of]

    def dropped(self, name: str) -> None:
        """A tensor of the base that the expert lacks."""
        self.tensors.append({"kind": "dropped", "name": name})

    def _coded(
        self,
        kind: str,
        name: str,
        codes: Integers,
        *,
        base: str | None = None,
        dtype: str | None = None,
        gain: float = 1.0,
        gains: Sequence[float] | None = None,
        gains_codec: str = "pooled",
        row_axes: int = 1,
        rows: int | None = None,
        codec: str = "raw",
        own: Array | None = None,
        own_codec: str = "raw",
        own_file: str | None = None,
        unit: float | None = None,
        levels: int = 0,
    ) -> tuple[Json, Array]:
        source = self.group.base.tensor(base or name)
        if rows is not None:
            source = source.rows(rows)
        shape = source.shape
        vectors = {
            role: vector.rows(shape) for (tensor, role), vector in self.group.shared.items() if tensor == (base or name)
        }
        scale = Scale([gain] if gains is None else gains, row_axes, by_row=gains is not None)
        values = None if own is None else wide(own).astype(np.float32)
        present, delta = sides(kind, codes, shape, scale, vectors, levels=levels, own=values)
        middle = centre(vectors["centre"], shape) if "centre" in vectors else None
        result = reconstruct(source, present, delta, dtype or source.dtype, middle)
        row: Json = {"kind": kind, "name": name} | ({"base": base} if base else {})
        row |= {"dtype": result.dtype, "shape": list(shape)}
        if gains is None:
            row["gain"] = gain
        else:
            row["gains"] = Payload(f"gains/{name}", "F32", len(gains), singles(gains), gains_codec, self.mask_file)
        row["row_axes"] = row_axes
        width = 1 if kind not in ("signed", "uniform") else 4 if levels > 4 else 2
        role, cells = ("bits", "bits") if width == 1 else ("fields", f"{width}-bit fields")
        packed = pack(np.where(codes < 0, 2, codes), width)
        ranked = kind == "sparse"
        row[role] = Payload(f"{role}/{name}", cells, codes.size, packed, codec, self.mask_file, ranked=ranked)
        if levels:
            row["levels"] = levels
        if own is not None:
            payload = Payload(f"values/{name}", own.dtype, own.count, own.raw, own_codec, own_file or self.mask_file)
            row |= {"count": own.count, "values_dtype": own.dtype} | ({"unit": unit} if unit is not None else {})
            row["values"] = payload if own.count else None
        return row, result

    def document(self) -> Json:
        """task.json, with payloads."""
        files = [
            {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            for name, content in self.companions.items()
        ]
        head: Json = {"format": "tallstore.task", "name": self.name, "slug": self.slug, "group": self.group.id}
        head |= {"required_features": self.features, "shards": [], "tensors": self.tensors, "files": files}
        return head | {"fidelity": self.fidelity}

    def manifest_entry(self) -> Json:
        """How the manifest lists it."""
        whole = [row["name"] for row in self.tensors if row["kind"] not in ("alias", "dropped")]
        head: Json = {"name": self.name, "slug": self.slug, "group": self.group.id}
        head["parameters"] = sum(self.expected[name].count for name in whole)
        return head | {"cosine": self.fidelity["cosine"], "gain": self.fidelity["gain"]}


def assemble(base: Base, groups: Sequence[Group], tasks: Sequence[Task]) -> Draft:
    """A whole bundle."""
    pin: Json = {"repo_id": None, "revision": None, "embedded": bool(base.files)}
    if not base.files:
        pin |= {"repo_id": "example/base", "revision": hashlib.sha1(b"base", usedforsecurity=False).hexdigest()}
    manifest = {
        "format": "tallstore",
        "format_version": FORMAT_VERSION,
        "manifest_sha256": "0" * 64,
        "generator": "make_vectors",
        "required_features": [],
        "base": pin,
        "next_group": max((group.number for group in groups), default=0) + 1,
        "groups": [{"id": group.id, "method": group.method} for group in groups],
        "tasks": [task.manifest_entry() for task in tasks],
    }
    documents = {"base.json": base.document()}
    documents |= {f"groups/{group.id}/group.json": group.document() for group in groups}
    documents |= {f"tasks/{task.slug}/task.json": task.document() for task in tasks}
    others = {f"base/{name}": content for name, content in base.files.items()}
    for task in tasks:
        others |= {f"files/{hashlib.sha256(content).hexdigest()}": content for content in task.companions.values()}
    expected = {f"{task.name}/{name}": tensor for task in tasks for name, tensor in task.expected.items()}
    return Draft(manifest, documents, others, expected=expected)
