"""Packed fields: the order of their bits, and their padding."""

from __future__ import annotations

import numpy as np
import pytest

from tallstore.format import bits

WIDTHS = [1, 2, 4]


def as_bytes(*numbers):
    return np.array(numbers, np.uint8)


def test_thirteen_bits_fill_two_bytes_from_the_least_significant_bit():
    mask = as_bytes(1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1)
    assert bits.pack(mask, 1).tolist() == [0b0101_1001, 0b0001_1010]
    assert bits.unpack(as_bytes(0b0101_1001, 0b0001_1010), 13, 1).tolist() == mask.tolist()


def test_two_bit_fields_begin_in_the_low_bits():
    assert bits.pack(as_bytes(1, 2, 0, 3, 2), 2).tolist() == [0b11_00_10_01, 0b10]


def test_four_bit_fields_begin_in_the_low_nibble():
    assert bits.pack(as_bytes(0xA, 0xB, 0xC), 4).tolist() == [0xBA, 0x0C]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 4096, 4097])
def test_packed_nbytes_is_the_number_of_bytes(width, numel):
    codes = np.arange(numel, dtype=np.uint64).astype(np.uint8) % (1 << width)
    packed = bits.pack(codes.astype(np.uint8), width)
    assert packed.dtype == np.uint8
    assert packed.size == bits.packed_nbytes(numel, width) == -(-numel * width // 8)
    assert bits.unpack(packed, numel, width).tolist() == codes.tolist()


def test_packed_nbytes_is_exact_for_the_largest_tensors():
    assert bits.packed_nbytes(2**40 + 1, 1) == 2**37 + 1


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_takes_arrays_that_are_not_contiguous(width):
    codes = (np.arange(40, dtype=np.uint8) % (1 << width))[::3]
    assert bits.unpack(bits.pack(codes, width), codes.size, width).tolist() == codes.tolist()


def test_packing_leaves_its_input_alone():
    codes = as_bytes(3, 2, 1, 0)
    bits.pack(codes, 2)
    assert codes.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("packed", "numel", "width", "zero"),
    [
        ([], 0, 1, True),
        ([0xFF], 8, 1, True),
        ([0x7F], 7, 1, True),
        ([0x80], 7, 1, False),
        ([0x02], 1, 1, False),
        ([0x3F], 3, 2, True),
        ([0x40], 3, 2, False),
        ([0xFF, 0x0F], 3, 4, True),
        ([0xFF, 0x10], 3, 4, False),
    ],
)
def test_padding_is_zero(packed, numel, width, zero):
    assert bits.padding_is_zero(as_bytes(*packed), numel, width) is zero


@pytest.mark.parametrize("field", range(4))
@pytest.mark.parametrize("code", range(4))
@pytest.mark.parametrize("place", [57, 99])
def test_has_code_three_finds_it_in_every_field(field, code, place):
    packed = np.full(100, 0b01_10_01_10, np.uint8)
    packed[place] = packed[place] & ~np.uint8(3 << 2 * field) | np.uint8(code << 2 * field)
    assert bits.has_code_three(packed) is (code == 3)


@pytest.mark.parametrize("field", range(2))
@pytest.mark.parametrize("code", range(16))
def test_has_code_above_seven_finds_it_in_every_field(field, code):
    packed = np.full(100, 0x77, np.uint8)
    packed[57] = packed[57] & ~np.uint8(15 << 4 * field) | np.uint8(code << 4 * field)
    assert bits.has_code_above_seven(packed) is (code > 7)


def test_set_count_counts_every_bit_of_every_byte():
    assert bits.set_count(as_bytes()) == 0
    for byte in range(256):
        assert bits.set_count(as_bytes(byte, 0x81)) == byte.bit_count() + 2


def test_has_code_three_does_not_join_neighbouring_fields():
    assert not bits.has_code_three(as_bytes(0b01_10_01_10, 0b10_10_10_10, 0b01_01_01_01, 0))
