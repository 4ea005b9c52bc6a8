"""How shared vectors are stored: codes, steps, and what both stand for, against the definitions in so many words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tallstore.format.encodings import LOG4_VALUES, SHARED
from tallstore.format.r13 import is_r13
from tallstore.format.tables import STEPPED
from tallstore.packing.quantise import quantise, steps, values
from tests import fit_reference, reference
from tests.reference import same_bits

RANDOM = torch.Generator().manual_seed(0)


def spread(*shape):
    """Magnitudes over twelve octaves, of both signs."""
    signs = torch.randint(0, 2, shape, generator=RANDOM) * 2.0 - 1
    return signs * torch.exp2(torch.rand(shape, generator=RANDOM) * 12 - 10)


def row_steps(merged, dtype):
    return torch.from_numpy(steps(merged.abs().amax(1), dtype))[:, None]


def stored(merged, dtype):
    """Codes and what they stand for at gain one, of float32 [rows, length]."""
    step = row_steps(merged, dtype) if dtype in STEPPED else None
    codes = quantise(merged, step, dtype)
    return codes, values(codes, dtype) if step is None else values(codes, dtype) * step


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["LOG4", "I8", "F16", "BF16", "F32"])
def test_codes_and_values_are_those_of_the_reference(dtype):
    merged = spread(37, 513)
    if dtype == "LOG4":
        merged = merged.abs()
    merged[3], merged[5, :100] = 0.0, 0.0
    codes, kept = stored(merged, dtype)
    expected = fit_reference.store(merged, dtype)
    assert same_bits(codes, expected.codes)
    assert same_bits(kept, expected.values)


@pytest.mark.parametrize("dtype", ["LOG4", "I8"])
def test_steps_are_r13_of_the_rows_largest_magnitude(dtype):
    merged = spread(50, 100)
    step = row_steps(merged, dtype)[:, 0]
    largest = merged.abs().amax(1).double() / (1 if dtype == "LOG4" else 127)
    assert step.tolist() == [reference.r13(value) for value in largest.tolist()]
    assert is_r13(step.numpy()).all()


@pytest.mark.parametrize("dtype", ["LOG4", "I8", "F16", "BF16", "F32"])
def test_what_is_stored_is_a_valid_encoding(dtype):
    """-0.0, what underflows, what is under 2^-60, and the largest values that fit."""
    merged = torch.tensor([[-0.0, 0.0, -(2.0**-61), 2.0**-59, -1e-30, -1e-10, 3e-8, 60000.0, -3.0]])
    if dtype == "LOG4":
        merged = merged.abs()
    codes, kept = stored(merged, dtype)
    if dtype == "LOG4":
        assert int(codes.max()) < 16
    else:
        SHARED[dtype].check(codes.view(-1).view(torch.uint8).numpy(), codes.numel(), "merged")
    assert not torch.signbit(kept[kept == 0]).any()


def test_a_float16_that_underflows_is_plus_zero():
    codes, _ = stored(torch.tensor([[-1e-9, 1.0]]), "F16")
    assert codes.tolist() == [[0.0, 1.0]]
    assert not torch.signbit(codes).any()


# --- LOG4 -------------------------------------------------------------------------------------------------------------


def test_log4_takes_the_nearest_value_and_the_larger_on_a_tie():
    """Every midpoint, and the float32 on either side of it."""
    ascending = np.array(LOG4_VALUES[::-1], np.float32)
    middle = (ascending[1:] + ascending[:-1]) / 2
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(2))
    ratios = torch.from_numpy(np.stack([below, middle, above]))
    codes = quantise(ratios, torch.ones(3, 1), "LOG4").numpy()
    lower = np.arange(15, 0, -1)  # the code of the smaller neighbour of each midpoint
    assert codes.tolist() == [lower.tolist(), (lower - 1).tolist(), (lower - 1).tolist()]


def test_log4_keeps_its_own_values():
    exact = torch.tensor([LOG4_VALUES], dtype=torch.float32)
    assert quantise(exact, torch.ones(1, 1), "LOG4").tolist() == [list(range(16))]
    assert values(torch.arange(16, dtype=torch.uint8), "LOG4").tolist() == list(LOG4_VALUES)


def test_log4_takes_the_smallest_value_for_what_is_smaller_and_the_largest_for_what_is_larger():
    ratios = torch.tensor([[0.0, 2.0**-149, 0.001, 1.0001, 1.9]])
    assert quantise(ratios, torch.ones(1, 1), "LOG4").tolist() == [[15, 15, 15, 0, 0]]


def test_log4_agrees_with_a_search_over_a_whole_octave():
    ratios = torch.from_numpy((np.arange(0x3E800000, 0x3F800001, 97, dtype=np.uint32)).view(np.float32))[None]
    assert same_bits(quantise(ratios, torch.ones(1, 1), "LOG4"), fit_reference.nearest_log4(ratios))


# --- I8 ---------------------------------------------------------------------------------------------------------------


def test_int8_rounds_half_to_even_and_never_reaches_minus_128():
    numbers = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.4, 127.0, -200.0, 200.0]])
    codes = quantise(numbers, torch.ones(1, 1), "I8")
    assert codes.tolist() == [[0, 2, 2, 0, -2, 126, -127, 127, -127, 127]]


def test_the_largest_of_a_row_is_127_steps_whichever_way_the_step_was_rounded():
    merged = spread(200, 9)
    codes, _ = stored(merged, "I8")
    assert codes.abs().amax(1).tolist() == [127] * 200


# --- rows without a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["LOG4", "I8"])
def test_a_row_too_small_for_a_step_stands_for_zero(dtype):
    merged = torch.full((2, 5), 2.0**-62)
    merged[1] = 1.0
    step = row_steps(merged, dtype)
    assert step[0].item() == 0.0
    _, kept = stored(merged, dtype)
    assert kept[0].tolist() == [0.0] * 5
    assert kept[1].tolist() == pytest.approx([1.0] * 5, rel=1e-4)


def test_a_piece_of_a_row_has_the_codes_that_the_whole_row_has():
    merged = spread(1, 3000).abs()
    step = row_steps(merged, "LOG4")
    whole = quantise(merged, step, "LOG4")
    pieces = [quantise(merged[:, start : start + 700], step, "LOG4") for start in range(0, 3000, 700)]
    assert same_bits(torch.cat(pieces, 1), whole)
