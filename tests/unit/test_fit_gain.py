"""Gains: what each of the three means, with a centre and without one, and where there is none."""

from __future__ import annotations

import math

import pytest

from tallstore.fit import Projections, solve
from tests.fit_reference import gain_of
from tests.packing_cases import normal

TAU, SIDES, FIXED = (
    normal(1000).double(),
    normal(1000, seed=1).double() + 0.5 * normal(1000).double(),
    normal(1000, seed=2),
)


def dot(one, other):
    return (one.double() * other.double()).sum().item()


def projections(sides, fixed=None):
    if fixed is None:
        return Projections(dot(sides, TAU), dot(sides, sides))
    return Projections(dot(sides, TAU), dot(sides, sides), dot(fixed, TAU), dot(fixed, sides))


@pytest.mark.parametrize("fixed", [None, 0.1 * FIXED], ids=["alone", "centred"])
@pytest.mark.parametrize("gain", ["one", "least-squares", "published"])
def test_each_is_the_formulas(gain, fixed):
    found = solve(gain, dot(TAU, TAU), projections(SIDES, fixed))
    assert found == pytest.approx(gain_of(gain, TAU, SIDES, fixed), rel=1e-12)


@pytest.mark.parametrize("fixed", [0 * FIXED, 0.1 * FIXED], ids=["alone", "centred"])
def test_one_goes_the_whole_way_along_the_task_vector(fixed):
    gain = solve("one", dot(TAU, TAU), projections(SIDES, fixed))
    assert dot(fixed + gain * SIDES, TAU) == pytest.approx(dot(TAU, TAU), rel=1e-12)


@pytest.mark.parametrize("fixed", [0 * FIXED, 0.1 * FIXED], ids=["alone", "centred"])
def test_no_gain_leaves_less_than_least_squares(fixed):
    gain = solve("least-squares", dot(TAU, TAU), projections(SIDES, fixed))

    def error(gain):
        return (TAU - fixed - gain * SIDES).square().sum().item()

    assert error(gain) < min(error(gain * 1.001), error(gain * 0.999))


@pytest.mark.parametrize("gain", ["one", "least-squares", "published"])
@pytest.mark.parametrize("sides", [0 * SIDES, -TAU], ids=["nothing", "backwards"])
def test_what_has_no_part_along_the_task_vector_has_no_gain(gain, sides):
    assert math.isnan(solve(gain, dot(TAU, TAU), projections(sides)))


def test_projections_of_parts_are_those_of_the_whole():
    parts = [
        Projections(dot(sides, tau), dot(sides, sides), dot(fixed, tau), dot(fixed, sides))
        for sides, tau, fixed in zip(SIDES.split(300), TAU.split(300), FIXED.split(300), strict=True)
    ]
    whole, total = projections(SIDES, FIXED), sum(parts, Projections())
    for name in ("along", "energy", "fixed_along", "fixed_energy"):
        assert getattr(total, name) == pytest.approx(getattr(whole, name), rel=1e-9)


def test_projections_under_a_scale_are_those_of_the_scaled():
    scaled, direct = projections(SIDES, FIXED).times(3.5), projections(3.5 * SIDES, FIXED)
    for name in ("along", "energy", "fixed_along", "fixed_energy"):
        assert getattr(scaled, name) == pytest.approx(getattr(direct, name), rel=1e-12)
