"""SignedMask on tiles: merged vectors, codes and scales against the formula, wherever the tiles are cut."""

from __future__ import annotations

import pytest
import torch

from tallstore import SignedMask
from tallstore.fit import SignedMaskFit
from tests import fit_reference
from tests.fit_cases import rebuilt, task_vectors, tile
from tests.reference import same_bits

SCALES = ["tensor", "row"]
ROWS = 50


def fit_of(threshold=1.2, scale="tensor"):
    return SignedMaskFit(SignedMask(threshold, scale))


def merged_of(vectors, scale="tensor"):
    """Of the formula: the mean magnitude of tasks, or of their rows, at unit root mean square."""
    return fit_reference.mean_magnitude([vector.view(ROWS, -1) for vector in vectors], scale).view(-1)


def sides(codes):
    return torch.tensor([0, 1, -1], dtype=torch.int8)[codes.long()]


# --- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_merged_is_the_mean_magnitude_of_tasks_at_unit_rms(scale):
    vectors = task_vectors(1.0, 0.01, 30.0)
    merged = fit_of(scale=scale).merge(tile(vectors, rows=ROWS))
    assert same_bits(merged["merged"], merged_of(vectors, scale))


@pytest.mark.parametrize("scale", SCALES)
def test_a_task_counts_the_same_however_far_it_moved(scale):
    one, other = task_vectors(1.0, 1.0)
    fit = fit_of(scale=scale)
    near, far = (fit.merge(tile([one, other * factor], rows=ROWS))["merged"] for factor in (1.0, 2.0**20))
    assert same_bits(near, far)


def test_by_row_a_row_counts_the_same_however_far_it_moved():
    one, other = task_vectors(1.0, 1.0)
    apart = (one.view(ROWS, -1) * 2.0 ** torch.arange(ROWS).remainder(20)[:, None]).view(-1)
    fit = fit_of(scale="row")
    near, far = (fit.merge(tile([moved, other], rows=ROWS))["merged"] for moved in (one, apart))
    assert same_bits(near, far)


@pytest.mark.parametrize("scale", SCALES)
def test_it_agrees_with_the_formula_in_float64(scale):
    vectors = task_vectors(1.0, 0.3, 0.02, numel=20_000)
    fit, whole = fit_of(scale=scale), tile(vectors, rows=ROWS)
    shared = fit.merge(whole)
    expected = fit_reference.signed_mask([vector.view(ROWS, -1) for vector in vectors], 1.2, scale)
    for position, formula in enumerate(expected):
        found = rebuilt(fit, fit.code(whole, position, shared), shared, ROWS).view(ROWS, -1)
        decided = formula.decided
        assert decided.float().mean() > 0.999
        torch.testing.assert_close(found[decided], formula.sides[decided], rtol=1e-6, atol=0)


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("threshold", [0, 0.8, 1.2, 2.9])
def test_codes_are_signs_where_the_magnitude_exceeds_the_threshold(threshold, scale):
    vectors = task_vectors(1.0, 0.5, 2.0)
    stored = fit_reference.store(merged_of(vectors, scale).view(ROWS, -1), "LOG4").values
    fit, whole = fit_of(threshold, scale), tile(vectors, rows=ROWS)
    for position, vector in enumerate(vectors):
        codes = fit.code(whole, position, {"merged": stored.view(-1)}).codes
        assert codes.dtype == torch.uint8
        expected = fit_reference.signed_sides(vector.view(ROWS, -1), stored, threshold, scale)
        assert same_bits(sides(codes), expected.view(-1))


def test_the_comparison_is_strict():
    vector = torch.tensor([1.0, -1.0, 1.0, -1.0])  # at unit RMS as it is
    merged = torch.tensor([1.0, 1.0, 0.999, 0.999])
    assert fit_of(1.0).code(tile([vector, vector]), 0, {"merged": merged}).codes.tolist() == [0, 0, 1, 2]


def test_nothing_is_kept_where_merged_is_zero_and_nothing_moved_is_kept():
    vector = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0])
    merged = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.25])
    assert fit_of(0).code(tile([vector, vector]), 0, {"merged": merged}).codes.tolist() == [0, 0, 0, 0, 1]


def test_masks_follow_merged_as_stored_and_not_as_it_was():
    vectors = task_vectors(1.0, 1.0, 1.0)
    merged = merged_of(vectors)
    stored = fit_reference.store(merged, "LOG4").values
    first, second = (fit_of().code(tile(vectors), 0, {"merged": shared}).codes for shared in (merged, stored))
    assert not torch.equal(first, second)


def test_a_task_that_moved_alone_keeps_every_sign():
    """Its own magnitude is the merged one: nothing would exceed 1.2 times that."""
    (vector,) = task_vectors(0.1)
    stored = fit_reference.store(merged_of([vector]), "LOG4").values
    codes = fit_of().code(tile([vector]), 0, {"merged": stored}).codes
    assert same_bits(sides(codes), torch.sign(vector).to(torch.int8))
    assert same_bits(sides(codes), fit_reference.signed_sides(vector, stored, 1.2, alone=True))


def test_a_tile_of_one_task_of_several_is_coded_as_one_of_several():
    vectors = task_vectors(1.0, 1.0, 1.0)
    stored = {"merged": fit_reference.store(merged_of(vectors), "LOG4").values}
    alone = fit_of().code(tile(vectors, only=1), 0, stored)
    assert same_bits(alone.codes, fit_of().code(tile(vectors), 1, stored).codes)


@pytest.mark.parametrize("scale", SCALES)
def test_a_row_that_did_not_move_is_left_alone(scale):
    vectors = task_vectors(1.0, 1.0)
    vectors[0].view(ROWS, -1)[3] = 0.0
    fit, whole = fit_of(0.0, scale), tile(vectors, rows=ROWS)
    coded = fit.code(whole, 0, fit.merge(whole))
    assert not coded.codes.view(ROWS, -1)[3].any()
    assert coded.codes.view(ROWS, -1)[4].all()


def test_the_fallback_keeps_every_sign_and_has_none_itself():
    fallback = fit_of(1.2, "row").fallback
    assert fallback == fit_of(0.0, "row")
    assert fallback.fallback is None


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("length", [7, 100, 1000, 4900])
def test_pieces_are_fitted_as_the_whole_is(length, scale):
    """Whole rows, and pieces of one."""
    vectors = task_vectors(1.0, 0.2, 3.0)
    fit, whole = fit_of(scale=scale), tile(vectors, rows=ROWS)
    shared = fit.merge(whole)
    codes = fit.code(whole, 2, shared).codes
    for start in range(0, 5000, max(length, 500)):
        stop = min(start + length, 5000)
        piece = tile(vectors, start, stop, rows=ROWS)
        assert same_bits(fit.merge(piece)["merged"], shared["merged"][start:stop])
        found = fit.code(piece, 2, {"merged": shared["merged"][start:stop]})
        assert same_bits(found.codes, codes[start:stop])
        if scale == "row":
            assert torch.equal(found.scale, fit.code(whole, 2, shared).scale[start // 100 : -(-stop // 100)])


# --- scales -----------------------------------------------------------------------------------------------------------


def test_the_scale_undoes_the_normalisation():
    vectors = task_vectors(0.01, 1.0)
    shared = fit_of().merge(tile(vectors))
    assert fit_of().code(tile(vectors), 0, shared).scale == pytest.approx(fit_reference.rms(vectors[0]), rel=1e-12)


def test_by_row_there_is_a_scale_a_row():
    vectors = task_vectors(0.01, 1.0)
    vectors[0].view(ROWS, -1)[7] *= 50
    fit, whole = fit_of(scale="row"), tile(vectors, rows=ROWS)
    scale = fit.code(whole, 0, fit.merge(whole)).scale
    assert same_bits(scale, fit_reference.row_rms(vectors[0].view(ROWS, -1))[:, 0].float())
