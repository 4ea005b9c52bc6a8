"""What decoded bytes mean, and which bytes are no valid encoding of anything."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tallstore.errors import FormatError
from tallstore.format.dtypes import CODED, DTYPES
from tallstore.format.encodings import (
    BITS,
    GAINS,
    LOG4_VALUES,
    POOL,
    SHARED,
    SIGN_VALUES,
    SIGNED,
    SIGNED_VALUES,
    STEPS,
    UNIFORM,
    UNIFORM_VALUES,
    WHOLE,
)

SMALLEST = 2.0**-60


def floats(*values):
    return np.array(values, "<f4").view(np.uint8)


def as_bytes(*numbers):
    return np.array(numbers, np.uint8)


def rule_broken(encoding, chunk, numel):
    """The rule that *chunk* breaks, or None; the error must name the place."""
    problem = None
    try:
        encoding.check(chunk, numel, "'bits/w', chunk 0")
    except FormatError as error:
        problem = error
    assert problem is None or problem.where == "'bits/w', chunk 0"
    return problem and problem.rule


def test_log4_values_fall_by_the_square_root_of_two():
    assert len(LOG4_VALUES) == 16
    assert LOG4_VALUES[:4] == (1.0, 181 / 256, 0.5, 181 / 512)
    for code, value in enumerate(LOG4_VALUES):
        assert value == pytest.approx(2.0 ** (-code / 2), rel=1e-3)


def test_log4_values_have_eight_significant_bits():
    """So that their product with a scale of thirteen, 21 bits, is exact in float32."""
    for value in LOG4_VALUES:
        mantissa, _ = math.frexp(value)
        assert (mantissa * 256).is_integer()
        assert float(np.float32(value)) == value


def test_signed_values_are_absent_plus_minus():
    assert SIGNED_VALUES[:3] == (0, 1, -1)


def test_sign_and_uniform_values_are_equally_far_apart_around_0():
    assert SIGN_VALUES == (-1.0, 1.0)
    assert UNIFORM_VALUES[3][:3] == (-1.0, 0.0, 1.0)
    for levels in (4, 8, 16):
        assert UNIFORM_VALUES[levels][:levels] == tuple(code - (levels - 1) / 2 for code in range(levels))
    for levels, values in UNIFORM_VALUES.items():
        assert len(values) == 1 << UNIFORM[levels].width


@pytest.mark.parametrize(
    ("encoding", "numel", "nbytes"),
    [
        (BITS, 13, 2),
        (SIGNED, 13, 4),
        (SHARED["LOG4"], 13, 7),
        (SHARED["I8"], 13, 13),
        (SHARED["BF16"], 13, 26),
        (GAINS, 13, 52),
        (WHOLE["C64"], 13, 104),
        (POOL, 13, 13),
        (BITS, 0, 0),
    ],
)
def test_decoded_size(encoding, numel, nbytes):
    assert encoding.nbytes(numel) == nbytes


def test_every_dtype_can_be_stored_whole():
    assert WHOLE.keys() == DTYPES.keys()
    for name, encoding in WHOLE.items():
        assert encoding.itemsize == DTYPES[name]
        assert encoding.width == 8 * DTYPES[name]
        assert encoding.is_float == (name in CODED)


@pytest.mark.parametrize("encoding", [BITS, SIGNED, SHARED["LOG4"], UNIFORM[3], UNIFORM[4], UNIFORM[16]])
def test_set_padding_bits_are_refused(encoding):
    last_byte = as_bytes(0x80)
    assert rule_broken(encoding, last_byte, 8 // encoding.width) is None
    assert rule_broken(encoding, last_byte, 8 // encoding.width - 1) == "BIT-1"


def test_code_three_of_signed_fields_is_refused():
    assert rule_broken(SIGNED, as_bytes(0b10_01_00_10), 4) is None
    assert rule_broken(SIGNED, as_bytes(0b10_11_00_10), 4) == "FIELD-1"


@pytest.mark.parametrize(("levels", "refused"), [(3, {3}), (4, set()), (8, {*range(8, 16)}), (16, set())])
def test_codes_of_no_level_are_refused(levels, refused):
    encoding = UNIFORM[levels]
    for code in range(1 << encoding.width):
        for field in range(8 // encoding.width):
            chunk = np.zeros(50, np.uint8)
            chunk[31] = code << encoding.width * field
            numel = 50 * 8 // encoding.width
            assert rule_broken(encoding, chunk, numel) == ("FIELD-1" if code in refused else None)


def test_padding_of_eight_levels_is_padding():
    assert rule_broken(UNIFORM[8], as_bytes(0x77), 2) is None
    assert rule_broken(UNIFORM[8], as_bytes(0x10), 1) == "BIT-1"


def test_minus_128_is_refused():
    assert rule_broken(SHARED["I8"], np.arange(-127, 128).astype(np.int8).view(np.uint8), 255) is None
    assert rule_broken(SHARED["I8"], as_bytes(0, 0x80), 2) == "INT8-1"


def test_bools_are_zero_or_one():
    assert rule_broken(WHOLE["BOOL"], as_bytes(0, 1), 2) is None
    assert rule_broken(WHOLE["BOOL"], as_bytes(0, 2), 2) == "BOOL-1"
    assert rule_broken(WHOLE["U8"], as_bytes(0, 2), 2) is None


@pytest.mark.parametrize("encoding", [GAINS, STEPS])
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0.0, None),
        (1.5, None),
        (1 + 2**-12, None),
        (1 + 2**-13, "NUM-1"),
        (-0.0, "NUM-1"),
        (SMALLEST / 2, "NUM-1"),
        (2.0**61, "NUM-1"),
        (np.inf, "NUM-1"),
        (np.nan, "NUM-1"),
    ],
)
def test_gains_and_steps_are_r13_numbers(encoding, value, rule):
    assert rule_broken(encoding, floats(1, value, 1), 3) == rule


def test_gains_may_be_negative_and_steps_may_not():
    assert rule_broken(GAINS, floats(-1.5), 1) is None
    assert rule_broken(STEPS, floats(-1.5), 1) == "NUM-4"


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0.0, None),
        (0.1, None),
        (-1e30, None),
        (SMALLEST, None),
        (-SMALLEST, None),
        (SMALLEST / 2, "NUM-2"),
        (-0.0, "NUM-2"),
        (np.inf, "NUM-2"),
        (-np.inf, "NUM-2"),
        (np.nan, "NUM-2"),
    ],
)
def test_shared_floats_are_finite_and_not_tiny(value, rule):
    assert rule_broken(SHARED["F32"], floats(1, value), 2) == rule
    upper_half = floats(value).reshape(-1, 4)[:, 2:].reshape(-1)  # bfloat16, truncated
    assert rule_broken(SHARED["BF16"], upper_half, 1) == rule


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [(0x0000, None), (0x0001, None), (0x7BFF, None), (0x8000, "NUM-2"), (0x7C00, "NUM-2"), (0x7C01, "NUM-2")],
)
def test_shared_float16(pattern, rule):
    assert rule_broken(SHARED["F16"], np.array([pattern], "<u2").view(np.uint8), 1) == rule


def test_whole_floats_may_be_anything():
    assert rule_broken(WHOLE["F32"], floats(np.nan, -np.inf, -0.0, 1e-45), 4) is None
