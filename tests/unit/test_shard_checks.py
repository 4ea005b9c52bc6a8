"""Problems of single shards: what is superfluous, out of order or in between."""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
import pytest
import xxhash

from tallstore.errors import FormatError
from tallstore.format import shard_writer
from tallstore.format.encodings import WHOLE
from tallstore.format.manifest import Payload, Pool, Shard
from tallstore.format.payloads import Stored
from tallstore.format.shard_writer import ShardWriter
from tallstore.format.shards import padded
from tallstore.verifying import shard_checks
from tallstore.verifying.findings import attempt
from tallstore.verifying.shard_checks import OwnedShards, check_shards

BYTES = WHOLE["U8"]
NOISE = np.random.default_rng(0).integers(1, 256, 10_000, dtype=np.uint8)
NAME = "private-00001-of-00001.safetensors"


def found(directory, table, payloads, *, complete=True):
    places = {f"tasks/t/{path.name}": path for path in directory.iterdir()}
    with closing(OwnedShards("tasks/t", table, places)) as owned:
        return [(error.rule, error.where) for error in check_shards(owned, payloads, complete=complete)]


@pytest.fixture
def written(tmp_path):
    """Two payloads of their own and two in the pool."""
    writer = ShardWriter(tmp_path)
    sizes = {"values/a": 5000, "values/b": 4500, "values/c": 5, "values/d": 9}
    payloads = [
        Stored(key, writer.whole("private", key, BYTES, size, NOISE[:size]), BYTES, size) for key, size in sizes.items()
    ]
    table, _ = writer.finish()
    return tmp_path, table, payloads


def test_a_sound_shard_has_no_problem(written):
    assert found(*written) == []


def test_a_payload_that_nothing_refers_to_is_found(written):
    directory, table, payloads = written
    where = f"tasks/t/{NAME}"
    assert found(directory, table, payloads[1:]) == [("ST-6", where), ("IDX-2", where)]
    assert found(directory, table, payloads[1:], complete=False) == []


@pytest.mark.parametrize("left_out", [2, 3])
def test_bytes_of_the_pool_that_nothing_refers_to_are_found(written, left_out):
    directory, table, payloads = written
    del payloads[left_out]
    assert found(directory, table, payloads) == [("IDX-4", f"tasks/t/{NAME}, 'pool'")]
    assert found(directory, table, payloads, complete=False) == []


def test_a_payload_that_is_not_there_is_found(written):
    directory, table, payloads = written
    payloads.append(Stored("values/x", Payload(shard=0, codec="raw", at=9), BYTES, 5000))
    assert found(directory, table, payloads) == [("ST-6", f"tasks/t/{NAME}, 'values/x'")]


def test_what_the_tables_have_reported_is_not_reported_again(written):
    directory, table, payloads = written
    payloads.append(Stored("values/x", Payload(shard=0, codec="pooled", at=4), BYTES, 5000))
    payloads.append(Stored("values/y", Payload(shard=0, codec="planes-zstd", at=0), BYTES, 5000))
    assert found(directory, table, payloads, complete=False) == []


def test_a_shard_that_is_not_here_is_passed_over(written):
    directory, table, payloads = written
    (directory / NAME).unlink()
    assert found(directory, table, payloads) == []
    with closing(OwnedShards("tasks/t", table, {})) as owned:
        assert owned.payload(payloads[0]) is None


def test_few_shards_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "MAX_SHARD_NBYTES", 1)
    monkeypatch.setattr(shard_checks, "_MAX_OPEN_SHARDS", 2)
    writer = ShardWriter(tmp_path)
    payloads = [
        Stored(f"values/{n}", writer.whole("private", f"values/{n}", BYTES, 5000, NOISE[n : n + 5000]), BYTES, 5000)
        for n in range(5)
    ]
    table, _ = writer.finish()
    assert len(table) == 5
    places = {f"tasks/t/{path.name}": path for path in tmp_path.iterdir()}
    with closing(OwnedShards("tasks/t", table, places)) as owned:
        for _ in range(2):
            assert list(check_shards(owned, payloads, complete=True)) == []
            assert len(owned._open) == 2
    assert not owned._open


def test_records_that_stand_in_another_order_than_the_payloads_are_found(tmp_path):
    first, second = b"a" * 64, b"b" * 64
    records = [xxhash.xxh3_128_digest(raw) + (64).to_bytes(8, "little") + bytes(8) for raw in (second, first)]
    entries = {
        "__metadata__": {"tallstore": "1.0"},
        "values/a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]},
        "values/b": {"dtype": "U8", "shape": [64], "data_offsets": [64, 128]},
        "index": {"dtype": "U8", "shape": [2, 32], "data_offsets": [128, 192]},
    }
    text = json.dumps(entries).encode()
    text += b" " * (padded(8 + len(text)) - 8 - len(text))
    header, index = len(text).to_bytes(8, "little") + text, b"".join(records)
    (tmp_path / NAME).write_bytes(header + first + second + index)
    shard = Shard(
        file=NAME, header_xxh3=xxhash.xxh3_128_hexdigest(header), index_xxh3=xxhash.xxh3_128_hexdigest(index), pool=None
    )
    payloads = [
        Stored("values/a", Payload(shard=0, codec="raw", at=1), BYTES, 64),
        Stored("values/b", Payload(shard=0, codec="raw", at=0), BYTES, 64),
    ]
    assert found(tmp_path, (shard,), payloads) == [("IDX-2", f"tasks/t/{NAME}")]


def test_gaps_of_a_pool_are_between_before_and_behind_its_members():
    members = [
        Stored("a", Payload(shard=0, codec="pooled", at=16), BYTES, 3),
        Stored("b", Payload(shard=0, codec="pooled", at=24), BYTES, 8),
        Stored("c", Payload(shard=0, codec="raw", at=0), BYTES, 99),
    ]
    assert shard_checks._gaps(members, 40) == [(0, 16), (19, 24), (32, 40)]
    assert shard_checks._gaps([], 8) == [(0, 8)]
    assert shard_checks._gaps([], 0) == []


def test_a_gap_over_several_chunks_is_found_in_each(tmp_path):
    size = (2 << 20) + 100
    writer = ShardWriter(tmp_path)
    payload = writer.payload("private", "pool", BYTES, "raw")
    content = np.zeros(size, np.uint8)
    content[[5, 1 << 20, -1]] = 1
    payload.append(content)
    placed = payload.finish()
    (shard,), _ = writer.finish()
    shard = Shard(
        file=shard.file,
        header_xxh3=shard.header_xxh3,
        index_xxh3=shard.index_xxh3,
        pool=Pool(nbytes=size, codec="raw", at=placed.at),
    )
    member = Stored("values/a", Payload(shard=0, codec="pooled", at=8), BYTES, 100)
    assert found(tmp_path, (shard,), [member]) == [("IDX-4", f"tasks/t/{NAME}, 'pool'")] * 3


def test_an_attempt_yields_why_it_failed_and_goes_on():
    def refuse():
        raise FormatError("ST-1", "here", "is broken")

    def fail():
        raise OSError(5, "Input/output error")

    def drive(action):
        problems = []
        attempting = attempt("file", action)
        while True:
            try:
                problems.append(next(attempting))
            except StopIteration as stop:  # noqa: PERF203 - how a generator returns
                return stop.value, [str(problem) for problem in problems]

    assert drive(lambda: 7) == (7, [])
    assert drive(refuse) == (None, ["here: is broken [ST-1]"])
    assert drive(fail) == (None, ["file: cannot be read (Input/output error) [FILE-4]"])
    with pytest.raises(KeyError):
        drive(lambda: {}["bug"])
