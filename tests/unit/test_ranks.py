"""Ranks: the bits of a sparse tensor are counted when they are written, and again when they are read."""

from __future__ import annotations

import contextlib

import msgspec
import numpy as np
import pytest
import xxhash

from tallstore.errors import FormatError
from tallstore.format import bits, shard_writer
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import BITS
from tallstore.format.shard_reader import LocalFile, ShardReader
from tallstore.format.shard_writer import ShardWriter

NUMEL = 2 * CHUNK_NUMEL + 100
CODES = (np.random.default_rng(0).random(NUMEL) < 0.05).astype(np.uint8)
COUNT = int(CODES.sum())
RANKS = [0, int(CODES[:CHUNK_NUMEL].sum()), int(CODES[: 2 * CHUNK_NUMEL].sum())]


@contextlib.contextmanager
def read(path, shard, payload, set_count=COUNT, numel=NUMEL):
    with contextlib.closing(LocalFile(path, "shard")) as file:
        yield ShardReader(file, shard).payload("bits/w", payload, BITS, numel, set_count)


def write(directory, *, codec="raw", ranked=True, ranks=None):
    """The bits in a shard of their own, *ranks* in the place of theirs: its path, its row of the table, its place."""
    writer = ShardWriter(directory)
    payload_writer = writer.payload("mask", "bits/w", BITS, codec, ranked=ranked)
    for piece in np.array_split(CODES, 7):
        payload_writer.append(piece)
    payload = payload_writer.finish()
    assert payload_writer.rank == (COUNT if ranked else 0)
    (shard,), _ = writer.finish()
    path = directory / shard.file
    if ranks is not None:
        content = bytearray(path.read_bytes())
        index = np.frombuffer(content, np.uint8)[-32 * len(ranks) :].reshape(-1, 32)
        index[:, 24:] = np.array(ranks, "<u8").view(np.uint8).reshape(-1, 8)
        path.write_bytes(content)
        shard = msgspec.structs.replace(shard, index_xxh3=xxhash.xxh3_128_hexdigest(index.tobytes()))
    return path, shard, payload


@pytest.mark.parametrize("codec", [None, "raw", "zstd"])
def test_a_rank_is_the_bits_set_in_the_chunks_before(tmp_path, codec):
    """With a codec that is chosen after a few chunks, too."""
    with read(*write(tmp_path, codec=codec)) as payload:
        assert [payload.rank(index) for index in range(3)] == RANKS
        np.testing.assert_array_equal(bits.unpack(payload.all(), NUMEL, 1), CODES)


def test_ranks_of_many_chunks_wait_for_their_codec(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "_TRIAL_CHUNKS", 2)
    with read(*write(tmp_path, codec=None)) as payload:
        assert [payload.rank(index) for index in range(3)] == RANKS


def test_a_discarded_payload_leaves_no_rank(tmp_path):
    writer = ShardWriter(tmp_path)
    for keep in (False, True):
        payload_writer = writer.payload("mask", "bits/w", BITS, "raw", ranked=True)
        payload_writer.append(CODES)
        if keep:
            payload = payload_writer.finish()
        else:
            payload_writer.discard()
    (shard,), _ = writer.finish()
    with read(tmp_path / shard.file, shard, payload) as reader:
        assert [reader.rank(index) for index in range(3)] == RANKS


def test_what_is_not_ranked_has_ranks_of_zero(tmp_path):
    path, shard, payload = write(tmp_path, ranked=False)
    with read(path, shard, payload, None) as reader:
        assert reader.all().size == bits.packed_nbytes(NUMEL, 1)
    with pytest.raises(FormatError, match="IDX-5"), read(path, shard, payload) as reader:
        reader.all()


def test_ranks_where_nothing_is_counted_are_refused(tmp_path):
    with pytest.raises(FormatError, match="count bits") as caught, read(*write(tmp_path), None):
        pass
    assert caught.value.rule == "IDX-5"


@pytest.mark.parametrize(
    "ranks",
    [
        [1, RANKS[1], RANKS[2]],
        [0, RANKS[2], RANKS[1]],
        [0, CHUNK_NUMEL + 1, CHUNK_NUMEL + 2],
        [0, RANKS[1], COUNT + 1],
        [0, RANKS[1], 2**64 - 1],
    ],
)
def test_ranks_that_cannot_be_are_refused_before_a_chunk_is_read(tmp_path, ranks):
    with pytest.raises(FormatError) as caught, read(*write(tmp_path, ranks=ranks)):
        pass
    assert caught.value.rule == "IDX-5"


def test_ranks_that_are_not_the_bits_are_refused_with_the_chunk(tmp_path):
    """Of two neighbours, both: one has too many for its rank, the other too few."""
    with read(*write(tmp_path, ranks=[0, RANKS[1] + 1, RANKS[2]])) as payload:
        for index in (0, 1):
            with pytest.raises(FormatError, match=f"chunk {index}: has [0-9]+ bits set") as caught:
                payload.chunk(index)
            assert caught.value.rule == "IDX-5"
        payload.chunk(2)


@pytest.mark.parametrize("more", [-1, 1])
def test_another_count_is_refused_with_the_last_chunk(tmp_path, more):
    with read(*write(tmp_path), COUNT + more) as payload:
        payload.chunk(0)
        payload.chunk(1)
        with pytest.raises(FormatError, match=r"chunk 2: has [0-9]+ bits set, the count leaves") as caught:
            payload.chunk(2)
    assert caught.value.rule == "TAB-9"


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("numel", [100, NUMEL], ids=["one chunk", "three"])
def test_pooled_bits_are_counted(tmp_path, monkeypatch, numel, more):
    """They have no records of their own. A writer pools no more than a few elements, a reader takes any number."""
    monkeypatch.setattr(shard_writer, "POOLED_NUMEL", NUMEL + 1)
    writer = ShardWriter(tmp_path)
    placed = writer.whole("mask", "bits/w", BITS, numel, bits.pack(CODES[:numel], 1), ranked=True)
    assert placed.codec == "pooled"
    (shard,), _ = writer.finish()
    with read(tmp_path / shard.file, shard, placed, int(CODES[:numel].sum()) + more, numel) as payload:
        last = (numel - 1) // CHUNK_NUMEL
        assert [payload.rank(index) for index in range(last + 1)] == RANKS[: last + 1]
        if not more:
            np.testing.assert_array_equal(bits.unpack(payload.all(), numel, 1), CODES[:numel])
            return
        with pytest.raises(FormatError) as caught:
            payload.chunk(last)
        assert caught.value.rule == "TAB-9"
