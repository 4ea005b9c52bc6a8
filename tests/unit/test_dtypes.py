"""Data types, specs and chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallstore.format.dtypes import (
    CHUNK_NUMEL,
    CODED,
    DTYPES,
    TensorSpec,
    chunk_count,
    chunk_span,
    itemsize,
)


def test_names_and_sizes_are_those_of_the_format():
    assert {name: itemsize(name) for name in DTYPES} == {
        **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"], 1),
        **dict.fromkeys(["I16", "U16", "F16", "BF16"], 2),
        **dict.fromkeys(["I32", "U32", "F32"], 4),
        **dict.fromkeys(["F64", "I64", "U64", "C64"], 8),
    }
    assert DTYPES.keys() > CODED


@pytest.mark.parametrize(("shape", "numel", "nbytes"), [((), 1, 2), ((0,), 0, 0), ((3, 0, 2), 0, 0), ((7, 5), 35, 70)])
def test_sizes_follow_from_a_spec(shape, numel, nbytes):
    spec = TensorSpec("BF16", shape)
    assert (spec.numel, spec.nbytes) == (numel, nbytes)


@given(st.integers(0, 5 * CHUNK_NUMEL))
def test_chunks_cover_a_tensor(numel):
    """Chunks follow one another without gaps, each full but the last, and there is none without elements."""
    spans = [chunk_span(numel, index) for index in range(chunk_count(numel))]
    edges = [0, *(stop for _, stop in spans)]
    assert [start for start, _ in spans] == edges[:-1]
    assert edges[-1] == numel
    assert all(stop - start == CHUNK_NUMEL for start, stop in spans[:-1])
    assert all(start < stop for start, stop in spans)


@pytest.mark.parametrize("index", [-1, 1])
def test_a_chunk_beyond_the_tensor_is_refused(index):
    with pytest.raises(IndexError, match="of a tensor of 5 elements"):
        chunk_span(5, index)
