"""Sign and Uniform on tiles: levels of the task vector itself, their scales, and the centre that may go before."""

from __future__ import annotations

import pytest
import torch

from tallstore import Sign, Uniform
from tallstore.fit import prepare
from tests import fit_reference
from tests.fit_cases import Inputs, rebuilt, task_vectors, tile
from tests.reference import same_bits

SCALES = ["tensor", "row"]
ROWS = 50
LEVELS = [3, 4, 8, 16]


def fit_of(method):
    return prepare(method, Inputs({}))


def heavy(*scales):
    """Task vectors whose rows went unequally far, with heavy tails in some."""
    vectors = task_vectors(*scales)
    for vector in vectors:
        rows = vector.view(ROWS, -1)
        rows[::3] = rows[::3] ** 3
        rows *= torch.linspace(0.1, 4.0, ROWS)[:, None]
    return vectors


def shaped(vectors):
    return [vector.view(ROWS, -1) for vector in vectors]


# --- Sign -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_signs_and_scales_are_the_formulas(scale, centre):
    vectors = heavy(1.0, 0.3, 2.0)
    fit, whole = fit_of(Sign(scale, centre=centre)), tile(vectors, rows=ROWS)
    shared = fit.merge(whole)
    for position, formula in enumerate(fit_reference.sign(shaped(vectors), scale, centre=centre)):
        found = rebuilt(fit, fit.code(whole, position, shared), shared, ROWS).view(ROWS, -1)
        assert formula.decided.float().mean() > 0.999
        torch.testing.assert_close(found[formula.decided], formula.sides[formula.decided], rtol=1e-6, atol=0)
        if centre:
            torch.testing.assert_close(shared["centre"].double(), formula.centre.view(-1), rtol=1e-5, atol=1e-6)


def test_the_scale_of_a_sign_is_the_one_of_least_squared_error():
    (vector,) = heavy(1.0)
    fit = fit_of(Sign())
    coded = fit.code(tile([vector]), 0, {})
    signs = rebuilt(fit, coded, {}) / coded.scale
    assert coded.scale == pytest.approx((signs * vector).sum().item() / vector.numel(), rel=1e-6)


def test_what_moved_nowhere_counts_as_moved_up():
    vector = torch.tensor([1.0, -1.0, 0.0, -0.0, -1e-30])
    assert fit_of(Sign()).code(tile([vector]), 0, {}).codes.tolist() == [1, 0, 1, 1, 0]


def test_a_row_that_did_not_move_has_scale_0():
    (vector,) = task_vectors(1.0)
    vector.view(ROWS, -1)[5] = 0.0
    scale = fit_of(Sign("row")).code(tile([vector], rows=ROWS), 0, {}).scale
    assert scale[5] == 0.0
    assert (scale > 0).sum() == ROWS - 1


def test_the_centre_is_coded_as_stored():
    vectors = task_vectors(1.0, 1.0)
    fit = fit_of(Sign(centre=True))
    stored = fit_reference.store(fit.merge(tile(vectors))["centre"][None], "I8").values[0]
    for position, vector in enumerate(vectors):
        codes = fit.code(tile(vectors), position, {"centre": stored}).codes
        assert same_bits(codes.to(torch.int8), fit_reference.up_sides(vector, stored))


# --- Uniform ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("levels", "centre"), [*((levels, False) for levels in LEVELS), *((levels, True) for levels in LEVELS[1:])]
)
def test_levels_are_the_formulas(levels, scale, centre):
    """Up to what scales the whole tensor: a gain takes care of that."""
    vectors = heavy(1.0, 0.3, 2.0)
    fit, whole = fit_of(Uniform(levels, scale, centre=centre)), tile(vectors, rows=ROWS)
    shared = fit.merge(whole)
    for position, formula in enumerate(fit_reference.uniform(shaped(vectors), levels, scale, centre=centre)):
        coded = fit.code(whole, position, shared)
        found = rebuilt(fit, coded, shared, ROWS).view(ROWS, -1)
        if scale == "tensor":
            assert isinstance(coded.scale, float)
            found *= formula.sides.abs().amax() / found.abs().amax()
        assert formula.decided.float().mean() > 0.99
        torch.testing.assert_close(found[formula.decided], formula.sides[formula.decided], rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_row_has_the_truest_of_the_widths_that_are_tried_and_its_scale(levels):
    (vector,) = heavy(1.0)
    rows = vector.view(ROWS, -1).double()
    fit = fit_of(Uniform(levels))
    coded = fit.code(tile([vector], rows=ROWS), 0, {})
    level = rebuilt(fit, coded, {}, ROWS).view(ROWS, -1) / coded.scale.double()[:, None]
    width = fit_reference.NORMAL_WIDTH[levels] * fit_reference.row_rms(rows)
    tried = [fit_reference.level_of(rows, factor * width, levels)[0] for factor in fit_reference.WIDTH_FACTORS]
    cosines = torch.stack([fit_reference.cosine(one, rows) for one in tried])
    torch.testing.assert_close(fit_reference.cosine(level, rows), cosines.amax(0), rtol=1e-5, atol=0)
    assert len(cosines.argmax(0).unique()) > 2  # rows are unlike each other
    torch.testing.assert_close(
        coded.scale.double()[:, None], fit_reference.step_of(level, rows, "row"), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("exponent", [-55, 58])
@pytest.mark.parametrize("levels", LEVELS)
def test_the_choice_does_not_depend_on_the_unit(levels, exponent):
    """Squares of such numbers are beyond float32."""
    (vector,) = heavy(1.0)
    fit = fit_of(Uniform(levels))
    near = fit.code(tile([vector], rows=ROWS), 0, {})
    far = fit.code(tile([vector * 2.0**exponent], rows=ROWS), 0, {})
    assert torch.equal(far.codes, near.codes)
    assert torch.equal(far.scale, near.scale * 2.0**exponent)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", SCALES)
def test_a_threshold_that_is_given_is_taken(threshold, scale):
    vectors = heavy(1.0)
    fit = fit_of(Uniform(3, scale, threshold=threshold))
    codes = fit.code(tile(vectors, rows=ROWS), 0, {}).codes
    (formula,) = fit_reference.uniform(shaped(vectors), 3, scale, threshold=threshold)
    signs = torch.sign(formula.sides).view(-1)
    decided = formula.decided.view(-1) | (threshold == 0.0)
    assert decided.float().mean() > 0.999
    assert torch.equal(codes[decided].double() - 1, signs[decided])


def test_larger_thresholds_keep_fewer():
    vectors = heavy(1.0)
    kept = [
        (fit_of(Uniform(3, threshold=t)).code(tile(vectors, rows=ROWS), 0, {}).codes != 1).sum().item()
        for t in (0.0, 0.5, 1.0, 2.0, 100.0)
    ]
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (5000, 0)


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_are_in_their_range_and_use_it(levels):
    vectors = heavy(1.0)
    codes = fit_of(Uniform(levels)).code(tile(vectors, rows=ROWS), 0, {}).codes
    assert codes.dtype == torch.uint8
    assert codes.unique().tolist() == list(range(levels))


@pytest.mark.parametrize("levels", LEVELS)
def test_a_row_that_did_not_move_has_scale_0_under_uniform_too(levels):
    (vector,) = task_vectors(1.0)
    vector.view(ROWS, -1)[5] = 0.0
    scale = fit_of(Uniform(levels)).code(tile([vector], rows=ROWS), 0, {}).scale
    assert scale[5] == 0.0
    assert (scale > 0).sum() == ROWS - 1


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_a_row_that_the_centre_meets_has_a_scale_of_next_to_nothing(levels):
    """A reader adds the centre only where something is added to it."""
    first, second = task_vectors(1.0, 1.0)
    second.view(ROWS, -1)[5] = first.view(ROWS, -1)[5]
    fit, whole = fit_of(Uniform(levels, centre=True)), tile([first, second], rows=ROWS)
    coded = fit.code(whole, 0, fit.merge(whole))
    assert 0 < coded.scale[5] < 1e-5
    assert (coded.scale > 0.01).sum() == ROWS - 1


def test_constant_rows_are_exact_in_every_levels():
    """Codes of one magnitude: with the row's own scale, the row itself."""
    vector = torch.where(torch.arange(5000) % 3 == 0, -0.7, 0.7)
    for levels in LEVELS:
        fit = fit_of(Uniform(levels))
        found = rebuilt(fit, fit.code(tile([vector], rows=ROWS), 0, {}), {}, ROWS)
        torch.testing.assert_close(found, vector.double(), rtol=1e-6, atol=0)


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [Sign(), Sign("row"), Sign("row", centre=True), Uniform(3), Uniform(16, centre=True)]
)
def test_whole_rows_are_fitted_as_the_whole_is(method):
    vectors = heavy(1.0, 0.3)
    fit, whole = fit_of(method), tile(vectors, rows=ROWS)
    shared = fit.merge(whole)
    coded = fit.code(whole, 1, shared)
    for start in range(0, 5000, 1000):
        part = {role: vector[start : start + 1000] for role, vector in shared.items()}
        piece = tile(vectors, start, start + 1000, rows=ROWS)
        for role, vector in fit.merge(piece).items():
            assert same_bits(vector, part[role])
        found = fit.code(piece, 1, part)
        assert same_bits(found.codes, coded.codes[start : start + 1000])
        if isinstance(coded.scale, float):
            assert found.scale == coded.scale
        else:
            assert same_bits(found.scale, coded.scale[start // 100 : start // 100 + 10])


@pytest.mark.parametrize("levels", LEVELS)
def test_pieces_of_a_row_have_one_width_and_one_scale(levels):
    """A piece does not know what suits its row: it takes what suits a normal distribution."""
    vectors = task_vectors(1.0)
    fit = fit_of(Uniform(levels))
    pieces = [fit.code(tile(vectors, start, start + 30, rows=ROWS), 0, {}) for start in (300, 330, 370)]
    assert len({float(piece.scale) for piece in pieces}) == 1
    row = vectors[0].view(ROWS, -1)[3:4].double()
    width = fit_reference.NORMAL_WIDTH[levels] * fit_reference.row_rms(row)
    level, clear = fit_reference.level_of(row, width, levels)
    codes = torch.cat([pieces[0].codes, pieces[1].codes]).double()
    due = (level + (1 if levels == 3 else (levels - 1) / 2))[0]
    assert torch.equal(codes[clear[0, :60]], due[:60][clear[0, :60]])
