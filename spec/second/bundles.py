"""A bundle on its way from tables to sealed files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from second.elements import Array, Json
from second.shards import Payload, Shard, compact

MANIFEST = "tallstore.json"


@dataclass
class Draft:
    """A bundle before it is sealed. What makes a vector invalid is done to it on the way, stage by stage.

    Attributes:
        manifest: without its files.
        documents: the other JSON files; `Payload`s stand where references will.
        others: files that are only bytes.
        beside: files that are not the bundle's, and not listed.
        edits: after the payloads were placed into shards; all hashes are computed afterwards.
        shards: by path, from then on.
        listing: on the manifest after it lists the files.
        text: on the bytes of a JSON file, before they are hashed.
        late: on the finished files; no hash is mended.
        setup: what the test does to a copy, since no repository can hold it.
        expected: what every task decodes to, by ``<task>/<tensor>``.
    """

    manifest: Json
    documents: dict[str, Json]
    others: dict[str, bytes]
    beside: dict[str, bytes] = field(default_factory=dict)
    expected: dict[str, Array] = field(default_factory=dict)
    pool_codec: str = "raw"
    edits: list[Callable[[Draft], None]] = field(default_factory=list)
    shards: dict[str, Shard] = field(default_factory=dict)
    listing: list[Callable[[Json], None]] = field(default_factory=list)
    text: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    late: list[Callable[[dict[str, bytes]], None]] = field(default_factory=list)
    setup: Json = field(default_factory=dict)


def dump(document: Json) -> bytes:
    """JSON with a line a key, and a line an item in lists of objects."""
    lines = []
    for key, value in document.items():
        text = compact(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = b"[\n  " + b",\n  ".join(map(compact, value)) + b"\n ]"
        lines.append(b" " + compact(key) + b": " + text)
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def payloads(node: object) -> Iterator[Payload]:
    """Every payload in a table."""
    if isinstance(node, Payload):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from payloads(value)
    elif isinstance(node, list):
        for value in node:
            yield from payloads(value)


def settle(node: Any, references: Mapping[str, Json]) -> Any:  # noqa: ANN401 - any JSON
    """*node* with each payload replaced by its reference."""
    if isinstance(node, Payload):
        return references[node.key]
    if isinstance(node, dict):
        return {key: settle(value, references) for key, value in node.items()}
    return [settle(value, references) for value in node] if isinstance(node, list) else node


def place(document: Json, pool_codec: str) -> tuple[Json, dict[str, Shard]]:
    """Lay out the payloads of a table in shards; the table with references, and the shards by file name."""
    found = list(payloads(document))
    names = sorted({payload.file for payload in found})
    shards = {name: Shard() for name in names}
    pools = dict.fromkeys(names, b"")
    references: dict[str, Json] = {}
    for payload in found:
        name = payload.file
        if payload.codec == "pooled":
            at = -(-len(pools[name]) // 8) * 8
            pools[name] = pools[name].ljust(at, b"\0") + payload.raw
        else:
            at = shards[name].add(payload)
        references[payload.key] = {"shard": names.index(name), "codec": payload.codec, "at": at}
    entries = []
    for name, shard in shards.items():
        entry: Json = {"file": name, "header_xxh3": None, "index_xxh3": None, "pool": None}
        if pools[name]:
            pool = Payload("pool", "U8", len(pools[name]), pools[name], pool_codec)
            entry["pool"] = {"nbytes": pool.count, "codec": pool_codec, "at": shard.add(pool)}
        entries.append(entry)
    return settle(document, references) | {"shards": entries}, shards


def seal(draft: Draft) -> dict[str, bytes]:
    """The files of the bundle: everything placed, hashed, listed and sealed."""
    for path, document in draft.documents.items():
        if "shards" in document:
            folder = path.rpartition("/")[0]
            draft.documents[path], shards = place(document, draft.pool_codec)
            draft.shards |= {f"{folder}/{name}": shard for name, shard in shards.items()}
    packed = {}
    for edit in draft.edits:
        edit(draft)
    for path, shard in draft.shards.items():
        packed[path] = shard.pack()
    files = draft.others | {path: file for path, (file, _) in packed.items()}
    for path, document in draft.documents.items():
        for entry in document.get("shards", ()):
            shard_path = f"{path.rpartition('/')[0]}/{entry['file']}"
            _, head = packed.get(shard_path, (b"", b""))
            index = draft.shards[shard_path].index() if shard_path in packed else b""
            entry["header_xxh3"] = entry["header_xxh3"] or xxhash.xxh3_128_hexdigest(head)
            entry["index_xxh3"] = entry["index_xxh3"] or xxhash.xxh3_128_hexdigest(index)
        files[path] = draft.text.get(path, bytes)(dump(document))
    listed = [listing_entry(path, files[path]) for path in sorted(files)]
    manifest = draft.manifest | {"files": listed}
    for change in draft.listing:
        change(manifest)
    files |= draft.beside
    files[MANIFEST] = seal_manifest(draft.text.get(MANIFEST, bytes)(dump(manifest)))
    for alter in draft.late:
        alter(files)
    return files


def seal_manifest(text: bytes) -> bytes:
    """*text* with its own sha256 in the place of 64 zeros."""
    return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode())


def listing_entry(path: str, content: bytes) -> Json:
    """How the manifest lists a file."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    oid = None if path.endswith(".safetensors") else blob
    return {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "git_oid": oid}
