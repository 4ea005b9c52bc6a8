"""Any payloads, in pieces of any size, in shards of any size."""

from __future__ import annotations

import contextlib
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore.errors import FormatError
from tallstore.format import bits, shard_writer
from tallstore.format.encodings import BITS, SHARED, SIGNED, WHOLE
from tallstore.format.shard_reader import LocalFile, ShardReader
from tallstore.format.shard_writer import ShardWriter

VALUES = {BITS: 2, SIGNED: 3, SHARED["LOG4"]: 16}
SIZES = st.integers(1, 40) | st.integers(4000, 4200) | st.sampled_from([9000, (1 << 20) + 1])


@st.composite
def payloads(draw):
    """An encoding, its elements (one code a byte, or their bytes), and the sizes of the pieces that they come in."""
    encoding = draw(st.sampled_from([*VALUES, WHOLE["U8"], WHOLE["BF16"], WHOLE["F64"]]))
    numel = draw(SIZES)
    random = np.random.default_rng(draw(st.integers(0, 99)))
    high = VALUES.get(encoding, draw(st.sampled_from([2, 256])))
    units = random.integers(0, high, numel * encoding.itemsize, dtype=np.uint8)
    return encoding, numel, units, draw(st.sampled_from([None, "raw", "zstd"])), draw(st.integers(1, units.size))


@settings(max_examples=25)
@given(
    contents=st.lists(payloads(), min_size=1, max_size=5),
    limit=st.sampled_from([1, 1000, 10_000, 1 << 32]),
    stems=st.lists(st.sampled_from(["mask", "private"]), min_size=5, max_size=5),
)
def test_what_was_written_is_read_back(contents, limit, stems):
    with (
        tempfile.TemporaryDirectory() as directory,
        pytest.MonkeyPatch.context() as patch,
        contextlib.ExitStack() as stack,
    ):
        patch.setattr(shard_writer, "MAX_SHARD_NBYTES", limit)
        root = Path(directory)
        writer = ShardWriter(root)
        written = []
        for number, (encoding, numel, units, codec, piece) in enumerate(contents):
            decoded = bits.pack(units, encoding.width) if encoding.width < 8 else units
            if numel < shard_writer.POOLED_NUMEL:
                written.append(writer.whole(stems[number], str(number), encoding, numel, decoded))
                continue
            payload = writer.payload(stems[number], str(number), encoding, codec)
            for start in range(0, units.size, max(piece, 1000)):
                payload.append(units[start : start + max(piece, 1000)])
            written.append(payload.finish())
        table, files = writer.finish()
        assert files.keys() == {shard.file for shard in table} == {path.name for path in root.iterdir()}
        opened = [stack.enter_context(closing(LocalFile(root / shard.file, shard.file))) for shard in table]
        readers = [ShardReader(file, shard) for file, shard in zip(opened, table, strict=True)]
        for number, ((encoding, numel, units, *_), payload) in enumerate(zip(contents, written, strict=True)):
            assert table[payload.shard].file.startswith(stems[number])
            found = readers[payload.shard].payload(str(number), payload, encoding, numel).all()
            decoded = bits.pack(units, encoding.width) if encoding.width < 8 else units
            assert found.tobytes() == decoded.tobytes()
        for shard in table:
            with safetensors.safe_open(root / shard.file, "np") as reader:
                assert "index" in reader.keys()  # noqa: SIM118 - it is no mapping


@settings(max_examples=30)
@given(position=st.integers(0, 10**9), flip=st.integers(1, 255), seed=st.integers(0, 9))
def test_a_flipped_byte_never_changes_what_is_read(position, flip, seed):
    """It is refused, or it lies in padding and changes nothing."""
    units = np.random.default_rng(seed).integers(0, 2, 5000, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as directory:
        writer = ShardWriter(Path(directory))
        first = writer.whole("mask", "first", BITS, 5000, bits.pack(units, 1))
        second = writer.whole("mask", "second", BITS, 50, bits.pack(units[:50], 1))
        (shard,), _ = writer.finish()
        path = Path(directory) / shard.file
        raw = bytearray(path.read_bytes())
        raw[position % len(raw)] ^= flip
        path.write_bytes(bytes(raw))
        found, rule = None, None
        with closing(LocalFile(path, shard.file)) as file:
            try:
                reader = ShardReader(file, shard)
                found = [
                    reader.payload("first", first, BITS, 5000).all().tobytes(),
                    reader.payload("second", second, BITS, 50).all().tobytes(),
                ]
            except FormatError as error:
                rule = error.rule
    unchanged = [bits.pack(units, 1).tobytes(), bits.pack(units[:50], 1).tobytes()]
    assert found == unchanged or rule in {"ST-1", "ST-2", "ST-5", "IDX-1", "IDX-3"}
