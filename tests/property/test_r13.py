"""r13 against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tallstore.format.r13 import LARGEST, SMALLEST, in_range, is_r13, is_r13_number, r13, row_scales

FINITE = st.floats(min_value=-(2.0**126), max_value=2.0**126)
EXPONENTS = st.integers(-70, 70)


@st.composite
def numbers_of_thirteen_bits(draw):
    significand = draw(st.integers(1 << 12, (1 << 13) - 1))
    return draw(st.sampled_from([-1, 1])) * math.ldexp(significand, draw(st.integers(-72, 47)))


def reference(value: Fraction) -> float:
    """*value* to 13 significant bits: Python rounds fractions to even, exactly."""
    if value == 0:
        return 0.0
    exponent = math.frexp(float(abs(value)))[1]
    ulp = Fraction(2) ** (exponent - 13)
    rounded = round(value / ulp) * ulp
    return float(rounded) if abs(rounded) >= Fraction(SMALLEST) else 0.0


@given(FINITE)
def test_rounds_as_exact_arithmetic_does(value):
    assert float(r13(value)) == reference(Fraction(value))


@given(st.integers(1 << 12, (1 << 13) - 1), EXPONENTS, st.sampled_from([-1, 1]))
def test_ties_go_to_the_even_neighbour(significand, exponent, sign):
    tie = sign * math.ldexp(2 * significand + 1, exponent - 14)
    rounded = float(r13(tie))
    assert rounded == reference(Fraction(tie))
    if rounded:
        assert math.ldexp(rounded, 13 - exponent) % 2 == 0


@given(numbers_of_thirteen_bits())
def test_keeps_every_r13_number_and_knows_it(value):
    stored = np.array([value], np.float32)
    inside = SMALLEST <= abs(value) <= LARGEST
    assert is_r13(stored).tolist() == [inside]
    assert in_range(stored).tolist() == [inside]
    if inside:
        assert float(r13(value)) == value


@given(st.one_of(st.floats(), st.floats(width=32), numbers_of_thirteen_bits()))
def test_one_number_is_judged_as_an_array_of_them_is(value):
    with np.errstate(over="ignore"):
        single = np.array([value], np.float32)
    assert is_r13_number(value) is (float(single[0]) == value and bool(is_r13(single)[0]))


@given(FINITE)
def test_every_result_in_range_is_an_r13_number(value):
    rounded = r13([value])
    assert is_r13(rounded).tolist() == in_range(rounded).tolist() == [abs(float(rounded[0])) <= LARGEST]


@given(st.lists(numbers_of_thirteen_bits(), min_size=1, max_size=4), numbers_of_thirteen_bits())
def test_row_scales_are_the_exact_product_rounded_once(steps, gain):
    scales = row_scales(r13([gain]), np.abs(r13(steps)))
    exact = [Fraction(float(r13(gain))) * Fraction(float(step)) for step in np.abs(r13(steps))]
    assert scales.tolist() == [reference(product) for product in exact]


@given(numbers_of_thirteen_bits(), st.integers(-(2**11) + 1, 2**11 - 1))
def test_a_product_with_eleven_bits_is_exact_in_float32(scale, value):
    """The reason for 13: every machine forms the same product, fused with the addition that follows or not."""
    scale = float(r13(scale))
    if abs(scale) <= LARGEST:
        assert float(np.float32(scale) * np.float32(value)) == scale * value
