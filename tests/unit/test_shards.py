"""Shards: what is written, what is read, how much of it, and every refusal."""

from __future__ import annotations

import json
import os
import threading

import numpy as np
import pytest
import safetensors
import xxhash

from tallstore.errors import FormatError, IntegrityError
from tallstore.files import hash_file
from tallstore.format import bits, codecs, shard_writer
from tallstore.format.encodings import BITS, GAINS, SHARED, SIGNED, WHOLE
from tallstore.format.manifest import Payload, Pool, Shard
from tallstore.format.shard_reader import LocalFile, ShardReader
from tallstore.format.shard_writer import ShardWriter
from tallstore.format.shards import padded

CHUNK = 1 << 20
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, 3 * CHUNK, dtype=np.uint8)


def codes(numel, values=2):
    return NOISE[:numel] % values


OPEN = []


def close_all():
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(autouse=True)
def close_files():
    yield
    close_all()


def opened(path, shard, verify="first-read"):
    OPEN.append(LocalFile(path, path.name))
    return ShardReader(OPEN[-1], shard, verify)


# --- a round trip -----------------------------------------------------------------------------------------------------


def test_several_chunks_round_trip_and_are_stored_small(tmp_path):
    numel = 2 * CHUNK + 13
    thin = (NOISE[:numel] < 30).astype(np.uint8)  # 12 %: zstd saves more than 3 %
    writer = ShardWriter(tmp_path)
    payload_writer = writer.payload("mask", "bits/w", BITS)
    for start in range(0, numel, 1_000_001):
        payload_writer.append(thin[start : start + 1_000_001])
    payload = payload_writer.finish()
    (shard,), written = writer.finish()
    assert payload == Payload(shard=0, codec="zstd", at=0)
    assert shard.file == "mask-00001-of-00001.safetensors"
    assert shard.pool is None
    assert [path.name for path in tmp_path.iterdir()] == [shard.file]
    assert written == {shard.file: hash_file(tmp_path / shard.file)}
    assert (tmp_path / shard.file).stat().st_size < 0.9 * numel / 8

    reader = opened(tmp_path / shard.file, shard)
    assert reader.keys == {"bits/w"}
    assert reader.record_count == 3
    stored = reader.payload("bits/w", payload, BITS, numel)
    assert [stored.chunk(index).size for index in range(3)] == [CHUNK // 8, CHUNK // 8, 2]
    np.testing.assert_array_equal(bits.unpack(stored.all(), numel, 1), thin)


def test_what_coding_does_not_make_smaller_stays_raw(tmp_path):
    writer = ShardWriter(tmp_path)
    payload = writer.whole("private", "values/w", WHOLE["U8"], 5000, NOISE[:5000])
    assert payload.codec == "raw"
    (shard,), _ = writer.finish()
    assert opened(tmp_path / shard.file, shard).payload("values/w", payload, WHOLE["U8"], 5000).all().tobytes() == (
        NOISE[:5000].tobytes()
    )


def test_floats_go_to_planes(tmp_path):
    values = np.linspace(1, 2, 5000, dtype="<f4").view(np.uint8)
    writer = ShardWriter(tmp_path)
    payload = writer.whole("private", "values/w", WHOLE["F32"], 5000, values)
    assert payload.codec == "planes-zstd"
    (shard,), _ = writer.finish()
    reader = opened(tmp_path / shard.file, shard)
    assert reader.payload("values/w", payload, WHOLE["F32"], 5000).all().tobytes() == values.tobytes()


def test_a_codec_that_is_asked_for_is_taken(tmp_path):
    writer = ShardWriter(tmp_path)
    payload_writer = writer.payload("mask", "bits/w", BITS, "raw")
    payload_writer.append(np.zeros(CHUNK + 1, np.uint8))
    assert payload_writer.finish().codec == "raw"


def test_a_writer_that_does_not_compress_stores_payloads_and_pool_raw_but_for_a_codec_that_is_asked_for(tmp_path):
    writer = ShardWriter(tmp_path, compress=False)
    zeros = np.zeros(5000, np.uint8)
    large, small = (writer.whole("private", f"values/{n}", WHOLE["U8"], n, zeros[:n]) for n in (5000, 4000))
    asked = writer.payload("private", "values/asked", WHOLE["U8"], "zstd")
    asked.append(zeros)
    assert (large.codec, small.codec, asked.finish().codec) == ("raw", "pooled", "zstd")
    (shard,), _ = writer.finish()
    assert shard.pool is not None
    assert (shard.pool.codec, shard.pool.nbytes) == ("raw", 4000)
    reader = opened(tmp_path / shard.file, shard)
    for payload, numel in ((large, 5000), (small, 4000)):
        stored = reader.payload(f"values/{numel}", payload, WHOLE["U8"], numel)
        assert stored.all().tobytes() == zeros[:numel].tobytes()


@pytest.mark.parametrize(("encoding", "values"), [(BITS, 2), (SIGNED, 3), (SHARED["LOG4"], 16)])
@pytest.mark.parametrize("numel", [10, 5000])
def test_packed_fields_that_are_at_hand_round_trip(tmp_path, encoding, values, numel):
    packed = bits.pack(codes(numel, values), encoding.width)
    writer = ShardWriter(tmp_path)
    payload = writer.whole("mask", "bits/w", encoding, numel, packed)
    (shard,), _ = writer.finish()
    assert (payload.codec == "pooled") == (numel < 4096)
    reader = opened(tmp_path / shard.file, shard)
    assert reader.payload("bits/w", payload, encoding, numel).all().tobytes() == packed.tobytes()


def test_small_payloads_share_the_pool(tmp_path):
    writer = ShardWriter(tmp_path)
    sizes = [1, 7, 8, 9, 4095, 4096]
    payloads = [writer.whole("private", f"values/{n}", WHOLE["U8"], n, NOISE[n : 2 * n]) for n in sizes]
    (shard,), _ = writer.finish()
    assert [(payload.codec, payload.at) for payload in payloads] == [
        ("pooled", 0),
        ("pooled", 8),
        ("pooled", 16),
        ("pooled", 24),
        ("pooled", 40),
        ("raw", 0),
    ]
    assert shard.pool == Pool(nbytes=40 + 4096, codec="raw", at=1)
    reader = opened(tmp_path / shard.file, shard)
    assert reader.keys == {"values/4096", "pool"}
    for n, payload in zip(sizes, payloads, strict=True):
        found = reader.payload(f"values/{n}", payload, WHOLE["U8"], n).all()
        assert found.tobytes() == NOISE[n : 2 * n].tobytes()


def test_a_pool_of_several_chunks(tmp_path):
    writer = ShardWriter(tmp_path)
    payloads = [writer.whole("private", f"values/{n}", WHOLE["F64"], 4095, NOISE[n : n + 8 * 4095]) for n in range(70)]
    (shard,), _ = writer.finish()
    assert shard.pool.nbytes == 70 * 8 * 4095 > 2 * CHUNK
    reader = opened(tmp_path / shard.file, shard)
    for n, payload in reversed(list(enumerate(payloads))):
        found = reader.payload(f"values/{n}", payload, WHOLE["F64"], 4095).all()
        assert found.tobytes() == NOISE[n : n + 8 * 4095].tobytes()


def test_members_of_the_pool_do_not_share_memory(tmp_path):
    writer = ShardWriter(tmp_path)
    payload = writer.whole("private", "values/w", WHOLE["U8"], 3, np.array([1, 2, 3], np.uint8))
    (shard,), _ = writer.finish()
    stored = opened(tmp_path / shard.file, shard).payload("values/w", payload, WHOLE["U8"], 3)
    stored.all()[:] = 0
    assert stored.all().tolist() == [1, 2, 3]


def test_a_full_shard_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "MAX_SHARD_NBYTES", 10_000)
    writer = ShardWriter(tmp_path)
    written = {}
    for n in range(6):
        written[f"values/{n}"] = writer.whole("private", f"values/{n}", WHOLE["U8"], 5000, NOISE[n : n + 5000])
        written[f"bits/{n}"] = writer.whole("mask", f"bits/{n}", BITS, 7, np.array([n], np.uint8))
    table, files = writer.finish()
    assert [shard.file for shard in table] == [
        "private-00001-of-00003.safetensors",
        "mask-00001-of-00001.safetensors",
        "private-00002-of-00003.safetensors",
        "private-00003-of-00003.safetensors",
    ]
    assert files.keys() == {shard.file for shard in table} == {path.name for path in tmp_path.iterdir()}
    readers = [opened(tmp_path / shard.file, shard) for shard in table]
    for n in range(6):
        payload = written[f"values/{n}"]
        found = readers[payload.shard].payload(f"values/{n}", payload, WHOLE["U8"], 5000).all()
        assert found.tobytes() == NOISE[n : n + 5000].tobytes()
        payload = written[f"bits/{n}"]
        assert readers[payload.shard].payload(f"bits/{n}", payload, BITS, 7).all().tolist() == [n]


def test_a_shard_takes_no_more_payloads_than_its_header_can_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "MAX_SHARD_PAYLOADS", 2)
    writer = ShardWriter(tmp_path)
    for n in range(5):
        writer.whole("private", f"values/{n}", WHOLE["U8"], 4096, NOISE[:4096])
    table, _ = writer.finish()
    assert len(table) == 3
    longest = len(json.dumps({'"' * 1024: {"dtype": "U8", "shape": [4 << 30], "data_offsets": [4 << 30, 8 << 30]}}))
    assert (1 << 15) * longest < 100_000_000


def test_a_payload_that_is_discarded_leaves_no_trace(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for directory, discard in (("a", False), ("b", True)):
        writer = ShardWriter(tmp_path / directory)
        writer.whole("mask", "bits/first", BITS, 8192, NOISE[:1024])
        if discard:
            unwanted = writer.payload("mask", "bits/unwanted", BITS, "zstd")
            unwanted.append(codes(CHUNK + 5))
            unwanted.discard()
        writer.whole("mask", "bits/second", BITS, 8192, NOISE[1024:2048])
        writer.finish()
    name = "mask-00001-of-00001.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_written_is_no_shard(tmp_path):
    assert ShardWriter(tmp_path).finish() == ((), {})
    assert list(tmp_path.iterdir()) == []


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A small shard with everything: raw, coded, pooled, padding. Its path, its entry, and what is in it."""
    writer = ShardWriter(tmp_path)
    contents = [
        ("bits/w", BITS, 4099, bits.pack(codes(4099), 1)),
        ("fields/w", SIGNED, 4097, bits.pack((NOISE[:4097] > 250).astype(np.uint8), 2)),
        ("gains/w", GAINS, 3, np.array([1, 0.5, -2], "<f4").view(np.uint8)),
        ("bits/v", BITS, 3, np.array([5], np.uint8)),
    ]
    stored = [
        (key, writer.whole("mask", key, encoding, n, raw), encoding, n, raw) for key, encoding, n, raw in contents
    ]
    (shard,), _ = writer.finish()
    assert [payload.codec for _, payload, *_ in stored] == ["raw", "zstd", "pooled", "pooled"]
    return tmp_path / shard.file, shard, stored


def read_everything(path, shard, stored):
    reader = opened(path, shard)
    for key, payload, encoding, numel, raw in stored:
        assert reader.payload(key, payload, encoding, numel).all().tobytes() == raw.tobytes()


def test_any_reader_of_safetensors_opens_a_shard(small):
    path, _, stored = small
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {"bits/w", "fields/w", "pool", "index"}
        assert file.metadata() == {"tallstore": "1.0"}
        index = file.get_tensor("index")
        assert (index.dtype, index.shape) == (np.uint8, (3, 32))
        found = file.get_tensor("bits/w")
        raw = stored[0][-1]
        assert found.shape == (576,)
        assert found[: raw.size].tobytes() == raw.tobytes()
        assert not found[raw.size :].any()


def test_everything_begins_on_a_64_byte_boundary(small):
    path, shard, _ = small
    raw = path.read_bytes()
    nbytes = 8 + int.from_bytes(raw[:8], "little")
    assert nbytes % 64 == 0
    assert raw[8:9] == b"{"
    assert raw[nbytes - 1 : nbytes] in b" }"
    assert shard.header_xxh3 == xxhash.xxh3_128_hexdigest(raw[:nbytes])
    entries = json.loads(raw[8:nbytes])
    assert entries.pop("__metadata__") == {"tallstore": "1.0"}
    assert all(entry["data_offsets"][0] % 64 == 0 for entry in entries.values())
    assert max(entries, key=lambda key: entries[key]["data_offsets"]) == "index"
    first, end = entries["index"]["data_offsets"]
    assert nbytes + end == len(raw)
    index = raw[nbytes + first :]
    assert shard.index_xxh3 == xxhash.xxh3_128_hexdigest(index)
    begin = entries["bits/w"]["data_offsets"][0] + nbytes
    stop = int.from_bytes(index[16:24], "little")
    assert index[:16] == xxhash.xxh3_128_digest(raw[begin : begin + stop])
    assert index[24:32] == bytes(8)


def test_the_same_elements_give_the_same_bytes_whatever_the_pieces(tmp_path):
    numel = CHUNK + 4097
    written = []
    for pieces in (numel, 4097, 999_983):
        directory = tmp_path / str(pieces)
        directory.mkdir()
        writer = ShardWriter(directory)
        payload = writer.payload("mask", "fields/w", SIGNED)
        for start in range(0, numel, pieces):
            payload.append(codes(numel, 3)[start : start + pieces])
        payload.finish()
        (shard,), _ = writer.finish()
        written.append((shard, (directory / shard.file).read_bytes()))
    assert written[0] == written[1] == written[2]


def test_every_flipped_byte_is_refused_or_padding_of_a_payload(small):
    path, shard, stored = small
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:header])
    ends = dict(
        zip(["bits/w", "fields/w", "pool"], opened(path, shard)._ends.tolist(), strict=True)  # one chunk each
    )
    padding = {
        header + position
        for key, end in ends.items()
        for position in range(entries[key]["data_offsets"][0] + end, entries[key]["data_offsets"][1])
    }
    assert len(padding) > 30
    unnoticed = set()
    for position in range(len(raw)):
        close_all()
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 0x10]) + raw[position + 1 :])
        try:
            read_everything(path, shard, stored)
        except FormatError:
            continue
        unnoticed.add(position)
    assert unnoticed == padding


def test_a_truncated_or_extended_file_is_refused(small):
    path, shard, stored = small
    raw = path.read_bytes()
    for length in [*range(0, len(raw), 7), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError) as caught:
            read_everything(path, shard, stored)
        assert caught.value.rule in {"ST-2", "ST-5"}
    path.write_bytes(raw + b"\0")
    with pytest.raises(FormatError, match="ST-2"):
        opened(path, shard)


def test_a_file_that_shrinks_while_it_is_open_is_refused(small):
    path, shard, stored = small
    reader = opened(path, shard)
    path.write_bytes(path.read_bytes()[:600])
    key, payload, encoding, numel, _ = stored[1]
    with pytest.raises(IntegrityError, match="ST-2"):
        reader.payload(key, payload, encoding, numel).all()


# --- how much is read -------------------------------------------------------------------------------------------------


def test_only_the_chunks_that_are_asked_for_are_read(tmp_path):
    numel = 3 * CHUNK
    writer = ShardWriter(tmp_path)
    payload = writer.payload("private", "values/w", WHOLE["U8"], "raw")
    payload.append(NOISE)
    first = payload.finish()
    small = writer.whole("private", "values/v", WHOLE["U8"], 10, NOISE[:10])
    (shard,), _ = writer.finish()
    file = LocalFile(tmp_path / shard.file, shard.file)
    reader = ShardReader(file, shard)
    header = reader.header.nbytes
    opening = 8 + header + 4 * 32
    assert file.nbytes_read == opening
    reader.payload("values/w", first, WHOLE["U8"], numel).chunk(1)
    assert file.nbytes_read == opening + CHUNK
    reader.payload("values/v", small, WHOLE["U8"], 10).all()
    assert file.nbytes_read == opening + CHUNK + 16
    reader.payload("values/v", small, WHOLE["U8"], 10).all()
    assert file.nbytes_read == opening + CHUNK + 16  # the pool's last chunk is kept
    file.close()


@pytest.mark.parametrize(
    ("verify", "first", "second"),
    [("first-read", "refused", "refused"), ("always", "refused", "refused"), ("never", "read", "read")],
)
def test_chunks_are_verified_as_asked(small, verify, first, second):
    path, shard, stored = small
    raw = bytearray(path.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1
    path.write_bytes(bytes(raw))
    reader = opened(path, shard, verify)
    key, payload, encoding, numel, _ = stored[0]
    for expected in (first, second):
        if expected == "read":
            reader.payload(key, payload, encoding, numel).all()
        else:
            with pytest.raises(IntegrityError, match="IDX-3"):
                reader.payload(key, payload, encoding, numel).all()


@pytest.mark.parametrize("verify", ["first-read", "never", "always"])
@pytest.mark.parametrize("set_back", [False, True])
def test_a_chunk_that_changes_after_its_first_read(small, verify, set_back):
    """Also where somebody sets the time of change back."""
    path, shard, stored = small
    reader = opened(path, shard, verify)
    key, payload, encoding, numel, _ = stored[0]
    payload_reader = reader.payload(key, payload, encoding, numel)
    payload_reader.all()
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(reader.header.nbytes)
        file.write(b"\0\1\2\3")
    if set_back:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    if verify != "never":
        with pytest.raises(IntegrityError, match="IDX-3"):
            payload_reader.all()
    else:
        payload_reader.all()


def test_a_chunk_is_verified_once_unless_somebody_writes_to_the_file(small, monkeypatch):
    path, shard, stored = small
    key, payload, encoding, numel, _ = stored[0]
    asked = []
    digest = xxhash.xxh3_128_digest
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: asked.append(1) or digest(data))
    for verify, once, twice, rewritten in (("first-read", 1, 1, 2), ("always", 1, 2, 3), ("never", 0, 0, 0)):
        reader = opened(path, shard, verify).payload(key, payload, encoding, numel)
        asked.clear()
        counts = []
        for writes in (False, False, True):
            if writes:
                path.write_bytes(path.read_bytes())
            reader.chunk(0)
            counts.append(len(asked))
        assert counts == [once, twice, rewritten], verify


def test_threads_may_share_a_reader(tmp_path):
    writer = ShardWriter(tmp_path)
    count = 300
    payloads = [writer.whole("private", f"values/{n}", WHOLE["F64"], 4000, NOISE[n : n + 32_000]) for n in range(count)]
    (shard,), _ = writer.finish()
    reader = opened(tmp_path / shard.file, shard)
    wrong = []

    def read(order):
        for n in order:
            found = reader.payload(f"values/{n}", payloads[n], WHOLE["F64"], 4000).all()
            if found.tobytes() != NOISE[n : n + 32_000].tobytes():
                wrong.append(n)

    threads = [
        threading.Thread(target=read, args=(np.random.default_rng(seed).permutation(count),)) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def record(stored, end, rank=0):
    return xxhash.xxh3_128_digest(stored) + end.to_bytes(8, "little") + rank.to_bytes(8, "little")


def entry(start, stop, **changes):
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **changes}


CONTENT = bytes(range(100))
ENTRIES = {
    "__metadata__": {"tallstore": "1.0"},
    "values/w": entry(0, 128),
    "index": entry(128, 160, shape=[1, 32]),
}
DATA = CONTENT + bytes(28) + record(CONTENT, 100)


def handmade(directory, entries=ENTRIES, data=DATA, *, pad=True, index_nbytes=32, pool=None):
    """A shard written by hand, with the hashes of what it holds, so that it breaks no rule but the one in question."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    if pad:
        text += b" " * (padded(8 + len(text)) - 8 - len(text))
    header = len(text).to_bytes(8, "little") + text
    path = directory / "private-00001-of-00001.safetensors"
    path.write_bytes(header + data)
    return path, Shard(
        file=path.name,
        header_xxh3=xxhash.xxh3_128_hexdigest(header),
        index_xxh3=xxhash.xxh3_128_hexdigest(data[-index_nbytes:]),
        pool=pool,
    )


def refused(action, *arguments):
    with pytest.raises(FormatError) as caught:
        action(*arguments)
    assert caught.value.where.startswith("private-00001-of-00001.safetensors")
    assert "\n" not in str(caught.value)
    return caught.value.rule


def test_the_handmade_shard_is_read(tmp_path):
    reader = opened(*handmade(tmp_path))
    payload = Payload(shard=0, codec="raw", at=0)
    assert reader.payload("values/w", payload, WHOLE["U8"], 100).all().tobytes() == CONTENT
    assert (reader._ends[0], reader._ranks[0]) == (100, 0)
    assert reader._digests[0].tobytes() == xxhash.xxh3_128_digest(CONTENT)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("ST-1", {"entries": "{"}),
        ("ST-1", {"entries": "[]"}),
        ("ST-1", {"entries": '{"index": 1, "index": 2}'}),
        ("ST-1", {"entries": {**ENTRIES, "values/w": {"dtype": "U8"}}}),
        ("ST-1", {"entries": {**ENTRIES, "values/w": entry(0, 128, extra=1)}}),
        ("ST-1", {"entries": {**ENTRIES, "values/w": entry(0, 128, shape=[127])}}),
        ("ST-2", {"data": DATA + b"\0"}),
        ("ST-2", {"data": DATA[:-1]}),
        ("ST-2", {"entries": {**ENTRIES, "values/w": entry(64, 128)}}),
        ("ST-2", {"entries": {**ENTRIES, "values/w": entry(0, 160)}}),
        ("ST-3", {"entries": {**ENTRIES, "values/w": entry(0, 128, dtype="I8")}}),
        ("ST-3", {"entries": {**ENTRIES, "values/w": entry(0, 128, shape=[2, 64])}}),
        ("ST-3", {"entries": {**ENTRIES, "values/w": entry(0, 100), "v": entry(100, 128)}}),
        ("ST-3", {"entries": {**ENTRIES, "index": entry(128, 160, shape=[1, 8], dtype="I32")}}),
        ("ST-3", {"pad": False}),
        ("ST-4", {"entries": {key: ENTRIES[key] for key in ("values/w", "index")}}),
        ("ST-4", {"entries": {**ENTRIES, "__metadata__": {}}}),
        ("ST-4", {"entries": {**ENTRIES, "__metadata__": {"tallstore": "1.0", "more": "x"}}}),
        ("ST-4", {"entries": {**ENTRIES, "__metadata__": {"format": "pt"}}}),
        ("ST-4", {"entries": {**ENTRIES, "__metadata__": {"tallstore": 1}}}),
        ("IDX-1", {"entries": {key: ENTRIES[key] for key in ("__metadata__", "values/w")}, "data": DATA[:128]}),
        ("IDX-1", {"entries": {**ENTRIES, "index": entry(128, 160)}}),
        ("IDX-1", {"entries": {**ENTRIES, "index": entry(128, 160, shape=[2, 16])}}),
        ("IDX-1", {"entries": {**ENTRIES, "v": entry(192, 256), "index": entry(128, 192, shape=[2, 32])},
                   "data": DATA + bytes(96)}),
        ("IDX-1", {"index_nbytes": 31}),
    ],
)  # fmt: skip
def test_a_malformed_shard_is_refused_when_it_is_opened(tmp_path, rule, changes):
    assert refused(opened, *handmade(tmp_path, **changes)) == rule


def test_another_header_than_the_recorded_one_is_refused(tmp_path):
    path, shard = handmade(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"values/w"', b'"values/v"'))
    with pytest.raises(IntegrityError, match="ST-5"):
        opened(path, shard)


def test_a_header_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path):
    path, shard = handmade(tmp_path)
    for length, rule in ((1 << 63, "ST-1"), (100_000_001, "ST-1"), (100_000_000, "ST-2")):
        path.write_bytes(length.to_bytes(8, "little") + bytes(100))
        assert refused(opened, path, shard) == rule


def read(handmade_shard, *, key="values/w", codec="raw", at=0, encoding=WHOLE["U8"], numel=100):
    path, shard = handmade_shard
    return opened(path, shard).payload(key, Payload(shard=0, codec=codec, at=at), encoding, numel).all()


@pytest.mark.parametrize(
    ("rule", "reading"),
    [
        ("ST-6", {"key": "values/v"}),
        ("ST-6", {"key": "pool"}),
        ("IDX-2", {"at": 1}),
        ("IDX-2", {"at": 1 << 62}),
        ("IDX-2", {"numel": CHUNK + 1}),
        ("IDX-2", {"numel": 1 << 40}),
        ("COD-3", {"codec": "zstd"}),
        ("COD-4", {"codec": "planes-zstd"}),
        ("COD-5", {"numel": 99}),
        ("COD-5", {"numel": 101}),
        ("TAB-6", {"codec": "pooled"}),
        ("BOOL-1", {"encoding": WHOLE["BOOL"]}),
        ("NUM-1", {"encoding": GAINS, "numel": 25}),
    ],
)
def test_a_payload_that_is_not_there_or_not_what_it_should_be_is_refused(tmp_path, rule, reading):
    assert refused(lambda: read(handmade(tmp_path), **reading)) == rule


@pytest.mark.parametrize("end", [99, 64, 0, 129, 192, 1 << 63, (1 << 64) - 1])
def test_end_offsets_that_do_not_fit_are_refused(tmp_path, end):
    """99 takes the same padded bytes as 100: there the length, or the hash, is wrong."""
    data = DATA[:128] + record(CONTENT, end)
    assert refused(lambda: read(handmade(tmp_path, data=data))) == ("IDX-3" if end == 99 else "IDX-2")


def test_end_offsets_that_descend_are_refused(tmp_path):
    entries = {**ENTRIES, "index": entry(128, 192, shape=[2, 32])}
    data = DATA[:128] + record(CONTENT, 101) + record(CONTENT, 100)
    shard = handmade(tmp_path, entries=entries, data=data, index_nbytes=64)
    assert refused(lambda: read(shard, numel=CHUNK + 1)) == "IDX-2"


@pytest.mark.parametrize(
    ("rule", "pool", "reading"),
    [
        ("TAB-6", Pool(nbytes=100, codec="raw", at=0), {"at": 4}),
        ("TAB-6", Pool(nbytes=100, codec="raw", at=0), {"at": 96, "numel": 5}),
        ("TAB-6", Pool(nbytes=100, codec="raw", at=0), {"at": 1 << 60}),
        ("ST-6", Pool(nbytes=100, codec="raw", at=0), {"at": 0}),
        ("COD-5", Pool(nbytes=99, codec="raw", at=0), {"at": 0, "key": "pool"}),
        ("COD-3", Pool(nbytes=100, codec="zstd", at=0), {"at": 0, "key": "pool"}),
        ("IDX-2", Pool(nbytes=100, codec="raw", at=1), {"at": 0, "key": "pool"}),
        ("IDX-2", Pool(nbytes=1 << 62, codec="raw", at=0), {"at": 0, "key": "pool"}),
    ],
)
def test_a_member_that_is_not_in_the_pool_is_refused(tmp_path, rule, pool, reading):
    entries = dict(ENTRIES)
    if reading.pop("key", None) == "pool":
        entries = {"__metadata__": ENTRIES["__metadata__"], "pool": ENTRIES["values/w"], "index": ENTRIES["index"]}
    shard = handmade(tmp_path, entries=entries, pool=pool)
    assert refused(lambda: read(shard, codec="pooled", **{"numel": 3, **reading})) == rule


def test_a_bomb_in_a_chunk_is_refused(tmp_path):
    """A frame of 16 MiB where 100 bytes are due."""
    bomb = codecs.encode("zstd", np.zeros(1 << 24, np.uint8), 1)
    data = bomb + bytes(padded(len(bomb)) - len(bomb)) + record(bomb, len(bomb))
    stop = padded(len(bomb))
    entries = {**ENTRIES, "values/w": entry(0, stop), "index": entry(stop, stop + 32, shape=[1, 32])}
    shard = handmade(tmp_path, entries=entries, data=data)
    assert refused(lambda: read(shard, codec="zstd")) == "COD-1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns of threads
def test_a_forked_process_reads_what_it_asks_for(tmp_path):
    """Both sides of a fork share the file: neither may depend on its position."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(256)) * 4096)
    file = LocalFile(path, "numbers")
    child = os.fork()
    right = all(
        bytes(file.read(at, at + 3)) == bytes((at % 256, (at + 1) % 256, (at + 2) % 256)) for at in range(20_000)
    )
    if child == 0:
        os._exit(0 if right else 1)
    file.close()
    assert right
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
