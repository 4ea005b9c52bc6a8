"""SignedMask on tiles: merged vectors, codes and gains against the formula, wherever the tiles are cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tallstore.errors import OptionError
from tallstore.fit import SignedMask, SignedMaskFit, TaskStatistics, Tile
from tests import fit_reference
from tests.reference import same_bits

RANDOM = torch.Generator().manual_seed(1)
TASKS = ("a", "b", "c")


def task_vectors(numel, *scales):
    return [scale * torch.randn(numel, generator=RANDOM) for scale in scales]


def statistics(vector):
    wide = vector.double()
    return TaskStatistics(vector.numel(), (wide**2).sum().item(), wide.abs().sum().item())


def tile(vectors, start=0, stop=None, *, of=None):
    """Elements [start, stop) of tasks whose whole vectors are *of*."""
    return Tile(
        tasks=TASKS[: len(vectors)],
        task_vectors=tuple(vector[start:stop] for vector in vectors),
        statistics=tuple(map(statistics, of or vectors)),
        shared_by=len(vectors),
    )


def sides(codes):
    return torch.tensor([0, 1, -1], dtype=torch.int8)[codes.long()]


# --- merged -----------------------------------------------------------------------------------------------------------


def test_merged_is_the_mean_magnitude_of_tasks_at_unit_rms():
    vectors = task_vectors(5001, 1.0, 0.01, 30.0)
    merged = SignedMaskFit(SignedMask()).merge(tile(vectors))
    assert same_bits(merged, fit_reference.mean_magnitude(vectors))


def test_a_task_counts_the_same_however_far_it_moved():
    one, other = task_vectors(4096, 1.0, 1.0)
    fit = SignedMaskFit(SignedMask())
    near, far = fit.merge(tile([one, other])), fit.merge(tile([one, other * 2.0**20]))
    assert same_bits(near, far)


def test_it_agrees_with_the_formula_in_float64():
    vectors = task_vectors(20_000, 1.0, 0.3, 0.02)
    wide = torch.stack([vector.double().abs() / vector.double().pow(2).mean().sqrt() for vector in vectors])
    merged = SignedMaskFit(SignedMask()).merge(tile(vectors))
    torch.testing.assert_close(merged.double(), wide.mean(0), rtol=3e-7, atol=0)
    codes = SignedMaskFit(SignedMask()).code(tile(vectors), 1, merged)
    distance = (wide[1] - 1.2 * wide.mean(0)) / wide.mean(0)
    assert torch.equal(codes[distance.abs() > 1e-6] > 0, distance[distance.abs() > 1e-6] > 0)


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 0.8, 1.2, 2.9])
def test_codes_are_signs_where_the_magnitude_exceeds_the_threshold(threshold):
    vectors = task_vectors(5001, 1.0, 0.5, 2.0)
    stored = fit_reference.store(fit_reference.mean_magnitude(vectors), "LOG4").values
    fit = SignedMaskFit(SignedMask(threshold))
    for position, vector in enumerate(vectors):
        codes = fit.code(tile(vectors), position, stored)
        assert codes.dtype == torch.uint8
        assert same_bits(sides(codes), fit_reference.signed_sides(vector, stored, threshold))


def test_the_comparison_is_strict():
    vector = torch.tensor([1.0, -1.0, 1.0, -1.0])  # at unit RMS as it is
    merged = torch.tensor([1.0, 1.0, 0.999, 0.999])
    codes = SignedMaskFit(SignedMask(1.0)).code(tile([vector, vector]), 0, merged)
    assert codes.tolist() == [0, 0, 1, 2]


def test_nothing_is_kept_where_merged_is_zero_and_nothing_moved_is_kept():
    vector = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0])
    merged = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.25])
    codes = SignedMaskFit(SignedMask(0)).code(tile([vector, vector]), 0, merged)
    assert codes.tolist() == [0, 0, 0, 0, 1]


def test_masks_follow_merged_as_stored_and_not_as_it_was():
    vectors = task_vectors(5000, 1.0, 1.0, 1.0)
    merged = fit_reference.mean_magnitude(vectors)
    stored = fit_reference.store(merged, "LOG4").values
    fit = SignedMaskFit(SignedMask())
    assert not torch.equal(fit.code(tile(vectors), 0, merged), fit.code(tile(vectors), 0, stored))


def test_a_task_that_moved_alone_keeps_every_sign():
    """Its own magnitude is the merged one: nothing would exceed 1.2 times that."""
    vector = task_vectors(5000, 0.1)[0]
    stored = fit_reference.store(fit_reference.mean_magnitude([vector]), "LOG4").values
    codes = SignedMaskFit(SignedMask()).code(tile([vector]), 0, stored)
    assert same_bits(sides(codes), torch.sign(vector).to(torch.int8))
    assert same_bits(sides(codes), fit_reference.signed_sides(vector, stored, 1.2, alone=True))


def test_a_tile_of_one_task_of_several_is_coded_as_one_of_several():
    vectors = task_vectors(5000, 1.0, 1.0, 1.0)
    stored = fit_reference.store(fit_reference.mean_magnitude(vectors), "LOG4").values
    fit = SignedMaskFit(SignedMask())
    alone = Tile((TASKS[1],), (vectors[1],), (statistics(vectors[1]),), shared_by=3)
    assert same_bits(fit.code(alone, 0, stored), fit.code(tile(vectors), 1, stored))


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 1000, 4999])
def test_pieces_are_fitted_as_the_whole_is(length):
    vectors = task_vectors(5000, 1.0, 0.2, 3.0)
    fit = SignedMaskFit(SignedMask())
    whole = fit.merge(tile(vectors))
    starts = range(0, 5000, length) if length > 1 else range(0, 5000, 613)
    for start in starts:
        piece = tile(vectors, start, start + length, of=vectors)
        assert same_bits(fit.merge(piece), whole[start : start + length])
        codes = fit.code(piece, 2, whole[start : start + length])
        assert same_bits(codes, fit.code(tile(vectors), 2, whole)[start : start + length])


# --- scales -----------------------------------------------------------------------------------------------------------


def test_the_gain_takes_the_projection_to_one():
    vectors = task_vectors(5000, 1.0, 0.2, 3.0)
    stored = fit_reference.store(fit_reference.mean_magnitude(vectors), "LOG4").values
    fit = SignedMaskFit(SignedMask())
    for position, vector in enumerate(vectors):
        signed = fit_reference.signed_sides(vector, stored, 1.2)
        projection = (signed.double() * stored.double() * vector.double()).sum().item()
        gain = fit.gain(statistics(vector), projection)
        assert gain == pytest.approx(fit_reference.gain_one(vector, signed, stored), rel=1e-12)
        assert 1 / 8 < gain / fit.fitted_scale(statistics(vector), len(vectors)) < 8, position


def test_the_fits_own_scale_undoes_the_normalisation():
    vector = task_vectors(5000, 0.01)[0]
    assert SignedMaskFit(SignedMask()).fitted_scale(statistics(vector), 3) == pytest.approx(fit_reference.rms(vector))


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, "1.2", None, [1.2]])
def test_a_threshold_that_is_no_number_from_0_is_refused(threshold):
    with pytest.raises(OptionError, match="threshold"):
        SignedMask(threshold)


def test_the_threshold_is_recorded_as_a_plain_number():
    assert SignedMask().parameters == {"threshold": 1.2}
    recorded = SignedMask(np.float32(0.5)).parameters["threshold"]
    assert type(recorded) is float
    assert recorded == 0.5
