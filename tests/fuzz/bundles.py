"""Bundles in memory, changed somewhere inside and sealed again: no hash betrays the change, so that it gets deep."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from tests.fuzz.choices import Choices
from tests.fuzz.json_edits import edit

MANIFEST = "tallstore.json"
ALIGNMENT = 64
CHUNK = 1 << 20
SINGLES = (
    *(0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-60, 2.0**-61, 2.0**60, 2.0**61, 2.0**-126, 2.0**-149, 3.4028234e38, 0.1),
    *(4097 / 4096, 8191 / 4096, 16383 / 8192, float("inf"), float("-inf"), float("nan"), 65504.0, 65520.0, 1e-40),
)


@dataclass
class Entry:
    """One tensor of a safetensors file; of a shard, with the records (end, rank) of its chunks."""

    key: str
    dtype: str
    shape: list[int]
    data: bytes
    records: list[list[int]] = field(default_factory=list)


@dataclass
class File:
    """A safetensors file, taken apart.

    Attributes:
        header_edits: choices that the header is edited by once it is put together.
    """

    metadata: Any
    entries: list[Entry]
    is_shard: bool
    header_edits: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, content: bytes, *, is_shard: bool) -> File:
        """Take a sound file apart."""
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        metadata = header.pop("__metadata__", None)
        entries = []
        for key, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = row["data_offsets"]
            entries.append(Entry(key, row["dtype"], row["shape"], content[start + first : start + end]))
        file = cls(metadata, entries, is_shard)
        if is_shard:
            file._share_records(entries.pop().data)
        return file

    def copy(self) -> File:
        """One to change."""
        entries = [
            Entry(entry.key, entry.dtype, list(entry.shape), entry.data, [list(record) for record in entry.records])
            for entry in self.entries
        ]
        return File(copy.copy(self.metadata), entries, self.is_shard)

    def _share_records(self, index: bytes) -> None:
        rows = iter(struct.iter_unpack("<16sQQ", index))
        for entry in self.entries:
            while not entry.records or -(-entry.records[-1][0] // ALIGNMENT) * ALIGNMENT < len(entry.data):
                entry.records.append(list(next(rows)[1:]))

    def index(self) -> bytes:
        """The records of all chunks, their hashes made anew."""
        rows = []
        for entry in self.entries:
            start = 0
            for end, rank in entry.records:
                digest = xxhash.xxh3_128_digest(entry.data[start:end] if start <= end else b"")
                rows.append(digest + (end % (1 << 64)).to_bytes(8, "little") + (rank % (1 << 64)).to_bytes(8, "little"))
                start = end
        return b"".join(rows)

    def pack(self) -> tuple[bytes, int, bytes]:
        """The file, the bytes before its data, and its index."""
        index = self.index() if self.is_shard else b""
        entries = [*self.entries]
        if self.is_shard:
            entries.append(Entry("index", "U8", [len(index) // 32, 32], index))
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        at = 0
        for entry in entries:
            offsets = [at, at + len(entry.data)]
            header[entry.key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
            at = offsets[1]
        for choices in self.header_edits:
            edit(header, Choices(choices))
        text = dump(header)
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return (
            b"".join([len(text).to_bytes(8, "little"), text, *(entry.data for entry in entries)]),
            8 + len(text),
            index,
        )


@dataclass
class Parts:
    """A bundle, taken apart.

    Attributes:
        base: the file to open it with, where it does not embed its base.
    """

    documents: dict[str, Any]
    files: dict[str, File]
    others: dict[str, bytes]
    base: Path | None = None

    @classmethod
    def of(cls, root: Path, base: Path | None = None) -> Parts:
        """Take a sound bundle apart."""
        parts = cls({}, {}, {}, base)
        for place in sorted(root.rglob("*")):
            path = place.relative_to(root).as_posix()
            if path.endswith(".safetensors"):
                parts.files[path] = File.of(place.read_bytes(), is_shard=not path.startswith("base/"))
            elif path.endswith(".json") and path.count("/") != 1:
                parts.documents[path] = json.loads(place.read_bytes())
            elif place.is_file():
                parts.others[path] = place.read_bytes()
        return parts

    def copy(self) -> Parts:
        """One to change."""
        documents = {path: json.loads(text) for path, text in self._texts.items()}
        files = {path: file.copy() for path, file in self.files.items()}
        return Parts(documents, files, dict(self.others), self.base)

    @cached_property
    def _texts(self) -> dict[str, str]:
        """To be parsed again, which takes a tenth of copying."""
        return {path: json.dumps(document) for path, document in self.documents.items()}

    def change(self, choices: Choices, changes: tuple[Change, ...]) -> None:
        """Make one change."""
        choices.pick(changes)(self, choices)

    def sealed(self) -> dict[str, bytes]:
        """The files, with every hash and every size made anew."""
        contents = dict(self.others)
        self._seal_base()
        for path, file in self.files.items():
            contents[path], nbytes, index = file.pack()
            self._seal_shard(path, contents[path][:nbytes], index)
        for path, document in self.documents.items():
            if path != MANIFEST:
                contents[path] = dump(document)
        manifest = self.documents[MANIFEST]
        for listed in _rows(manifest, "files"):
            content = contents.get(listed.get("path") if isinstance(listed.get("path"), str) else "")
            if content is not None:
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
                listed |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                listed["git_oid"] = None if listed["path"].endswith(".safetensors") else blob
        contents[MANIFEST] = seal_manifest(dump(manifest))
        return contents

    def _seal_shard(self, path: str, head: bytes, index: bytes) -> None:
        folder, _, name = path.rpartition("/")
        for table, document in self.documents.items():
            if table.rpartition("/")[0] == folder and folder:
                for row in _rows(document, "shards"):
                    if row.get("file") == name:
                        row |= {"header_xxh3": xxhash.xxh3_128_hexdigest(head)}
                        row |= {"index_xxh3": xxhash.xxh3_128_hexdigest(index)}

    def _seal_base(self) -> None:
        """The hashes of an embedded base's chunks."""
        tensors = {entry.key: entry for file in self.files.values() if not file.is_shard for entry in file.entries}
        for row in _rows(self.documents.get("base.json"), "tensors"):
            entry = tensors.get(row.get("name")) if isinstance(row.get("name"), str) else None
            if entry is not None and isinstance(row.get("chunks"), list) and len(row["chunks"]) == 1:
                row["chunks"] = [xxhash.xxh3_128_hexdigest(entry.data)]


def _rows(document: Any, key: str) -> list[dict[str, Any]]:
    """The objects in a list of a document that may be broken."""
    found = document.get(key) if isinstance(document, dict) else None
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def dump(document: Any) -> bytes:
    """JSON without white space; what is no Unicode is escaped."""
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(document, separators=(",", ":")).encode()


def seal_manifest(raw: bytes) -> bytes:
    """A manifest with its own hash, if it has the place for one."""
    recorded = _recorded(raw)
    if recorded is None:
        return raw
    blank = raw.replace(recorded, b"0" * 64)
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def _recorded(raw: bytes) -> bytes | None:
    at = raw.find(b'"manifest_sha256"')
    digits = raw[at + 17 :].lstrip(b" \n\r\t:")[1:65] if at >= 0 else b""
    return digits if len(digits) == 64 and not digits.strip(b"0123456789abcdef") else None


# --- changes ----------------------------------------------------------------------------------------------------------


def change_table(parts: Parts, choices: Choices) -> None:
    """One place of one JSON file."""
    edit(parts.documents[choices.pick(sorted(parts.documents))], choices)


def change_reference(parts: Parts, choices: Choices) -> None:
    """One field of one tensor or vector."""
    tables = [path for path in sorted(parts.documents) if path.endswith(("task.json", "group.json"))]
    document = parts.documents[choices.pick(tables)]
    rows = _rows(document, "tensors") + _rows(document, "vectors") + _rows(document, "shards")
    if rows:
        edit(choices.pick(rows), choices)


def change_bytes(parts: Parts, choices: Choices) -> None:
    """Some bytes of a payload, or of the base."""
    entry = _entry(parts, choices)
    if entry is None or not entry.data:
        return
    data = bytearray(entry.data)
    at = choices.below(len(data))
    new = choices.raw(choices.pick((1, 1, 2, 4, 8)))
    data[at : at + len(new)] = new[: len(data) - at]
    entry.data = bytes(data)


def change_number(parts: Parts, choices: Choices) -> None:
    """A number of a payload, or of the base, to one at the edge of its type."""
    entry = _entry(parts, choices)
    if entry is None or len(entry.data) < 8:
        return
    value = choices.pick(SINGLES)
    with np.errstate(over="ignore"):
        kinds = (np.float32(value).tobytes(), np.float16(value).tobytes(), np.float64(value).tobytes())
    raw = choices.pick((*kinds, np.float32(value).tobytes()[2:]))
    data = bytearray(entry.data)
    at = choices.below(len(data) // len(raw)) * len(raw)
    data[at : at + len(raw)] = raw
    entry.data = bytes(data)


def change_gain(parts: Parts, choices: Choices) -> None:
    """A gain in a table."""
    tables = [path for path in sorted(parts.documents) if path.endswith("task.json")]
    rows = [row for path in tables for row in _rows(parts.documents[path], "tensors")]
    coded = [code for row in rows for code in (row, row.get("leading")) if isinstance(code, dict) and "gain" in code]
    if coded:
        row = choices.pick(coded)
        numbers = (*SINGLES, float(np.uint32(int.from_bytes(choices.raw(4), "little")).view(np.float32)))
        row["gain"] = float(np.float64(choices.pick(numbers)))


def change_record(parts: Parts, choices: Choices) -> None:
    """An end or a rank in an index."""
    entry = _entry(parts, choices)
    if entry is None:
        return
    if not entry.records or choices.one_in(8):
        entry.records.append([len(entry.data), 0])
        return
    record = choices.pick(entry.records)
    place = choices.below(2)
    record[place] = choices.pick((record[place] + 1, record[place] - 1, 0, record[place] * 2, 1 << 63, (1 << 64) - 1))


def change_codec(parts: Parts, choices: Choices) -> None:
    """How a payload of one chunk is stored: zstd in a frame of some sort, and more of it."""
    entry = _entry(parts, choices)
    if entry is None or len(entry.records) != 1:
        return
    data = entry.data[: entry.records[0][0]]
    level = choices.pick((1, 3, 19))
    frame = zstandard.ZstdCompressor(level=level, write_checksum=choices.one_in(4)).compress(data)
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    stored = choices.pick(
        (frame, frame + b"\0", frame + skippable, skippable + frame, frame + frame, frame[:-1], data + b"\0")
    )
    _store(entry, stored)
    if choices.one_in(2):
        _set_codec(parts, entry.key, choices.pick(("zstd", "planes-zstd", "raw")))


def bomb(parts: Parts, choices: Choices) -> None:
    """A frame that says, or holds, other than what is due."""
    entry = _entry(parts, choices)
    if entry is None or not entry.records:
        return
    nbytes = choices.pick((0, 1, 64, 1 << 10, 1 << 20, 1 << 23, 1 << 24))
    declared = choices.pick((nbytes, len(entry.data), 1 << 40, (1 << 64) - 2, 0))
    header = b"\x28\xb5\x2f\xfd" + choices.pick((b"\xe0", b"\xc0\x68")) + declared.to_bytes(8, "little")
    sizes = (min(1 << 17, nbytes - at) for at in range(0, nbytes, 1 << 17))
    blocks = [(size << 3 | 2).to_bytes(3, "little") + b"\0" for size in sizes]
    last = (1).to_bytes(3, "little")
    _store(entry, header + b"".join(blocks) + last)
    _set_codec(parts, entry.key, "zstd")


def change_entry(parts: Parts, choices: Choices) -> None:
    """A tensor of a file: gone, twice, renamed, longer, shorter, elsewhere."""
    file = choices.pick([parts.files[path] for path in sorted(parts.files)])
    if not file.entries:
        return
    number = choices.below(len(file.entries))
    entry = file.entries[number]
    match choices.below(6):
        case 0:
            del file.entries[number]
        case 1:
            file.entries.append(copy.deepcopy(entry))
        case 2:
            entry.key = choices.pick(file.entries).key
        case 3:
            entry.data += bytes(ALIGNMENT)
            entry.shape = [len(entry.data)]
        case 4:
            entry.data = entry.data[:-ALIGNMENT]
            entry.shape = [len(entry.data)]
        case _:
            file.entries.reverse()


def change_header(parts: Parts, choices: Choices) -> None:
    """One place of a safetensors header, the header's hash made anew."""
    parts.files[choices.pick(sorted(parts.files))].header_edits.append(choices.raw(8))


def _entry(parts: Parts, choices: Choices) -> Entry | None:
    entries = [entry for path in sorted(parts.files) for entry in parts.files[path].entries]
    return choices.pick(entries) if entries else None


def _store(entry: Entry, stored: bytes) -> None:
    entry.data = stored + bytes(-len(stored) % ALIGNMENT)
    entry.shape = [len(entry.data)]
    entry.records = [[len(stored), 0]]


def _set_codec(parts: Parts, key: str, codec: str) -> None:
    """Where the tables refer to *key*; every reference of that role's tensor, which is near enough."""
    role, _, name = key.partition("/")
    field_name = role.rpartition(".")[2] if "." in role else role
    for document in parts.documents.values():
        for row in _rows(document, "tensors") + _rows(document, "vectors"):
            for code in (row, row.get("leading")):
                if name in (row.get("name"), row.get("tensor")) and isinstance(code, dict):
                    for reference in (code.get(field_name), code.get("values")):
                        if isinstance(reference, dict) and reference.get("codec") != "pooled":
                            reference["codec"] = codec


Change = Callable[[Parts, Choices], None]
STRUCTURE: tuple[Change, ...] = (
    *(change_table, change_reference, change_reference, change_bytes, change_number, change_gain, change_record),
    *(change_codec, bomb, change_entry, change_header),
)
NUMBERS: tuple[Change, ...] = (change_number, change_number, change_gain, change_bytes)


def write(contents: Mapping[str, bytes], root: Path, there: dict[str, bytes]) -> None:
    """Have *contents* in the directory *root*, which holds what *there* says; it is kept up to date."""
    for path in there.keys() - contents.keys():
        (root / path).unlink()
    for path, content in contents.items():
        if there.get(path) != content:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    there.clear()
    there.update(contents)
