"""What the second implementation makes of a bundle: a slow reader around `spec/second`, which shares no code with ours.

It checks nothing: whatever our reader took, it reads as the specification says.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

sys.path.append(str(Path(__file__).parents[2] / "spec"))  # scripts of their own, not a package of this project

from second import algebra
from second.algebra import Scale, Vector
from second.elements import NBYTES, Array, cast, log4, wide

CHUNK = 1 << 20
WIDTHS = {"bits": 1, "signed": 2, 3: 2, 4: 2, 8: 4, 16: 4}

Contents = Mapping[str, bytes]


def experts(contents: Contents, base: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Every task of the bundle: its tensors by name. Elements that are NaN may have any payload where one was cast."""
    manifest = json.loads(contents["tallstore.json"])
    return {task["name"]: expert(contents, base, task["slug"], task["group"]) for task in manifest["tasks"]}


class Base(dict[str, Array]):
    """The base's tensors, aliases included. No file is read before the first is wanted: a task may do without."""

    def __init__(self, contents: Contents, given: Path | None) -> None:
        super().__init__()
        self._contents, self._given = contents, given

    def __missing__(self, name: str) -> Array:
        found = _read_base(self._contents, self._given)
        self.update(found)
        return found[name]


def _read_base(contents: Contents, given: Path | None) -> dict[str, Array]:
    files = [
        content for path, content in contents.items() if path.startswith("base/") and path.endswith(".safetensors")
    ]
    if given is not None:
        files = [given.read_bytes()]
    found = {name: tensor for content in files for name, tensor in read_safetensors(content).items()}
    rows = json.loads(contents["base.json"])["tensors"]
    ties: dict[str, list[str]] = {}
    for row in rows:
        ties.setdefault(row.get("alias_of") or row["name"], []).append(row["name"])
    for names in ties.values():
        carrier = next((name for name in names if name in found), None)
        if carrier is not None:
            found |= dict.fromkeys(names, found[carrier])
    return found


def read_safetensors(content: bytes) -> dict[str, Array]:
    """The tensors of a file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: Array(
            row["dtype"], tuple(row["shape"]), content[start + row["data_offsets"][0] : start + row["data_offsets"][1]]
        )
        for name, row in header.items()
        if name != "__metadata__"
    }


class _Shards:
    """The payloads of a group or task."""

    def __init__(self, contents: Contents, folder: str, table: Any) -> None:
        self.rows = table["shards"]
        self._contents, self._folder = contents, folder
        self._files: dict[int, dict[str, Array]] = {}

    def _file(self, number: int) -> dict[str, Array]:
        """A shard that is needed: what no tensor is read from may be broken."""
        if number not in self._files:
            self._files[number] = read_safetensors(self._contents[f"{self._folder}/{self.rows[number]['file']}"])
        return self._files[number]

    def read(self, key: str, reference: Any, numel: int, width: int, *, is_float: bool = False) -> bytes:
        """The decoded bytes of *numel* elements of *width* bits."""
        file, codec = self._file(reference["shard"]), reference["codec"]
        if codec == "pooled":
            pool = self.rows[reference["shard"]]["pool"]
            whole = self._chunks(file, "pool", pool["codec"], pool["at"], pool["nbytes"], 8)
            return whole[reference["at"] : reference["at"] + -(-numel * width // 8)]
        itemsize = width // 8 if is_float else 1
        return self._chunks(file, key, codec, reference["at"], numel, width, itemsize)

    def _chunks(  # noqa: PLR0917 - a payload, as tables describe it
        self, file: Any, key: str, codec: str, at: int, numel: int, width: int, itemsize: int = 1
    ) -> bytes:
        index, data, decoded, start = file["index"].raw, file[key].raw, b"", 0
        for number in range(-(-numel // CHUNK)):
            end = int.from_bytes(index[32 * (at + number) + 16 :][:8], "little")
            nbytes = -(-min(CHUNK, numel - number * CHUNK) * width // 8)
            stored, start = data[start:end], end
            if codec != "raw":
                stored = zstandard.ZstdDecompressor().decompressobj().decompress(stored)
            if codec == "planes-zstd":
                stored = np.frombuffer(stored, np.uint8).reshape(itemsize, -1).T.tobytes()
            if len(stored) != nbytes:
                raise ValueError(f"{key}: {len(stored)} bytes for {nbytes}")
            decoded += stored
        return decoded


def _fields(raw: bytes, numel: int, width: int) -> Any:
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[: numel * width].reshape(numel, width)
    return (bits.astype(np.int64) << np.arange(width)).sum(axis=1)


def _vector(shards: _Shards, row: Any, shape: tuple[int, ...]) -> Vector:
    numel, dtype = math.prod(shape), row["dtype"]
    width = 4 if dtype == "LOG4" else 8 * NBYTES[dtype]
    raw = shards.read(
        f"{row['role']}/{row['tensor']}", row["values"], numel, width, is_float=dtype not in ("LOG4", "I8")
    )
    if dtype == "LOG4":
        values = log4(_fields(raw, numel, 4))
    elif dtype == "I8":
        values = np.frombuffer(raw, np.int8).astype(np.float32)
    else:
        values = np.asarray(wide(Array(dtype, shape, raw)), np.float32)
    axes = row.get("row_axes", 1)
    steps = None
    if row.get("step") is not None:
        rows = algebra.row_count(shape, axes)
        key = f"{row['role']}.step/{row['tensor']}"
        steps = np.frombuffer(shards.read(key, row["step"], rows, 32, is_float=True), "<f4").tolist()
    return Vector(values, steps, axes)


def expert(contents: Contents, base: Mapping[str, Array], slug: str, group: str) -> dict[str, Array]:
    """One task's tensors."""
    folders = f"tasks/{slug}", f"groups/{group}"
    table, shared = (
        json.loads(contents[f"{folder}/{name}.json"]) for folder, name in zip(folders, ("task", "group"), strict=True)
    )
    own, merged = (_Shards(contents, folder, doc) for folder, doc in zip(folders, (table, shared), strict=True))
    vectors = {(row["tensor"], row["role"]): row for row in shared["vectors"]}
    found: dict[str, Array] = {}
    for row in table["tensors"]:
        if row["kind"] not in ("alias", "dropped"):
            found[row["name"]] = _tensor(row, base, own, merged, vectors)
    for row in table["tensors"]:
        if row["kind"] == "alias":
            found[row["name"]] = found[row["of"]]
    return found


def _tensor(row: Any, base: Mapping[str, Array], own: _Shards, merged: _Shards, vectors: Any) -> Array:
    shape, dtype, kind = tuple(row["shape"]), row["dtype"], row["kind"]
    width = 8 * NBYTES[dtype]
    is_float = dtype in ("F16", "BF16", "F32", "F64")
    if kind == "private":
        numel = math.prod(shape)
        raw = own.read(f"values/{row['name']}", row["values"], numel, width, is_float=is_float) if numel else b""
        return Array(dtype, shape, raw)
    source = base[row.get("base") or row["name"]]
    if 0 in shape:  # equal to a base tensor without elements, which must be there (BASE-1): there is nothing to read
        return Array(dtype, shape, b"")
    if kind != "extended":
        return _coded(row, row, source, source.shape, own, merged, vectors)
    leading = _coded(row, row["leading"], source.rows(row["rows"]), source.shape, own, merged, vectors)
    numel = math.prod(shape) - leading.count
    key = f"further/{row['name']}"
    further = own.read(key, row["further"], numel, width, is_float=is_float) if row.get("further") else b""
    return Array(dtype, shape, leading.raw + further)


def _coded(  # noqa: PLR0917 - all that a tensor is made of
    row: Any, code: Any, source: Array, whole: tuple[int, ...], own: _Shards, merged: _Shards, vectors: Any
) -> Array:
    """What is coded over *source*: a base tensor, or the leading rows of one whose shape is *whole*."""
    name, kind, shape, numel = row["name"], code["kind"], source.shape, source.count
    if kind == "same":
        return source if source.dtype == row["dtype"] else _with_nan(source, row["dtype"], None, None, None)
    base_name = row.get("base") or name
    needed = {"mask": ("merged",), "signed": ("merged",), "two-level": ("merged", "merged_lo")}.get(kind, ())
    roles = [*needed, *(["centre"] if (base_name, "centre") in vectors else [])]
    shared = {role: _vector(merged, vectors[base_name, role], whole).rows(shape) for role in roles}
    axes = code.get("row_axes", 1)
    if code.get("gains") is not None:
        count = algebra.row_count(shape, axes)
        gains = np.frombuffer(own.read(f"gains/{name}", code["gains"], count, 32, is_float=True), "<f4").tolist()
        scale = Scale(gains, axes, by_row=True)
    else:
        scale = Scale([code["gain"]], axes, by_row=False)
    part = "fields" if "fields" in code else "bits"
    width = WIDTHS["bits" if part == "bits" else code.get("levels", "signed")]
    codes = _fields(own.read(f"{part}/{name}", code[part], numel, width), numel, width)
    values = None
    if kind == "signed":
        codes = np.where(codes == 2, -1, codes)
    if kind == "sparse" and code["count"]:
        value_dtype = code["values_dtype"]
        raw = own.read(f"values/{name}", code["values"], code["count"], 8 * NBYTES[value_dtype], is_float=True)
        values = np.asarray(wide(Array(value_dtype, (code["count"],), raw)), np.float32)
    present, delta = algebra.sides(kind, codes, shape, scale, shared, levels=code.get("levels", 0), own=values)
    middle = algebra.centre(shared["centre"], shape) if "centre" in shared else None
    return _with_nan(source, row["dtype"], present, delta, middle)


def _with_nan(source: Array, dtype: str, present: Any, delta: Any, middle: Any) -> Array:
    """`algebra.reconstruct`, also where a NaN is added to: its payload may be any (REC-6)."""
    number = wide(source)
    moved = np.zeros(number.size, np.bool_) if present is None else present & (delta != 0)
    with np.errstate(over="ignore", invalid="ignore"):
        start = number if middle is None else number + middle.astype(number.dtype)
        total = start if delta is None else start + delta.astype(number.dtype)
        total = np.where(moved, total, number)
        kept = source.raw if dtype == source.dtype else cast(total, dtype)
        summed = cast(total, dtype)
    width = NBYTES[dtype]
    chosen = np.where(
        moved[:, None],
        np.frombuffer(summed, np.uint8).reshape(-1, width),
        np.frombuffer(kept, np.uint8).reshape(-1, width),
    )
    return Array(dtype, source.shape, chosen.tobytes())


def differs(ours: Array, theirs: Array) -> bool:
    """Whether two tensors are not the same, NaNs of any payload taken for equal."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return True
    if ours.raw == theirs.raw:
        return False
    if ours.dtype not in ("F16", "BF16", "F32", "F64"):
        return True
    one, other = wide(ours), wide(theirs)
    both = np.isnan(one) & np.isnan(other)
    width = NBYTES[ours.dtype]
    bytes_of = [np.frombuffer(each.raw, np.uint8).reshape(-1, width) for each in (ours, theirs)]
    return bool((bytes_of[0] != bytes_of[1]).any(axis=1)[~both].any())
