"""Stored chunks: every rule of a frame, and that no frame makes the reader allocate more than is due."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard

from tallstore.errors import FormatError
from tallstore.format.codecs import MAX_WINDOW, decode, encode

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
RAW_BLOCK, REPEATED_BLOCK, COMPRESSED_BLOCK, RESERVED_BLOCK = range(4)
WHERE = "tasks/a/mask-00001-of-00001.safetensors, 'bits/w', chunk 0"
CONTENT = bytes(range(200)) * 5  # 1000 bytes


def block(kind, size, content, *, last=True):
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + content


def frame(declared, *blocks):
    """A zstd frame of one segment that declares *declared* bytes, in eight bytes; by hand, so that it may lie."""
    return MAGIC + b"\xe0" + declared.to_bytes(8, "little") + b"".join(blocks)


def compress(content, **parameters):
    return zstandard.ZstdCompressor(level=1, **parameters).compress(content)


def read(stored, nbytes=1000, codec="zstd", itemsize=1):
    return decode(codec, np.frombuffer(stored, np.uint8), nbytes, itemsize, WHERE).tobytes()


def refused(stored, nbytes=1000, **options):
    """The rule under which *stored* is refused; the message names the place."""
    with pytest.raises(FormatError) as caught:
        read(stored, nbytes, **options)
    assert caught.value.where == WHERE
    assert "\n" not in str(caught.value)
    return caught.value.rule


@pytest.mark.parametrize("codec", ["raw", "zstd", "planes-zstd"])
def test_round_trip(codec):
    chunk = np.frombuffer(CONTENT, np.uint8)
    assert read(encode(codec, chunk, 4), codec=codec, itemsize=4) == CONTENT


def test_zstd_stores_one_frame_that_declares_its_size():
    stored = encode("zstd", np.frombuffer(CONTENT, np.uint8), 1)
    parameters = zstandard.get_frame_parameters(stored)
    assert parameters.content_size == len(CONTENT)
    assert not parameters.has_checksum
    assert zstandard.ZstdDecompressor().decompress(stored) == CONTENT


def test_planes_put_byte_j_of_every_element_into_plane_j():
    chunk = np.array([0x04030201, 0x14131211, 0x24232221], "<u4").view(np.uint8)
    planes = bytes.fromhex("011121 021222 031323 041424")
    assert zstandard.ZstdDecompressor().decompress(encode("planes-zstd", chunk, 4)) == planes
    assert read(compress(planes), 12, "planes-zstd", 4) == chunk.tobytes()


def test_raw_chunks_have_exactly_the_length_that_is_due():
    assert read(CONTENT, codec="raw") == CONTENT
    assert refused(CONTENT + b"\0", codec="raw") == "COD-5"
    assert refused(CONTENT[:-1], codec="raw") == "COD-5"
    assert refused(b"", codec="raw") == "COD-5"


def test_frames_written_by_hand_are_read():
    assert read(frame(5, block(RAW_BLOCK, 5, b"hello")), 5) == b"hello"
    assert read(frame(9, block(RAW_BLOCK, 5, b"hello", last=False), block(REPEATED_BLOCK, 4, b"!")), 9) == b"hello!!!!"


def test_a_checksum_is_read_and_checked():
    stored = bytearray(compress(CONTENT, write_checksum=True))
    assert read(bytes(stored)) == CONTENT
    stored[-1] ^= 1
    assert refused(bytes(stored)) == "COD-3"


@pytest.mark.parametrize("nbytes", [len(CONTENT) - 1, len(CONTENT) + 1, 1 << 40])
def test_a_declared_size_that_is_not_the_expected_one_is_refused(nbytes):
    assert refused(compress(CONTENT), nbytes) == "COD-1"


def test_a_frame_without_content_size_is_refused():
    assert refused(compress(CONTENT, write_content_size=False)) == "COD-1"


def test_a_frame_that_holds_more_than_it_declares_is_refused():
    """The bomb: 1000 bytes declared, as expected; a gigabyte in repeated blocks."""
    bomb = frame(1000, *[block(REPEATED_BLOCK, 1 << 17, b"\0", last=False)] * 8192)
    read(frame(1000, block(REPEATED_BLOCK, 1000, b"\0")), 1000)  # whatever is imported or cached on first use
    tracemalloc.start()
    try:
        assert refused(bomb, 1000) == "COD-3"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_that_declares_much_is_refused_before_anything_is_allocated():
    tracemalloc.start()
    try:
        assert refused(frame(1 << 40, block(REPEATED_BLOCK, 1, b"\0"))) == "COD-1"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_that_holds_less_than_it_declares_is_refused():
    assert refused(frame(1000, block(REPEATED_BLOCK, 999, b"\0")), 1000) == "COD-3"


def test_bytes_after_the_frame_are_refused():
    stored = compress(CONTENT)
    assert refused(stored + b"\0") == "COD-2"
    assert refused(stored + stored) == "COD-2"
    assert refused(stored + SKIPPABLE) == "COD-2"


def test_a_skippable_frame_is_refused():
    assert refused(SKIPPABLE) == "COD-2"
    assert refused(SKIPPABLE + compress(CONTENT)) == "COD-2"


def test_a_dictionary_is_refused():
    dictionary = zstandard.ZstdCompressionDict(CONTENT, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    named = MAGIC + b"\xe3" + (7).to_bytes(4, "little") + (5).to_bytes(8, "little") + block(RAW_BLOCK, 5, b"hello")
    assert refused(named, 5) == "COD-2"
    unnamed = compress(CONTENT, dict_data=dictionary)
    assert len(unnamed) < 50  # it is the dictionary that holds the content
    assert refused(unnamed) == "COD-3"


def test_a_window_over_eight_mebibytes_is_refused():
    def windowed(window_log):
        return (
            MAGIC + b"\xc0" + bytes([window_log - 10 << 3]) + (5).to_bytes(8, "little") + block(RAW_BLOCK, 5, b"hello")
        )

    assert MAX_WINDOW == 1 << 23
    assert read(windowed(23), 5) == b"hello"
    assert refused(windowed(24), 5) == "COD-2"
    assert refused(windowed(31), 5) == "COD-2"


@pytest.mark.parametrize("kept", range(len(compress(CONTENT))))
def test_a_truncated_frame_is_refused(kept):
    assert refused(compress(CONTENT)[:kept]) == "COD-3"


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\x28\xb5",
        b"not zstd at all",
        MAGIC + b"\xe8" + (5).to_bytes(8, "little") + block(RAW_BLOCK, 5, b"hello"),  # a reserved bit of the header
        frame(5, block(RESERVED_BLOCK, 5, b"hello")),
        frame(5, block(COMPRESSED_BLOCK, 5, b"hello")),
        frame(5, block(RAW_BLOCK, 5, b"hello", last=False)),
    ],
    ids=["empty", "half-magic", "text", "reserved-bit", "reserved-block", "nonsense-block", "no-last-block"],
)
def test_a_damaged_frame_is_refused(stored):
    assert refused(stored, 5) == "COD-3"


def test_decoding_raw_costs_no_copy():
    stored = np.frombuffer(CONTENT, np.uint8)
    assert np.shares_memory(decode("raw", stored, stored.size, 1, WHERE), stored)
