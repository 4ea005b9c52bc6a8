"""looking_up: any range of packed codes, and what each code stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tallstore.format import bits
from tallstore.loading.looking_up import LookUp
from tallstore.loading.scratch import scratch

CASES = [(1, torch.int8), (2, torch.int8), (4, torch.int8), (4, torch.float32)]


def values_of(width: int) -> tuple[float, ...]:
    return tuple(range(-3, (1 << width) - 3))


@pytest.mark.parametrize(("width", "dtype"), CASES, ids=str)
def test_every_field_of_every_byte(width, dtype):
    values, packed = values_of(width), np.arange(256, dtype=np.uint8)
    naive = [values[byte >> (field * width) & ((1 << width) - 1)] for byte in range(256) for field in range(8 // width)]
    found = LookUp(width, values, dtype)(packed, 0, len(naive))
    assert found.dtype == dtype
    assert found.tolist() == naive


@pytest.mark.parametrize(("width", "dtype"), CASES, ids=str)
def test_every_pair_of_bytes(width, dtype):
    """So many that tables of pairs are used; not so where an odd byte is behind them."""
    look_up = LookUp(width, values_of(width), dtype)
    packed = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    for raw in (packed, np.concatenate([packed, np.array([0x5A], np.uint8)])):
        numel = raw.size * 8 // width
        expected = np.array(values_of(width))[bits.unpack(raw, numel, width)]
        np.testing.assert_array_equal(look_up(raw, 0, numel).numpy(), expected)


@pytest.mark.parametrize(("width", "dtype"), CASES, ids=str)
@given(data=st.data())
def test_a_range_is_unpacking_and_then_indexing(width, dtype, data):
    """Ranges begin and end anywhere, inside a byte too; what follows the range is not looked at."""
    codes = np.array(data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=70)), np.uint8)
    first = data.draw(st.integers(0, codes.size))
    last = data.draw(st.integers(first, codes.size))
    values = tuple(data.draw(st.permutations(values_of(width))))
    packed = bits.pack(codes, width)
    packed.flags.writeable = False
    found = LookUp(width, values, dtype)(packed, first, last)
    np.testing.assert_array_equal(found.numpy(), np.array(values)[codes[first:last]])


def test_scratch_memory_is_the_threads_own_and_stays():
    kept = scratch.tensor("a test", 10, torch.float32)
    assert scratch.tensor("a test", 4, torch.float32).data_ptr() == kept.data_ptr()
    assert scratch.tensor("a test", 11, torch.float32).numel() == 11


def test_what_was_begun_in_inference_mode_goes_on_outside_of_it():
    packed, look_up = np.arange(256, dtype=np.uint8), LookUp(4, values_of(4), torch.float32)
    for count in (512, 100):
        with torch.inference_mode():
            inside = look_up(packed, 0, count).tolist()
            scratch.tensor("made there", count, torch.float32)
        assert look_up(packed, 0, count).mul_(1).tolist() == inside
        scratch.tensor("made there", count, torch.float32).add_(1)
