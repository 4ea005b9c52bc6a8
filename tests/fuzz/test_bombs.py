"""Small files that stand for much: what they cost is bounded by their size, and by what the tables say."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import zstandard

import tallstore
from tallstore.checkpoints import open_checkpoint
from tallstore.checkpoints.refusals import MAX_JSON_NBYTES
from tallstore.cli.expert_file import read_expert_file
from tallstore.errors import (
    CardError,
    DamagedCheckpointError,
    FormatError,
    InputError,
    UnknownTensorError,
    UnsafeCheckpointError,
)
from tallstore.format import codecs, encodings, parsing
from tallstore.format.manifest import BaseTable, GroupTable, Manifest, Payload, Pool, Shard, TaskTable
from tallstore.format.origin import ORIGIN, read_origin
from tallstore.format.safetensors_header import HeaderProblem, parse_header
from tallstore.format.shard_reader import ShardReader
from tallstore.hub import front_matter
from tallstore.hub.local_bundle import MAX_README_NBYTES, LocalBundle
from tests.fuzz import seeds
from tests.fuzz.bundles import File, dump, seal_manifest
from tests.fuzz.outcomes import check_message

NESTED = 1_000_000
TABLES = (Manifest, BaseTable, GroupTable, TaskTable)
BUNDLE = seeds.VECTORS / "valid" / "unbroken-kernel" / "bundle"


@contextmanager
def at_most(nbytes: int, seconds: float = 20) -> Iterator[None]:
    """What happens inside takes no more memory and processor time than that."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        taken, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= nbytes, f"{peak:,} bytes"
    assert taken <= seconds, f"{taken:.1f} s"


def parse_table(table, raw):
    return parsing.parse_manifest(raw, "here") if table is Manifest else parsing.parse(raw, table, "here")


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"tensors":[', b'{"a":[{"b":'])
def test_nesting_is_refused_in_tables(table, opening):
    raw = opening * (NESTED // len(opening))
    with at_most(len(raw) * 4), pytest.raises(FormatError, match="JSON-1"):
        parse_table(table, raw)


@pytest.mark.parametrize("opening", [b'{"a":', b'{"a":['])
def test_nesting_is_refused_in_headers(opening):
    text = opening * (NESTED // len(opening)) + b"}"
    raw = len(text).to_bytes(8, "little") + text
    with at_most(len(raw) * 4), pytest.raises(HeaderProblem, match="not JSON"):
        parse_header(raw, len(raw))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_nesting_is_refused_beside_a_checkpoint(tmp_path, name):
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / name).write_bytes(b'{"a":' * NESTED)
    with at_most(64 << 20), pytest.raises(DamagedCheckpointError, match="is not JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("item", [b"[]", b"{}", b'"ab"', b"1e5", b'{"a":1}', b'[""]'])
@pytest.mark.parametrize("table", [GroupTable, Manifest])
def test_tables_take_memory_in_proportion_to_their_size(table, item):
    raw = b'{"format":"tallstore","x":[' + b",".join([item] * (200_000 // len(item))) + b"]}"
    with at_most(len(raw) * 64), pytest.raises(FormatError):
        parse_table(table, raw)


@pytest.mark.parametrize(
    "digits", [b"1" * 2_000_000, b"1" * 2_000_000 + b".5", b"1e" + b"9" * 100_000, b"0." + b"1" * 2_000_000]
)
def test_numbers_of_a_million_digits_take_no_time(digits):
    with at_most(64 << 20, seconds=5), pytest.raises(FormatError):
        parsing.parse(b'{"a":' + digits + b"}", TaskTable, "here")


@pytest.mark.parametrize("number", [10**400, 1 << 63, -(1 << 63) - 1])
def test_integers_beyond_64_bits_are_refused_where_any_scalar_may_stand(number):
    document = json.loads((BUNDLE / "groups" / "g0001" / "group.json").read_bytes())
    document["method"]["parameters"] = {"threshold": number}
    with pytest.raises(FormatError, match="JSON-3"):
        parsing.parse(json.dumps(document).encode(), GroupTable, "here")


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\nb", "\x9b", "a\u2028b", "\u202egpj.exe", "\u2066"])
def test_what_terminals_obey_is_no_name_of_a_method(text):
    document = json.loads((BUNDLE / "groups" / "g0001" / "group.json").read_bytes())
    document["method"]["name"] = text
    with pytest.raises(FormatError, match="JSON-3") as caught:
        parsing.parse(json.dumps(document).encode(), GroupTable, "here")
    check_message(str(caught.value))


@pytest.mark.parametrize("key", ["a\x1b[2Jb", "a\nb", "x" * 1_000_000, "\u202e", "\ud7ff" * 100_000])
def test_a_key_that_is_refused_is_shown_in_one_line(key):
    document = json.loads((BUNDLE / "base.json").read_bytes()) | {key: 1}
    with pytest.raises(FormatError, match="VER-3") as caught:
        parsing.parse(json.dumps(document).encode(), BaseTable, "here")
    check_message(str(caught.value))


def test_a_name_is_not_compared_with_a_million_others():
    names = [f"{number:07d}" + "x" * 400 for number in range(100_000)] + [
        f"{number:07d}.weight" for number in range(200_000)
    ]
    with at_most(256 << 20, seconds=15):
        message = str(UnknownTensorError("task 't'", "tensor", "0000001.weigth", names))
    assert "did you mean '0000001.weight'?" in message
    check_message(str(UnknownTensorError("task 't'", "tensor", "y" * 100_000, ["x" * 100_000] * 6)))


# --- zstd and shards --------------------------------------------------------------------------------------------------

BLOCK = 1 << 17


def bomb(nbytes: int, declared: int) -> bytes:
    """A frame of run-length blocks of zeros, four bytes for each 128 KiB."""
    header = b"\x28\xb5\x2f\xfd\xc0\x68" + declared.to_bytes(8, "little")  # a window of 8 MiB
    blocks = [((min(BLOCK, nbytes - at) << 3) | 2).to_bytes(3, "little") + b"\0" for at in range(0, nbytes, BLOCK)]
    return header + b"".join(blocks) + (1).to_bytes(3, "little")


@pytest.mark.parametrize("codec", ["zstd", "planes-zstd"])
@pytest.mark.parametrize("nbytes", [1 << 24, 1 << 32])
def test_a_frame_that_holds_more_than_it_declares_is_not_unpacked(codec, nbytes):
    stored = np.frombuffer(bomb(nbytes, declared=1 << 12), np.uint8)
    with at_most(1 << 20), pytest.raises(FormatError, match="COD-3"):
        codecs.decode(codec, stored, 1 << 12, 4, "here")


def test_a_chunk_takes_the_memory_of_a_chunk():
    stored = np.frombuffer(bomb(1 << 23, declared=1 << 23), np.uint8)
    assert stored.size < 300
    with at_most(3 << 23):
        assert not codecs.decode("planes-zstd", stored, 1 << 23, 8, "here").any()


class _Memory:
    """A file in memory, or one that is said to be larger."""

    where = "shard"

    def __init__(self, content: bytes, nbytes: int | None = None) -> None:
        self._content = np.frombuffer(content, np.uint8)
        self.nbytes = len(content) if nbytes is None else nbytes

    def read(self, start, stop):
        assert stop <= self._content.size, "a part is read that nobody checked the size of"
        return self._content[start:stop].copy()

    def expect(self, start, stop):
        pass

    def version(self):
        return 0

    def close(self):
        pass


def test_an_index_is_not_read_before_its_size_is_checked():
    records = (1 << 22) + 1
    rows = {
        "__metadata__": {"tallstore": "1.0"},
        "index": {"dtype": "U8", "shape": [records, 32], "data_offsets": [0, 32 * records]},
    }
    text = json.dumps(rows).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    shard = Shard(
        file="mask-00001-of-00001.safetensors", header_xxh3=xxhash.xxh3_128_hexdigest(head), index_xxh3="0" * 32
    )
    with at_most(1 << 20), pytest.raises(FormatError, match="LIM-1"):
        ShardReader(_Memory(head, len(head) + 32 * records), shard)


def test_the_records_of_a_pool_are_not_looked_through_for_each_of_its_payloads():
    chunks = 20_000
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 20))
    digest = xxhash.xxh3_128_digest(frame)
    data = frame * chunks
    index = b"".join(digest + struct.pack("<QQ", len(frame) * (number + 1), 0) for number in range(chunks))
    data += bytes(-len(data) % 64)
    rows = {
        "__metadata__": {"tallstore": "1.0"},
        "pool": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]},
        "index": {"dtype": "U8", "shape": [chunks, 32], "data_offsets": [len(data), len(data) + len(index)]},
    }
    text = json.dumps(rows).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    hashes = {"header_xxh3": xxhash.xxh3_128_hexdigest(head), "index_xxh3": xxhash.xxh3_128_hexdigest(index)}
    pool = Pool(nbytes=chunks << 20, codec="zstd", at=0)
    reader = ShardReader(
        _Memory(head + data + index), Shard(file="mask-00001-of-00001.safetensors", pool=pool, **hashes)
    )
    # Each in another chunk than the one before, so that none is there already.
    places = itertools.islice(itertools.cycle([0, (chunks - 1) << 20]), 300)
    with at_most(64 << 20, seconds=3):
        for at in places:
            payload = Payload(shard=0, codec="pooled", at=at)
            assert not reader.payload("bits/w", payload, encodings.BITS, 64).all().any()


def test_a_header_of_overlapping_tensors_is_refused_in_time(tmp_path):
    rows = {f"t{number}": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]} for number in range(10_000)}
    text = json.dumps(rows).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with at_most(256 << 20), pytest.raises(DamagedCheckpointError, match="begin 64 bytes too early"):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [[1 << 31, 1 << 31], [1 << 62, 4], [(1 << 63) - 1] * 1000, [1 << 32, 1 << 32, 0, 1]])
def test_sizes_that_overflow_are_refused_in_checkpoints(tmp_path, shape):
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 if 0 in shape else 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 if 0 in shape else 0))
    with pytest.raises(DamagedCheckpointError, match="which is not the size of"):
        open_checkpoint(path)


# --- files of torch.save ----------------------------------------------------------------------------------------------


def saved(state: object) -> zipfile.ZipFile:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return zipfile.ZipFile(buffer)


def repacked(path: Path, source: zipfile.ZipFile, *, compressed: str, further: bytes = b"") -> None:
    """The archive *source*, its entries whose names end in *compressed* deflated, with bytes behind each of them."""
    with zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            is_chosen = entry.endswith(compressed)
            how = zipfile.ZIP_DEFLATED if is_chosen else zipfile.ZIP_STORED
            target.writestr(entry, source.read(entry) + (further if is_chosen else b""), how)


def test_compressed_weights_are_not_taken_for_weights(tmp_path):
    """torch maps a storage where the archive has it: a compressed one would be read as it is, without an error."""
    path = tmp_path / "model.pt"
    repacked(path, saved({"w": torch.arange(6.0)}), compressed="data/0")
    assert not torch.equal(torch.load(path, mmap=True)["w"], torch.arange(6.0))
    with pytest.raises(DamagedCheckpointError, match="is compressed"):
        open_checkpoint(path)


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    path = tmp_path / "model.pt"
    repacked(path, saved({"w": torch.zeros(2)}), compressed="data.pkl", further=bytes(64 << 20))
    with at_most(8 << 20), pytest.raises(DamagedCheckpointError, match="is compressed"):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [(1 << 36,), (1 << 20, 1 << 20)])
def test_a_view_of_one_element_is_not_laid_out(tmp_path, shape):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(1).expand(shape)}, path)
    with pytest.raises(InputError, match="repeats its elements beyond what the file holds"):
        open_checkpoint(path)


def test_a_small_view_of_one_element_is_read(tmp_path):
    torch.save({"w": torch.ones(1).expand(3, 5)}, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as opened:
        assert opened.read("w").tolist() == [1.0] * 15


def test_a_key_that_is_endless_is_not_shown(tmp_path):
    key: tuple[object, ...] = (0,)
    for _ in range(18):
        key = (key, key)
    torch.save({key: torch.zeros(1)}, tmp_path / "model.pt")
    with at_most(64 << 20), pytest.raises(InputError, match="a key of type tuple") as caught:
        open_checkpoint(tmp_path / "model.pt")
    check_message(str(caught.value))


def archive_of(path: Path, pickle: bytes, *, old: bool) -> Path:
    """A file of torch's whose pickle is another, with a sum for the archive that is not right, as torch allows it."""
    if old:
        buffer = io.BytesIO()
        torch.save({}, buffer, _use_new_zipfile_serialization=False)
        start, state, end = buffer.getvalue().rpartition(b"\x80\x02}q\x00.")
        path.write_bytes(start + pickle + end)
        assert state
        return path
    source = saved({"w": torch.zeros(1)})
    with zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            target.writestr(entry, pickle if entry.endswith("data.pkl") else source.read(entry))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(zlib.crc32(pickle).to_bytes(4, "little"), bytes(4)))
    return path


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


TWICE = b"q\x00h\x00\x86"  # remember it; once more; a tuple of both
PICKLES = {
    "a key that takes hours to hash": b"\x80\x02}" + text("x") + 60 * TWICE + b"K\x01s.",
    "many keys that take a second each": b"\x80\x02}("
    + text("x")
    + 19 * TWICE
    + b"q\x00K\x01"
    + 4000 * b"h\x00K\x01"
    + b"u.",
    "a set of such": b"\x80\x02cbuiltins\nset\n](" + text("x") + 60 * TWICE + b"e\x85R.",
    "hexadecimal digits of such": b"\x80\x02"
    + 60 * b"c_codecs\nencode\n"
    + text("x")
    + 60 * (text("hex") + b"\x86R")
    + b".",
    "zeros": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R.",
    "zeros, as Python 2 called them": b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + bytes(5) + b"\x01\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("pickle", PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_never_ends_is_not_begun(tmp_path, pickle, old):
    path = archive_of(tmp_path / "model.pt", pickle, old=old)
    with at_most(64 << 20, seconds=5), pytest.raises(UnsafeCheckpointError, match="is a pickle that") as caught:
        open_checkpoint(path)
    check_message(str(caught.value))


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_of_as_many_parts_as_it_is_long_is_read(tmp_path, old):
    """What stands beside the weights in a training checkpoint: long texts, bytes, nested and shared objects."""
    shared = [(number, (number, str(number))) for number in range(1000)]
    nested: object = {"names": ["a name of a parameter"] * 5000, "shared": [shared] * 8}
    for level in range(12):
        nested = {"level": level, "of": nested, "as": (level, (level,))}
    state = {
        "state_dict": {"w": torch.arange(4.0)},
        "config": nested,
        "blob": bytes(2_000_000),
        "text": "x" * 1_000_000,
    }
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=not old)
    with open_checkpoint(tmp_path / "model.pt") as opened:
        assert opened.read("w").tolist() == [0, 1, 2, 3]


def test_sparse_tensors_are_not_looked_at(tmp_path):
    """Torch compares every index with the shape, of which a view of one has as many as it pleases."""
    torch.save({"w": torch.eye(2).to_sparse()}, tmp_path / "model.pt")
    with pytest.raises(UnsafeCheckpointError, match="_rebuild_sparse_tensor, more than plain weights"):
        open_checkpoint(tmp_path / "model.pt")


# --- texts ------------------------------------------------------------------------------------------------------------


def laughs(merge: bool) -> str:
    """Twenty lines, each of ten aliases of the one before."""
    lines = ["l0: &l0 {a0: x}" if merge else "l0: &l0 [x]"]
    for number in range(1, 20):
        aliases = ", ".join([f"*l{number - 1}"] * 10)
        lines.append(f"l{number}: &l{number} " + (f"{{a{number}: x, <<: [{aliases}]}}" if merge else f"[{aliases}]"))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("metadata", [laughs(merge=False), laughs(merge=True), "a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_aliases_in_a_card_are_refused(metadata):
    with at_most(16 << 20, seconds=5), pytest.raises(CardError, match="have an alias"):
        front_matter.parse(metadata, "README.md")


@pytest.mark.parametrize("metadata", ["a: " + "[" * 5000, "a: " + "[" * 5000 + "]" * 5000, "- " * 3000, "{a: " * 3000])
def test_nesting_in_a_card_is_refused(metadata):
    with at_most(64 << 20), pytest.raises(CardError, match="nested more than 32 deep"):
        front_matter.parse(metadata, "README.md")


def test_a_card_of_a_million_lines_is_refused():
    with at_most(64 << 20, seconds=2), pytest.raises(CardError, match="shorten them"):
        front_matter.parse("a: b\n" * 1_000_000, "README.md")


@pytest.mark.parametrize("metadata", ["1: a\nb: c\n", "? 2020-01-01\n: x\nnull: y\n", "x: {1: a, b: !!set {c, d}}\n"])
def test_keys_of_any_type_are_read(metadata):
    assert front_matter.parse(metadata, "README.md")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "a = " + "1" * 10_000, 'base = "~a\\u0000b"', "a." * 1000 + "b = 1"]
)
def test_a_hostile_list_of_experts_is_refused(tmp_path, text):
    path = tmp_path / "experts.toml"
    path.write_text(f'{text}\n[experts]\nx = "y"\n')
    with at_most(256 << 20), pytest.raises(InputError) as caught:
        read_expert_file(path)
    check_message(str(caught.value))


@pytest.mark.parametrize(
    "content", [b"[" * 4000, b'{"repo_id":"\xff","sha":"x"}', b'{"repo_id":"a/b","sha":' + b"1" * 4000, b"\0"]
)
def test_an_origin_that_is_none_is_not_known(tmp_path, content):
    (tmp_path / ORIGIN).parent.mkdir(parents=True)
    (tmp_path / ORIGIN).write_bytes(content)
    assert read_origin(tmp_path) is None


def test_files_without_an_end_are_not_read_to_it(tmp_path):
    """Sparse files: they take no space, and their sizes are true."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    for name in ("config.json", "model.safetensors.index.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
        with at_most(2 * MAX_JSON_NBYTES), pytest.raises(DamagedCheckpointError, match="is larger than"):
            open_checkpoint(tmp_path)
        (tmp_path / name).unlink()


def test_a_readme_without_an_end_is_not_read_to_it(tmp_path):
    for name in ("tallstore.json", "base.json"):
        (tmp_path / name).write_bytes((BUNDLE / name).read_bytes())
    with (tmp_path / "README.md").open("wb") as file:
        file.truncate(1 << 40)
    with at_most(3 * MAX_README_NBYTES), pytest.raises(CardError, match="is larger than"):
        LocalBundle(tmp_path).readme()
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")
    with pytest.raises(CardError, match="is not a regular file"):
        LocalBundle(tmp_path).readme()


def test_a_bundle_of_many_tasks_is_opened_in_time(tmp_path):
    """What grows with the square of their number would take hours."""
    manifest = json.loads((BUNDLE / "tallstore.json").read_bytes())
    task, files = manifest["tasks"][0], manifest["files"]
    listed = next(file for file in files if file["path"].endswith("task.json"))
    count = 4_000
    manifest["tasks"] = [task | {"name": f"t{number}", "slug": f"t{number}"} for number in range(count)]
    more = [listed | {"path": f"tasks/t{number}/task.json"} for number in range(count)]
    manifest["files"] = sorted(
        [*(file for file in files if not file["path"].startswith("tasks/")), *more], key=lambda file: file["path"]
    )
    raw = seal_manifest(dump(manifest))
    (tmp_path / "tallstore.json").write_bytes(raw)
    with at_most(len(raw) * 40, seconds=15), tallstore.open_bundle(tmp_path) as bundle:
        assert len(bundle.tasks) == count
        with pytest.raises(tallstore.UnknownTaskError):
            bundle.keys("t")


def test_parts_of_a_file_are_put_together_as_they_were():
    for path in sorted(BUNDLE.rglob("*.safetensors")):
        raw = path.read_bytes()
        is_shard = path.parent.name != "base"
        packed, _, _ = File.of(raw, is_shard=is_shard).pack()
        start, other = (8 + int.from_bytes(content[:8], "little") for content in (raw, packed))
        assert raw[start:] == packed[other:]
