"""Codecs on any chunk, and on any damage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallstore.errors import FormatError
from tallstore.format.codecs import decode, encode

CODECS = ["raw", "zstd", "planes-zstd"]


@pytest.mark.parametrize("codec", CODECS)
@given(content=st.binary(min_size=1, max_size=500), itemsize=st.sampled_from([1, 2, 4, 8]))
def test_decoding_what_was_encoded_returns_the_same_bytes(codec, content, itemsize):
    chunk = np.frombuffer(content * itemsize, np.uint8)
    stored = np.frombuffer(encode(codec, chunk, itemsize), np.uint8)
    assert decode(codec, stored, chunk.size, itemsize, "here").tobytes() == chunk.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@given(content=st.binary(max_size=300), nbytes=st.integers(1, 100))
def test_any_bytes_decode_to_the_due_length_or_are_refused(codec, content, nbytes):
    check_never_anything_else(codec, content, nbytes)


@given(
    content=st.binary(min_size=1, max_size=200),
    position=st.integers(0, 10**6),
    value=st.integers(0, 255),
    cut=st.integers(0, 3),
)
def test_a_damaged_frame_decodes_to_the_due_length_or_is_refused(content, position, value, cut):
    damaged = bytearray(encode("zstd", np.frombuffer(content, np.uint8), 1))
    damaged[position % len(damaged)] = value
    check_never_anything_else("zstd", bytes(damaged[: len(damaged) - cut]), len(content))


def check_never_anything_else(codec, stored, nbytes):
    itemsize = 2 if codec == "planes-zstd" else 1
    rule, size = None, None
    try:
        size = decode(codec, np.frombuffer(stored, np.uint8), nbytes * itemsize, itemsize, "here").size
    except FormatError as error:
        rule = error.rule
    assert size == nbytes * itemsize or rule in {"COD-1", "COD-2", "COD-3", "COD-5"}
