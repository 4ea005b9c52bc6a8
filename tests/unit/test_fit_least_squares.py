"""LeastSquares on tiles: no other levels and masks leave less, as trying every one of them shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from tallstore import LeastSquares
from tallstore.fit import LeastSquaresFit, prepare
from tallstore.fit.least_squares import ascending, best_level, best_split
from tests import fit_reference
from tests.fit_cases import Inputs, rebuilt, task_vectors, tile
from tests.reference import same_bits

SIZES = [1.0, 0.5, 2.0, 0.1, 1.5, 0.7]
LEVELS = [1, 2]
SCALES = ["tensor", "row"]
ROWS = 50


def fit_of(levels, scale="row"):
    fit = prepare(LeastSquares(levels, scale), Inputs({}))
    assert isinstance(fit, LeastSquaresFit)
    return fit


def error(units, sides):
    return (units.double() - sides.double()).square().sum(0)


# --- the optimum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 6])
def test_the_fit_is_the_best_of_all(tasks, levels, scale):
    """Level and masks, and what they leave: of every parameter on its own."""
    vectors = task_vectors(*SIZES[:tasks], numel=4000)
    fit, whole = fit_of(levels, scale), tile(vectors, rows=ROWS)
    shared = fit.merge(whole)
    expected = fit_reference.least_squares([vector.view(ROWS, -1) for vector in vectors], levels, scale)
    for position, formula in enumerate(expected):
        found = rebuilt(fit, fit.code(whole, position, shared), shared, ROWS).view(ROWS, -1)
        assert formula.decided.float().mean() > 0.998
        torch.testing.assert_close(found[formula.decided], formula.sides[formula.decided], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 6])
def test_no_levels_on_a_grid_leave_less_not_even_where_values_are_equal(tasks, levels):
    """Not only subsets: any level at all, and each value at its nearest. Values in steps, so that many are equal."""
    units = torch.randint(-4, 5, (tasks, 400), generator=torch.Generator().manual_seed(tasks)) / 2.0
    ascending = units.sort(dim=0).values
    pair = (best_level(ascending), torch.zeros(400)) if levels == 1 else best_split(ascending)
    least = torch.minimum(*((units - level).square() for level in pair)).sum(0)
    grid = torch.linspace(-2.25, 2.25, 37)
    others = ((one, torch.tensor(0.0)) for one in grid) if levels == 1 else itertools.combinations(grid, 2)
    for upper, lower in others:
        tried = torch.minimum((units - upper).square(), (units - lower).square()).sum(0)
        assert (tried >= least - 1e-5).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_a_fit_is_a_fixed_point(levels):
    """The tasks that chose a level have its mean."""
    vectors = task_vectors(*SIZES)
    fit, whole = fit_of(levels, "tensor"), tile(vectors)
    shared = fit.merge(whole)
    codes = torch.stack([fit.code(whole, position, shared).codes for position in range(6)]).double()
    units = torch.stack([fit_reference.at_unit(vector).double() for vector in vectors])
    upper = (codes * units).sum(0) / codes.sum(0)
    torch.testing.assert_close(upper, shared["merged"].double(), rtol=1e-5, atol=1e-6)
    if levels == 2:
        lower = ((1 - codes) * units).sum(0) / (1 - codes).sum(0)
        torch.testing.assert_close(lower, shared["merged_lo"].double(), rtol=1e-5, atol=1e-6)


def test_two_levels_leave_less_than_one():
    vectors = task_vectors(*SIZES)
    units = torch.stack([fit_reference.at_unit(vector) for vector in vectors])
    left = []
    for levels in LEVELS:
        fit, whole = fit_of(levels, "tensor"), tile(vectors)
        shared = fit.merge(whole)
        sides = torch.stack(
            [rebuilt(fit, fit.code(whole, n, shared), shared) / fit_reference.rms(v) for n, v in enumerate(vectors)]
        )
        left.append(error(units, sides))
    assert (left[1] <= left[0] + 1e-5).all()
    assert left[1].sum() < 0.6 * left[0].sum()


# --- masks, and where they degenerate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", ["I8", "F16", "F32"])
def test_masks_follow_the_levels_as_stored(levels, scale, dtype):
    vectors = task_vectors(*SIZES[:4])
    fit, whole = fit_of(levels, scale), tile(vectors, rows=ROWS)
    stored = {
        role: fit_reference.store(vector.view(ROWS, -1), dtype).values for role, vector in fit.merge(whole).items()
    }
    flat = {role: vector.view(-1) for role, vector in stored.items()}
    for position, vector in enumerate(vectors):
        unit = fit_reference.at_unit(vector.view(ROWS, -1), scale)
        due = fit_reference.nearer_sides(unit, stored["merged"], stored.get("merged_lo"))
        assert same_bits(fit.code(whole, position, flat).codes.to(torch.int8), due.view(-1))


@pytest.mark.parametrize("levels", LEVELS)
def test_tasks_that_are_equal_share_their_value(levels):
    (vector,) = task_vectors(0.3)
    fit, whole = fit_of(levels, "tensor"), tile([vector] * 3)
    shared = fit.merge(whole)
    torch.testing.assert_close(shared["merged"], fit_reference.at_unit(vector), rtol=2e-7, atol=0)
    found = rebuilt(fit, fit.code(whole, 1, shared), shared)
    torch.testing.assert_close(found, vector.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_task_alone_is_its_own_level(levels):
    (vector,) = task_vectors(0.3)
    fit, whole = fit_of(levels), tile([vector], rows=ROWS)
    shared = fit.merge(whole)
    torch.testing.assert_close(
        rebuilt(fit, fit.code(whole, 0, shared), shared, ROWS), vector.double(), rtol=1e-6, atol=0
    )


def test_opposite_tasks():
    """One level serves one of the two; two levels serve both."""
    (vector,) = task_vectors(0.3)
    both = tile([vector, -vector])
    one, two = fit_of(1, "tensor"), fit_of(2, "tensor")
    shared = one.merge(both)
    codes = [one.code(both, position, shared).codes for position in range(2)]
    assert (codes[0] + codes[1] == 1).all()
    shared = two.merge(both)
    torch.testing.assert_close(rebuilt(two, two.code(both, 1, shared), shared), -vector.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels", LEVELS)
def test_what_no_task_moved_has_no_level(levels):
    vectors = [torch.zeros(6), torch.zeros(6)]
    for vector in vectors:
        vector[0] = 1.0
    shared = fit_of(levels).merge(tile(vectors))
    for level in shared.values():
        assert not level[1:].any()
    assert not fit_of(levels).code(tile(vectors), 0, shared).codes[1:].any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("length", [100, 1000, 30])
def test_pieces_are_fitted_as_the_whole_is(levels, scale, length):
    vectors = task_vectors(*SIZES[:3])
    fit, whole = fit_of(levels, scale), tile(vectors, rows=ROWS)
    shared = fit.merge(whole)
    for start in range(0, 5000, 1000):
        piece = tile(vectors, start, start + length, rows=ROWS)
        part = {role: vector[start : start + length] for role, vector in shared.items()}
        for role, vector in fit.merge(piece).items():
            assert same_bits(vector, part[role])
        assert same_bits(fit.code(piece, 1, part).codes, fit.code(whole, 1, shared).codes[start : start + length])


@pytest.mark.parametrize("count", range(1, 12))
def test_tensors_are_sorted_among_each_other(count):
    """A network of exchanges that sorts all zeros and ones sorts all numbers."""
    patterns = (torch.arange(1 << count)[None, :] >> torch.arange(count)[:, None] & 1).float()
    assert torch.equal(torch.stack(ascending(list(patterns))), patterns.sort(0).values)


@pytest.mark.parametrize("count", [16, 17, 33, 100])
def test_so_are_many(count):
    values = torch.randn(count, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(ascending(list(values))), values.sort(0).values)
