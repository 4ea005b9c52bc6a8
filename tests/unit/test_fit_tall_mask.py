"""TallMask on tiles: merged vectors, masks and gains against the rule of the paper, wherever the tiles are cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tallstore.errors import OptionError
from tallstore.fit import PUBLISHED_GRID, TallMask, TallMaskFit, TaskStatistics, Tile, prepare
from tests import fit_reference
from tests.reference import same_bits

RANDOM = torch.Generator().manual_seed(2)
TASKS = ("a", "b", "c")


def task_vectors(numel=5001, tasks=3):
    return [torch.randn(numel, generator=RANDOM) * scale for scale in (1.0, 0.5, 2.0)[:tasks]]


def statistics(vector):
    wide = vector.double()
    return TaskStatistics(vector.numel(), (wide**2).sum().item(), wide.abs().sum().item())


def tile(vectors, start=0, stop=None):
    return Tile(
        tasks=TASKS[: len(vectors)],
        task_vectors=tuple(vector[start:stop] for vector in vectors),
        statistics=tuple(map(statistics, vectors)),
        shared_by=len(vectors),
    )


def prepared(method, vectors, lambdas=None, pieces=700):
    """The method at work, its streams in pieces."""
    streams = {
        task: lambda vector=vector: (vector[start : start + pieces] for start in range(0, vector.numel(), pieces))
        for task, vector in zip(TASKS, vectors, strict=False)
    }
    return prepare(method, streams, lambdas)


# --- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sum", "mean", "ties"])
def test_merged_is_the_sum_the_mean_or_the_disjoint_sum(how):
    vectors = task_vectors()
    thresholds = [fit_reference.trim_threshold([vector]) for vector in vectors]
    merged = prepared(TallMask(merge=how), vectors).merge(tile(vectors))
    assert same_bits(merged, fit_reference.merge(vectors, how, thresholds))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["I8", "BF16", "F16", "F32"])
@pytest.mark.parametrize("how", ["sum", "mean", "ties"])
@pytest.mark.parametrize("mask_lambda", [0.0, 0.4, 1.0, 1.5])
def test_masks_follow_the_rule_from_merged_as_stored(how, dtype, mask_lambda):
    vectors = task_vectors(2000)
    fit = prepared(TallMask(mask_lambda, how), vectors)
    stored = fit_reference.store(fit.merge(tile(vectors))[None], dtype).values[0]
    for position, vector in enumerate(vectors):
        codes = fit.code(tile(vectors), position, stored)
        assert codes.dtype == torch.uint8
        assert same_bits(codes.to(torch.int8), fit_reference.tall_sides(vector, stored, mask_lambda))


def test_the_comparison_is_strict():
    vector, merged = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([2.0, 1.999, -2.0, -2.001])
    assert prepared(TallMask(1.0), [vector]).code(tile([vector]), 0, merged).tolist() == [0, 1, 0, 0]


def test_bits_are_cleared_where_merged_is_zero():
    """There the rule itself sets them for every lambda below 1."""
    vector, merged = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    assert prepared(TallMask(0.4), [vector]).code(tile([vector]), 0, merged).tolist() == [0, 0, 1]


def test_the_rule_compares_distances_to_the_expert():
    """|base - finetuned| > lambda * |base + merged - finetuned|, on whole checkpoints in float64."""
    base = torch.randn(3000, generator=RANDOM, dtype=torch.float64)
    vectors = task_vectors(3000)
    merged = fit_reference.merge(vectors, "sum")
    for position, vector in enumerate(vectors):
        finetuned = base + vector.double()
        near, far = (base - finetuned).abs(), (base + merged.double() - finetuned).abs()
        codes = prepared(TallMask(0.6), vectors).code(tile(vectors), position, merged)
        decided = (near - 0.6 * far).abs() > 1e-6
        assert torch.equal((codes > 0)[decided], (near > 0.6 * far)[decided])


def test_each_task_has_its_own_lambda():
    vectors = task_vectors()
    fit = prepared(TallMask((0.2, 1.0)), vectors, {"a": 0.2, "b": 1.0, "c": 0.2})
    merged = fit.merge(tile(vectors))
    for position, mask_lambda in enumerate((0.2, 1.0, 0.2)):
        expected = fit_reference.tall_sides(vectors[position], merged, mask_lambda)
        assert same_bits(fit.code(tile(vectors), position, merged).to(torch.int8), expected)
    again = fit.with_lambdas(dict.fromkeys(TASKS, 1.0))
    assert same_bits(
        again.code(tile(vectors), 0, merged).to(torch.int8), fit_reference.tall_sides(vectors[0], merged, 1.0)
    )


@pytest.mark.parametrize("how", ["sum", "mean", "ties"])
@pytest.mark.parametrize("length", [7, 1000])
def test_pieces_are_fitted_as_the_whole_is(how, length):
    vectors = task_vectors()
    fit = prepared(TallMask(merge=how), vectors)
    whole = fit.merge(tile(vectors))
    codes = fit.code(tile(vectors), 1, whole)
    for start in range(0, 5001, max(length, 500)):
        piece = tile(vectors, start, start + length)
        assert same_bits(fit.merge(piece), whole[start : start + length])
        assert same_bits(fit.code(piece, 1, whole[start : start + length]), codes[start : start + length])


# --- scales -----------------------------------------------------------------------------------------------------------


def test_gain_one_takes_the_projection_to_one_and_published_is_one():
    vector = task_vectors()[0]
    assert TallMaskFit(TallMask(), {}).gain(statistics(vector), 2.0) == statistics(vector).sum_squares / 2.0
    assert TallMaskFit(TallMask(gain="published"), {}).gain(statistics(vector), 2.0) == 1.0


def test_the_rules_own_scale_is_one_and_that_of_a_mean_the_number_of_its_tasks():
    vector = task_vectors()[0]
    for method, shared_by, scale in (
        (TallMask(), 20, 1.0),
        (TallMask(merge="ties"), 20, 1.0),
        (TallMask(merge="mean"), 20, 20.0),
        (TallMask(merge="mean"), 1, 1.0),
        (TallMask(merge="mean", gain="published"), 20, 1.0),
    ):
        assert TallMaskFit(method, {}).fitted_scale(statistics(vector), shared_by) == scale


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_lambda", [-0.1, math.nan, math.inf, (), (0.4, -1), "0.4", None, (0.4, None), {}])
def test_a_mask_lambda_that_is_no_number_from_0_is_refused(mask_lambda):
    with pytest.raises(OptionError, match="mask_lambda"):
        TallMask(mask_lambda)


@pytest.mark.parametrize(("option", "value"), [("merge", "max"), ("merge", None), ("gain", "two"), ("gain", 1.0)])
def test_an_unknown_merge_or_gain_is_refused_with_the_known_ones(option, value):
    with pytest.raises(OptionError, match=f"{option} is .*give one of '"):
        TallMask(**{option: value})


def test_candidates_are_sorted_and_recorded_as_plain_numbers():
    method = TallMask((0.6, 0.2, 0.4))
    assert method.lambdas == (0.2, 0.4, 0.6)
    assert method.parameters == {"mask_lambda": [0.2, 0.4, 0.6], "merge": "sum", "gain": "one"}
    assert TallMask(np.array([0.5, 0.25])).parameters["mask_lambda"] == [0.25, 0.5]
    assert TallMask(1).parameters["mask_lambda"] == 1.0


def test_published_is_the_papers_own():
    assert TallMask.published() == TallMask(mask_lambda=0.4, merge="ties", gain="published")
    assert PUBLISHED_GRID == (0.2, 0.3, 0.4, 0.5, 0.6)
