"""Ways to break a bundle in one place, with everything around it sealed again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from second.algebra import recast
from second.bundles import MANIFEST, Draft, payloads
from second.content import singles
from second.elements import CHUNK, Array, Json
from second.frames import frame
from second.kernels import COMPANION, kernel
from second.shards import Entry, Payload, Record, Shard, safetensors

Change = Callable[[Draft], None]
BASE_JSON, GROUP_JSON, TASK_JSON = "base.json", "groups/g0001/group.json", "tasks/mnist/task.json"
MASK_SHARD = "tasks/mnist/mask-00001-of-00001.safetensors"
PRIVATE_SHARD = "tasks/mnist/private-00001-of-00001.safetensors"
MERGED_SHARD = "groups/g0001/merged-00001-of-00001.safetensors"
COMPANION_PATH = f"files/{hashlib.sha256(COMPANION).hexdigest()}"
REMOVE = object()
FALSE_SHA256 = "f" * 64


def put(path: str, *keys: str | int, value: object) -> Change:
    """Set the value at *keys* of a JSON file; `REMOVE` deletes it.

    Items of lists go by number, or by their name, tensor, path, id or file; -1 appends.
    """

    def step(node: Any, key: str | int) -> Any:  # noqa: ANN401 - any JSON
        return node[position(node, key)] if isinstance(node, list) else node[key]

    def position(items: list[Json], key: str | int) -> int:
        if isinstance(key, int):
            return key
        return next(i for i, item in enumerate(items) if key in map(item.get, ("name", "tensor", "path", "id", "file")))

    def edit(document: Json) -> None:
        node: Any = document
        for key in keys[:-1]:
            node = step(node, key)
        last = position(node, keys[-1]) if isinstance(node, list) else keys[-1]
        if value is REMOVE:
            del node[last]
        elif last == -1:
            node.append(value)
        else:
            node[last] = value

    if path == MANIFEST:
        return lambda draft: draft.listing.append(edit)
    return lambda draft: draft.edits.append(lambda sealed: edit(sealed.documents[path]))


def again(path: str, *keys: str | int) -> Change:
    """Append, to a list of a JSON file, a copy of one of its items."""

    def edit(document: Json) -> None:
        node: Any = document
        for key in keys[:-1]:
            node = node[key]
        node.append(json.loads(json.dumps(node[keys[-1]])))

    if path == MANIFEST:
        return lambda draft: draft.listing.append(edit)
    return lambda draft: draft.edits.append(lambda sealed: edit(sealed.documents[path]))


def swap(key: str, **changes: Any) -> Change:  # noqa: ANN401 - fields of Payload
    """Store other bytes, or the same in another way, under *key*."""

    def alter(node: Any) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(node, Payload):
            return replace(node, **changes) if node.key == key else node
        if isinstance(node, dict):
            return {name: alter(value) for name, value in node.items()}
        return [alter(value) for value in node] if isinstance(node, list) else node

    def change(draft: Draft) -> None:
        draft.documents = {path: alter(document) for path, document in draft.documents.items()}

    return change


def rewrite(path: str, edit: Callable[[bytes], bytes]) -> Change:
    """Alter the bytes of a JSON file, before they are hashed."""

    def change(draft: Draft) -> None:
        draft.text[path] = edit

    return change


def text(path: str, old: str, new: str | bytes) -> Change:
    """Replace a piece of a JSON file, before it is hashed."""

    def edit(content: bytes) -> bytes:
        if old.encode() not in content:
            raise ValueError(f"{path} has no {old!r}")
        return content.replace(old.encode(), new if isinstance(new, bytes) else new.encode(), 1)

    return rewrite(path, edit)


def shard(path: str, edit: Callable[[Shard], object]) -> Change:
    """Alter a shard, before it is hashed."""

    def apply(sealed: Draft) -> None:
        edit(sealed.shards[path])

    return lambda draft: draft.edits.append(apply)


def header(path: str, edit: Callable[[Json], Json]) -> Change:
    """Alter the JSON header of a shard, before it is hashed."""
    return shard(path, lambda target: target.header_edits.append(edit))


def entry(path: str, key: str, **changes: object) -> Change:
    """Alter one tensor in a shard's header."""
    return header(path, lambda fields: fields | {key: fields[key] | changes})


def late(edit: Callable[[dict[str, bytes]], object]) -> Change:
    """Alter the finished files; nothing is hashed again."""

    def change(draft: Draft) -> None:
        draft.late.append(lambda files: void(edit(files)))

    return change


def void(_: object) -> None:
    """Nothing."""


def without(path: str) -> Change:
    """Delete a file that the manifest lists."""
    return late(lambda files: files.pop(path))


def unlisted(path: str) -> Change:
    """Delete a file, and its line in the manifest."""

    def change(draft: Draft) -> None:
        put(MANIFEST, "files", path, value=REMOVE)(draft)
        without(path)(draft)

    return change


def listed(path: str, *, size: int = 3, sha256: str = FALSE_SHA256) -> Change:
    """List a file that is not there."""
    oid = None if path.endswith(".safetensors") else "f" * 40

    def edit(manifest: Json) -> None:
        manifest["files"].append({"path": path, "size": size, "sha256": sha256, "git_oid": oid})
        manifest["files"].sort(key=lambda row: str(row["path"]))

    return lambda draft: draft.listing.append(edit)


def present(path: str, content: bytes) -> Change:
    """Add a file, and list it."""
    return lambda draft: draft.others.update({path: content})


def misname_companion(draft: Draft) -> None:
    """Store the companion under a name that is not its sha256, wherever it is named."""
    draft.others[f"files/{'e' * 64}"] = draft.others.pop(COMPANION_PATH)
    draft.documents[TASK_JSON]["files"][0]["sha256"] = "e" * 64


def companion_too(name: str) -> Change:
    """Name the task's companion once more, otherwise."""

    def change(draft: Draft) -> None:
        files = draft.documents[TASK_JSON]["files"]
        files.append(files[0] | {"name": name})

    return change


def setup(**steps: object) -> Change:
    """What the test does to its copy of the bundle."""
    return lambda draft: draft.setup.update(steps)


def unfetched_task(**changes: object) -> Change:
    """List a second task whose files are not there."""
    row: Json = {"name": "other", "slug": "other", "group": "g0001", "parameters": 1, "cosine": None, "gain": None}

    def change(draft: Draft) -> None:
        draft.manifest["tasks"].append(row | changes)
        listed(f"tasks/{(row | changes)['slug']}/task.json")(draft)

    return change


def group_twelve(draft: Draft) -> None:
    """Give the one group the number 12, wherever it stands, and leave next_group as it was."""
    path = GROUP_JSON.replace("g0001", "g0012")
    draft.documents[path] = draft.documents.pop(GROUP_JSON) | {"id": "g0012"}
    draft.manifest["groups"][0]["id"] = draft.manifest["tasks"][0]["group"] = "g0012"
    draft.documents[TASK_JSON]["group"] = "g0012"


def file_edit(edit: Callable[[bytes], bytes]) -> Callable[[Shard], None]:
    """Alter a shard's finished bytes, before they are hashed."""

    def apply(target: Shard) -> None:
        target.file_edit = edit

    return apply


def header_text(edit: Callable[[bytes], bytes]) -> Callable[[Shard], None]:
    """Alter the text of a shard's header, before it is hashed."""

    def apply(target: Shard) -> None:
        target.header_text = edit

    return apply


def add_entry(key: str | None, data: bytes) -> Callable[[Shard], None]:
    """Add a tensor that no table refers to."""
    return lambda target: target.entries.append(Entry(key, [len(data)], data))


def set_byte(key: str, at: int, value: int) -> Callable[[Shard], None]:
    """Change one stored byte of a payload, behind what its records cover."""

    def apply(target: Shard) -> None:
        found = target.entry(key)
        data = bytearray(found.data)
        data[at] = value
        found.data = bytes(data)

    return apply


def set_record(number: int, **changes: object) -> Callable[[Shard], None]:
    """Change a record of the index."""

    def apply(target: Shard) -> None:
        target.records[number] = replace(target.records[number], **changes)  # type: ignore[arg-type]

    return apply


def assign(**values: object) -> Callable[[Shard], None]:
    """Set attributes of a shard."""

    def apply(target: Shard) -> None:
        for name, value in values.items():
            setattr(target, name, value)

    return apply


def two_chunks(draft: Draft) -> None:
    """Add a private tensor of two chunks, stored first in its shard."""
    table = draft.documents[TASK_JSON]
    count = CHUNK + 13
    values = Payload("values/big", "U8", count, bytes(count), "zstd", "private-00001-of-00001.safetensors")
    table["tensors"].insert(0, {"kind": "private", "name": "big", "dtype": "U8", "shape": [count], "values": values})
    draft.manifest["tasks"][0]["parameters"] += count


def stored(key: str, make: Callable[[bytes], bytes]) -> Change:
    """Store, as the one chunk of the zstd payload *key*, what *make* makes of its decoded bytes."""

    def change(draft: Draft) -> None:
        payload = next(found for found in payloads(list(draft.documents.values())) if found.key == key)
        swap(key, codec="zstd", stored=(make(payload.raw),))(draft)

    return change


def private_row(name: str, shape: list[int], values: Json | None = None) -> Change:
    """Append a private float32 tensor to the task's table; *values* says where it would be."""
    row = {"kind": "private", "name": name, "dtype": "F32", "shape": shape, "values": values}

    def change(draft: Draft) -> None:
        put(TASK_JSON, "tensors", -1, value=row)(draft)
        parameters(math.prod(shape))(draft)

    return change


def parameters(more: int) -> Change:
    """Let the manifest count *more* elements of the task."""

    def change(draft: Draft) -> None:
        draft.manifest["tasks"][0]["parameters"] += more

    return change


def whole(name: str, count: int) -> Change:
    """Append a private uint8 tensor of zeros to the task, stored raw."""
    values = Payload(f"values/{name}", "U8", count, bytes(count), file="private-00001-of-00001.safetensors")
    row = {"kind": "private", "name": name, "dtype": "U8", "shape": [count], "values": values}

    def change(draft: Draft) -> None:
        extra("tensors", row)(draft)
        parameters(count)(draft)

    return change


def extra(table: str, row: Json) -> Change:
    """Append a row, with its payloads, to the task's tensors or the group's vectors."""
    path = {"tensors": TASK_JSON, "vectors": GROUP_JSON}[table]
    return lambda draft: draft.documents[path][table].append(row)


def mask_row(name: str) -> Json:
    """A mask over a vector of three elements, without its bits."""
    return {"kind": "mask", "name": name, "dtype": "F32", "shape": [3], "gain": 1.0, "row_axes": 1}


def float_vector(tensor: str, count: int) -> Json:
    """A merged vector in float32."""
    merged = "merged-00001-of-00001.safetensors"
    values = Payload(f"merged/{tensor}", "F32", count, singles([0.5] * count), file=merged)
    return {"tensor": tensor, "role": "merged", "dtype": "F32", "row_axes": 1, "values": values, "step": None}


def with_step(draft: Draft) -> None:
    """Give u's float32 vector a step."""
    merged = "merged-00001-of-00001.safetensors"
    draft.documents[GROUP_JSON]["vectors"][2]["step"] = Payload(
        "merged.step/u", "F32", 1, singles([1.0]), "pooled", merged
    )


def base_file(edit: Callable[[dict[str, Array]], None]) -> Change:
    """Write the embedded base with other tensors than base.json describes."""

    def change(draft: Draft) -> None:
        content = draft.others["base/model.safetensors"]
        stop = 8 + int.from_bytes(content[:8], "little")
        tensors = {}
        for name, row in json.loads(content[8:stop]).items():
            begin, end = (stop + offset for offset in row["data_offsets"])
            tensors[name] = Array(row["dtype"], tuple(row["shape"]), content[begin:end])
        edit(tensors)
        draft.others["base/model.safetensors"] = safetensors(tensors)

    return change


def empty_rows(draft: Draft) -> None:
    """Extend a base tensor of two rows, none of which has an element."""
    base_file(lambda tensors: tensors.update(z=Array("F32", (2, 0), b"")))(draft)
    draft.documents[BASE_JSON]["tensors"].append({"name": "z", "dtype": "F32", "shape": [2, 0], "chunks": []})
    row = {"kind": "extended", "name": "z", "dtype": "F32", "shape": [3, 0], "rows": 2, "leading": {"kind": "same"}}
    extra("tensors", row)(draft)


def base_bytes(edit: Callable[[bytes], bytes]) -> Change:
    """Alter the embedded base's file, before it is hashed."""
    path = "base/model.safetensors"
    return lambda draft: draft.others.update({path: edit(draft.others[path])})


def base_name(name: str) -> Change:
    """Give the embedded base's file another name."""
    return lambda draft: draft.others.update({f"base/{name}": draft.others.pop("base/model.safetensors")})


def base_copy(name: str) -> Change:
    """Add a copy of the embedded base's file."""
    return lambda draft: draft.others.update({f"base/{name}": draft.others["base/model.safetensors"]})


def by_reference(draft: Draft) -> None:
    """Take the base out of the bundle."""
    draft.others.pop("base/model.safetensors")
    draft.manifest["base"]["embedded"] = False


def same_digest_twice(content: bytes) -> bytes:
    """Let the generator hold the manifest's hash as well."""
    return content.replace(b'"make_vectors"', b'"' + b"0" * 64 + b'"')


def length_field(length: int) -> Callable[[Shard], None]:
    """Let the header claim *length* bytes."""
    return file_edit(lambda content: length.to_bytes(8, "little") + content[8:])


def rename_index(fields: Json) -> Json:
    """Let the index be a payload of another name."""
    row = fields.pop("index")
    return fields | {"merged/w": row | {"shape": [math.prod(row["shape"])]}}


def repool(target: Shard) -> None:
    """Set the byte before the pool's last member, which is 8 bytes long: it belongs to none."""
    pool = target.entry("pool")
    data = bytearray(pool.data)
    data[target.records[-1].end - 9] = 1
    pool.data = bytes(data)
    content = pool.data[: target.records[-1].end]
    target.records[-1] = Record(xxhash.xxh3_128_digest(content), len(content))


def large_window(raw: bytes) -> bytes:
    """A frame whose window is 16 MiB."""
    return frame(raw, window_log=24)


def set_bits(key: str, at: int, bits: int) -> Change:
    """Set bits in one decoded byte of a payload."""

    def change(draft: Draft) -> None:
        payload = next(found for found in payloads(list(draft.documents.values())) if found.key == key)
        raw = bytearray(payload.raw)
        raw[at] |= bits
        swap(key, raw=bytes(raw))(draft)

    return change


def numbers(key: str, *values: float) -> Change:
    """Store these float32 numbers instead, each over the first ones of a payload."""

    def change(draft: Draft) -> None:
        payload = next(found for found in payloads(list(draft.documents.values())) if found.key == key)
        swap(key, raw=singles(values) + payload.raw[4 * len(values) :])(draft)

    return change


def drop_w(tensors: dict[str, Array]) -> None:
    """Leave w out."""
    del tensors["w"]


def recast_w(tensors: dict[str, Array]) -> None:
    """Let w be float16."""
    tensors["w"] = recast(tensors["w"], "F16")


def reshape_w(tensors: dict[str, Array]) -> None:
    """Let w be of another shape."""
    tensors["w"] = replace(tensors["w"], shape=(35,))


def negate_w(tensors: dict[str, Array]) -> None:
    """Flip one bit of w."""
    raw = tensors["w"].raw
    tensors["w"] = replace(tensors["w"], raw=bytes([raw[0] ^ 1]) + raw[1:])


def other_base(edit: Callable[[dict[str, Array]], None]) -> bytes:
    """The kernel's base as a file, altered."""
    draft = kernel()
    base_file(edit)(draft)
    return draft.others["base/model.safetensors"]


@dataclass(frozen=True)
class Invalid:
    """An invalid vector: a kernel, broken in one place.

    Attributes:
        found_by: where it must be refused: ``open``; ``load``, when every tensor is loaded; ``verify``.
        problem: what is wrong, in a few words.
        changes: how the kernel becomes this.
        base: the file that stands beside the bundle, for a base by reference.
        zipped: whether it stands there as a zstd frame.
        make: the kernel.
    """

    found_by: tuple[str, ...]
    problem: str
    changes: tuple[Change, ...]
    base: bytes | None = None
    zipped: bool = False
    make: Callable[[], Draft] = kernel


def anywhere(problem: str, *changes: Change) -> Invalid:
    """A fault that opening the bundle meets."""
    return Invalid(("open", "load", "verify"), problem, changes)


def load(problem: str, *changes: Change) -> Invalid:
    """A fault that loading meets."""
    return Invalid(("load", "verify"), problem, changes)


def verify(problem: str, *changes: Change) -> Invalid:
    """A fault that loading need not meet."""
    return Invalid(("verify",), problem, changes)


def given_base(problem: str, base: bytes) -> Invalid:
    """A sound bundle, opened with another base."""
    return Invalid(("load",), problem, (by_reference,), base)
