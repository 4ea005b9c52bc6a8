"""r13 numbers: where rounding goes, what is in range, and what a reader refuses."""

from __future__ import annotations

import numpy as np
import pytest

from tallstore.format.r13 import LARGEST, SMALLEST, in_range, is_r13, r13, row_scales

ULP = 2.0**-12  # between 1 and 2, thirteen significant bits are this far apart


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (-0.375, -0.375),
        (1 + ULP, 1 + ULP),
        (1 + 0.49 * ULP, 1.0),
        (1 + 0.51 * ULP, 1 + ULP),
        (1 + 0.5 * ULP, 1.0),  # a tie, to even
        (1 + 1.5 * ULP, 1 + 2 * ULP),  # a tie, to even
        (-1 - 1.5 * ULP, -1 - 2 * ULP),
        (2 - 0.5 * ULP, 2.0),  # a tie that carries into the exponent
        (np.nextafter(1 + 0.5 * ULP, 2), 1 + ULP),  # float64 decides, not float32
    ],
)
def test_rounds_to_nearest_even_at_thirteen_bits(value, rounded):
    assert r13(value) == np.float32(rounded)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (SMALLEST, SMALLEST),
        (np.nextafter(SMALLEST, 0), SMALLEST),  # rounds up to the smallest before the range is looked at
        (SMALLEST * (1 - ULP), 0.0),
        (-SMALLEST * (1 - ULP), 0.0),
        (5e-324, 0.0),
        (0.0, 0.0),
        (-0.0, 0.0),
        (LARGEST, LARGEST),
        (LARGEST * (1 + ULP), LARGEST * (1 + ULP)),  # not the writer's to clip: `in_range` tells
    ],
)
def test_what_is_too_small_becomes_plus_zero(value, rounded):
    result = r13(value)
    assert result == np.float32(rounded)
    assert not (result == 0 and np.signbit(result))


def test_what_no_float32_holds_becomes_infinity():
    assert np.isinf(r13([1e300, -1e300])).all()


def test_keeps_the_shape():
    assert r13(3.0).shape == ()
    assert r13(np.zeros((2, 0, 3))).shape == (2, 0, 3)
    assert r13(np.arange(12.0).reshape(3, 4)[:, ::2]).tolist() == [[0, 2], [4, 6], [8, 10]]
    assert r13([0.1]).dtype == np.float32


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (0.0, True),
        (-0.0, False),
        (1.5, True),
        (-1.5, True),
        (1 + ULP, True),
        (1 + ULP / 2, False),
        (SMALLEST, True),
        (SMALLEST / 2, False),
        (LARGEST, True),
        (LARGEST * 2, False),
        (np.inf, False),
        (-np.inf, False),
        (np.nan, False),
    ],
)
def test_is_r13(value, valid):
    assert is_r13(np.array([value], np.float32)).tolist() == [valid]


@pytest.mark.parametrize(
    ("value", "inside"),
    [(0.0, True), (-0.0, True), (SMALLEST, True), (-LARGEST, True), (SMALLEST / 2, False), (LARGEST * 2, False)],
)
def test_in_range(value, inside):
    assert in_range(np.array([value, np.nan, np.inf], np.float32)).tolist() == [inside, False, False]


def test_row_scales_are_the_gains_where_there_is_no_step():
    gains = r13([0.5, -3.0])
    assert row_scales(gains, None) is gains


def test_row_scales_round_the_product_of_gain_and_step():
    gain, steps = r13([1 + ULP]), r13([1 + ULP, 2**-40, 0.0])
    scales = row_scales(gain, steps)
    assert scales.tolist() == [1 + 2 * ULP, 2**-40 * (1 + ULP), 0.0]
    assert is_r13(scales).all()


def test_row_scales_that_are_too_small_become_zero_and_too_large_leave_the_range():
    scales = row_scales(r13([2.0**-40, -(2.0**40)]), r13([2.0**-40, 2.0**40]))
    assert scales[0] == 0
    assert not np.signbit(scales[0])
    assert in_range(scales).tolist() == [True, False]
