"""Selecting and comparing without a branch an element: the same as torch.where and its comparisons."""

from __future__ import annotations

import math

import pytest
import torch

from tallstore.fit import exceeds, select
from tests.packing_cases import normal
from tests.reference import same_bits

SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38])


@pytest.mark.parametrize("numel", [0, 1, 7, 5003])
def test_what_exceeds_another_is_1(numel):
    values, limits = normal(numel), normal(numel, seed=1)
    assert same_bits(exceeds(values, limits), (values > limits).to(torch.uint8))
    assert same_bits(exceeds(values, 0.5), (values > 0.5).to(torch.uint8))


def test_nothing_exceeds_what_is_no_number():
    pairs = torch.cartesian_prod(SPECIAL, SPECIAL)
    first, second = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    assert same_bits(exceeds(first, second), (first > second).to(torch.uint8))


def test_limits_may_be_one_a_row():
    values, limits = normal(30, 7), normal(30, 1, seed=1)
    assert same_bits(exceeds(values, limits), (values > limits).to(torch.uint8))


@pytest.mark.parametrize("bit", [0, 1])
def test_a_value_is_taken_as_it_is_or_not_at_all(bit):
    """An infinity that is not taken is 0, and no NaN."""
    bits = torch.full((len(SPECIAL),), bit, dtype=torch.uint8)
    assert same_bits(select(bits, SPECIAL), SPECIAL if bit else torch.zeros(len(SPECIAL)))
