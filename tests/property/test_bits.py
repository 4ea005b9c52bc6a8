"""Packed fields of any length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tallstore.format import bits

LENGTHS = st.integers(0, 70)


def codes_of(width):
    return hnp.arrays(np.uint8, LENGTHS, elements=st.integers(0, (1 << width) - 1))


@pytest.mark.parametrize("width", [1, 2, 4])
@given(data=st.data())
def test_unpacking_what_was_packed_returns_the_same_codes(width, data):
    codes = data.draw(codes_of(width))
    packed = bits.pack(codes, width)
    assert packed.size == bits.packed_nbytes(codes.size, width)
    assert bits.padding_is_zero(packed, codes.size, width)
    np.testing.assert_array_equal(bits.unpack(packed, codes.size, width), codes)


@pytest.mark.parametrize("width", [1, 2, 4])
@given(data=st.data())
def test_packed_fields_are_one_little_endian_number(width, data):
    """The definition, with Python's integers: element i is worth code * 2^(i * width)."""
    codes = data.draw(codes_of(width))
    number = sum(int(code) << (position * width) for position, code in enumerate(codes))
    assert int.from_bytes(bits.pack(codes, width).tobytes(), "little") == number


@pytest.mark.parametrize("width", [1, 2, 4])
@given(data=st.data())
def test_one_sequence_of_codes_has_one_encoding(width, data):
    """Bytes with clean padding come back as they are; bytes without are told apart."""
    numel = data.draw(LENGTHS)
    packed = data.draw(hnp.arrays(np.uint8, bits.packed_nbytes(numel, width)))
    again = bits.pack(bits.unpack(packed, numel, width), width)
    assert bits.padding_is_zero(packed, numel, width) == (again.tobytes() == packed.tobytes())


@given(codes_of(2))
def test_has_code_three_is_true_where_a_code_is_three(codes):
    assert bits.has_code_three(bits.pack(codes, 2)) == bool(np.any(codes == 3))
