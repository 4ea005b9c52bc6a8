"""TallMask on tiles: merged vectors, masks and scales against the rule of the paper, wherever the tiles are cut."""

from __future__ import annotations

import pytest
import torch

from tallstore import TallMask
from tallstore.fit import PUBLISHED_GRID, prepare
from tests import fit_cases, fit_reference
from tests.fit_cases import TASKS, prepared, rebuilt, tile
from tests.reference import same_bits


def task_vectors(numel=5001):
    return fit_cases.task_vectors(1.0, 0.5, 2.0, numel=numel, seed=2)


def at_unit(vectors):
    return [fit_reference.at_unit(vector) for vector in vectors]


# --- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sum", "mean", "ties"])
def test_merged_is_the_sum_the_mean_or_the_disjoint_sum(how):
    vectors = task_vectors()
    thresholds = [fit_reference.threshold_of([vector], 0.2) for vector in vectors]
    merged = prepared(TallMask(merge=how), vectors).merge(tile(vectors))["merged"]
    assert same_bits(merged, fit_reference.merge(vectors, how, thresholds))


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_normalised_tasks_count_the_same_however_far_they_moved(how):
    vectors = task_vectors()
    fit = prepared(TallMask(merge=how, normalise=True), vectors)
    merged = fit.merge(tile(vectors))["merged"]
    assert same_bits(merged, fit_reference.merge(at_unit(vectors), how))
    further = [vectors[0], vectors[1] * 2.0**10, vectors[2]]
    assert same_bits(fit.merge(tile(further))["merged"], merged)


def test_ties_trims_before_it_normalises():
    vectors = task_vectors()
    trimmed = [torch.where(v.abs() >= fit_reference.threshold_of([v], 0.2), v, 0.0) for v in vectors]
    merged = prepared(TallMask(merge="ties", normalise=True), vectors).merge(tile(vectors))["merged"]
    units = [part * (1 / fit_reference.rms(v)) for part, v in zip(trimmed, vectors, strict=True)]
    assert same_bits(merged, fit_reference.merge(units, "ties", [0.0] * 3))


def test_what_somebody_else_merged_is_taken_as_it_is():
    vectors, (given,) = task_vectors(), fit_cases.task_vectors(3.0, numel=5001, seed=9)
    fit = prepared(TallMask(merge="merged.safetensors"), vectors)
    assert same_bits(fit.merge(tile(vectors, 100, 900, given=given))["merged"], given[100:900])


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["I8", "BF16", "F16", "F32"])
@pytest.mark.parametrize("how", ["sum", "mean", "ties"])
@pytest.mark.parametrize("mask_lambda", [0.0, 0.4, 1.0, 1.5])
def test_masks_follow_the_rule_from_merged_as_stored(how, dtype, mask_lambda):
    vectors = task_vectors(2000)
    fit = prepared(TallMask(mask_lambda, how), vectors)
    stored = fit_reference.store(fit.merge(tile(vectors))["merged"][None], dtype).values[0]
    for position, vector in enumerate(vectors):
        codes = fit.code(tile(vectors), position, {"merged": stored}).codes
        assert codes.dtype == torch.uint8
        assert same_bits(codes.to(torch.int8), fit_reference.tall_sides(vector, stored, mask_lambda))


@pytest.mark.parametrize("how", ["sum", "mean", "ties"])
@pytest.mark.parametrize("normalise", [False, True])
def test_it_agrees_with_the_formula_in_float64(how, normalise):
    vectors = task_vectors(20_000)
    fit = prepared(TallMask(0.6, how, normalise=normalise), vectors)
    shared = fit.merge(tile(vectors))
    thresholds = [fit_reference.threshold_of([vector], 0.2) if how == "ties" else 0.0 for vector in vectors]
    expected = fit_reference.tall_mask(vectors, [0.6] * 3, how, thresholds=thresholds, normalise=normalise)
    for position, formula in enumerate(expected):
        found = rebuilt(fit, fit.code(tile(vectors), position, shared), shared)
        assert formula.decided.float().mean() > 0.999
        torch.testing.assert_close(found[formula.decided], formula.sides[formula.decided], rtol=1e-4, atol=1e-6)


def test_the_comparison_is_strict():
    vector, merged = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([2.0, 1.999, -2.0, -2.001])
    codes = prepared(TallMask(1.0), [vector]).code(tile([vector]), 0, {"merged": merged}).codes
    assert codes.tolist() == [0, 1, 0, 0]


def test_bits_are_cleared_where_merged_is_zero():
    """There the rule itself sets them for every lambda below 1."""
    vector, merged = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    assert prepared(TallMask(0.4), [vector]).code(tile([vector]), 0, {"merged": merged}).codes.tolist() == [0, 0, 1]


def test_the_rule_compares_distances_to_the_expert():
    """|base - finetuned| > lambda * |base + merged - finetuned|, on whole checkpoints in float64."""
    base = torch.randn(3000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    vectors = task_vectors(3000)
    merged = fit_reference.merge(vectors, "sum")
    for position, vector in enumerate(vectors):
        finetuned = base + vector.double()
        near, far = (base - finetuned).abs(), (base + merged.double() - finetuned).abs()
        codes = prepared(TallMask(0.6), vectors).code(tile(vectors), position, {"merged": merged}).codes
        decided = (near - 0.6 * far).abs() > 1e-6
        assert torch.equal((codes > 0)[decided], (near > 0.6 * far)[decided])


def test_each_task_has_its_own_lambda():
    vectors = task_vectors()
    fit = prepared(TallMask(0.2), vectors).with_lambdas({"a": 0.2, "b": 1.0, "c": 0.2})
    shared = fit.merge(tile(vectors))
    for position, mask_lambda in enumerate((0.2, 1.0, 0.2)):
        expected = fit_reference.tall_sides(vectors[position], shared["merged"], mask_lambda)
        assert same_bits(fit.code(tile(vectors), position, shared).codes.to(torch.int8), expected)
    again = fit.with_lambdas(dict.fromkeys(TASKS, 1.0)).code(tile(vectors), 0, shared).codes.to(torch.int8)
    assert same_bits(again, fit_reference.tall_sides(vectors[0], shared["merged"], 1.0))


@pytest.mark.parametrize("how", ["sum", "mean", "ties"])
@pytest.mark.parametrize("length", [7, 1000])
def test_pieces_are_fitted_as_the_whole_is(how, length):
    vectors = task_vectors()
    fit = prepared(TallMask(merge=how), vectors)
    shared = fit.merge(tile(vectors))
    codes = fit.code(tile(vectors), 1, shared).codes
    for start in range(0, 5001, max(length, 500)):
        piece, part = tile(vectors, start, start + length), shared["merged"][start : start + length]
        assert same_bits(fit.merge(piece)["merged"], part)
        assert same_bits(fit.code(piece, 1, {"merged": part}).codes, codes[start : start + length])


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "tasks", "scale"),
    [
        (TallMask(), 3, 1.0),
        (TallMask(merge="ties"), 3, 1.0),
        (TallMask(merge="mean"), 3, 3.0),
        (TallMask(merge="mean"), 1, 1.0),
        (TallMask(merge="mean", gain="least-squares"), 3, 3.0),
        (TallMask(merge="mean", gain="published"), 3, 1.0),
    ],
    ids=str,
)
def test_the_rules_own_scale_is_one_and_that_of_a_mean_the_number_of_its_tasks(method, tasks, scale):
    vectors = task_vectors()[:tasks]
    fit = prepared(method, vectors)
    assert fit.code(tile(vectors), 0, fit.merge(tile(vectors))).scale == scale
    normalised = prepared(TallMask(merge=method.merge, gain=method.gain, normalise=True), vectors)
    found = normalised.code(tile(vectors), 0, normalised.merge(tile(vectors))).scale
    assert found == pytest.approx(scale * fit_reference.rms(vectors[0]), rel=1e-12)


def test_the_published_grid_is_the_papers():
    assert PUBLISHED_GRID == (0.2, 0.3, 0.4, 0.5, 0.6)


def test_lambdas_may_be_given_by_task():
    inputs = fit_cases.Inputs({task: lambda: iter(()) for task in "ab"})
    assert prepare(TallMask(0.7), inputs).lambdas == {"a": 0.7, "b": 0.7}
    assert prepare(TallMask((0.2, 0.7)), inputs, {"a": 0.2, "b": 0.7}).lambdas == {"a": 0.2, "b": 0.7}
