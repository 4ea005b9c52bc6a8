"""Slices of row-major tensors, as numpy has them."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tallstore.loading.boxes import Box


@st.composite
def boxes(draw):
    """0 to 4 dimensions, empty ones and whole ones among them."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    offsets = [draw(st.integers(0, size)) for size in shape]
    lengths = [draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    return Box(tuple(shape), tuple(offsets), tuple(lengths))


def elements_of(box):
    """The flat elements that a box is made of, in its shape."""
    flat = np.arange(math.prod(box.shape)).reshape(box.shape)
    return flat[tuple(slice(start, start + n) for start, n in zip(box.offsets, box.lengths, strict=True))]


@given(boxes())
def test_where_a_box_begins_and_ends(box):
    elements = elements_of(box)
    assert box.numel == elements.size
    assert box.is_whole == (box.lengths == box.shape)
    if elements.size:
        assert (box.start, box.stop) == (elements.min(), elements.max() + 1)
        assert box.is_run == (box.stop - box.start == elements.size)
    else:
        assert box.start == box.stop


@given(boxes(), st.data())
def test_the_parts_in_a_range_are_what_of_the_box_lies_there(box, data):
    """In their order, each once, each a strided view of the flat tensor; and they are few."""
    numel = math.prod(box.shape)
    first = data.draw(st.integers(0, numel))
    last = data.draw(st.integers(first, numel))
    elements = elements_of(box)
    found, filled = [], np.full(box.lengths, -1)
    parts = list(box.parts(first, last))
    for part in parts:
        behind = np.arange(part.start, numel)
        view = np.lib.stride_tricks.as_strided(behind, part.lengths, [8 * stride for stride in box.strides])
        assert view.max() + 1 == box.end(part)
        assert (filled[part.slices] == -1).all()
        filled[part.slices] = view
        found += view.reshape(-1).tolist()
    assert found == [element for element in elements.reshape(-1).tolist() if first <= element < last]
    assert np.array_equal(filled, np.where((elements >= first) & (elements < last), elements, -1))
    assert len(parts) <= max(1, 2 * len(box.shape))
