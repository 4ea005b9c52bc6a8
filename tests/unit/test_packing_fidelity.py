"""Cosines, gains and estimates: what they mean, how they add up, and where there are none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tallstore.fit import TaskStatistics, Tile
from tallstore.packing.fidelity import Estimated, Sums, combine, dot, sign_estimate, signed_estimates
from tests import fit_reference
from tests.packing_cases import normal


def statistics(vector):
    return TaskStatistics.of(vector)


def tile(*vectors):
    return Tile(tuple(map(str, range(len(vectors)))), vectors, tuple(map(statistics, vectors)), len(vectors))


def entropy(share):
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p)


# --- sums -------------------------------------------------------------------------------------------------------------


def test_sums_of_parts_are_the_sums_of_the_whole():
    tau, reconstruction = normal(1000), normal(1000, seed=1)
    parts = [
        Sums(dot(r, t), dot(r, r), dot(t, t)) for r, t in zip(reconstruction.split(300), tau.split(300), strict=True)
    ]
    whole = sum(parts, Sums())
    cosine, gain = fit_reference.cosine_and_gain([(reconstruction, tau)])
    assert whole.cosine == pytest.approx(cosine, rel=1e-6)
    assert whole.gain == pytest.approx(gain, rel=1e-6)


@pytest.mark.parametrize("numel", [0, 1, 511, 512, 513, 100_000])
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1.0, 1e25])
def test_a_dot_product_has_seven_digits_at_any_magnitude(numel, scale):
    first, second = normal(numel).abs() * scale, normal(numel, seed=1).abs() * scale
    exact = float(np.dot(first.double().numpy(), second.double().numpy()))
    assert dot(first, second) == pytest.approx(exact, rel=1e-7, abs=0.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(value):
    assert not math.isfinite(dot(torch.tensor([1.0, value]), torch.tensor([1.0, 1.0])))


def test_of_nothing_there_is_no_cosine_and_no_gain():
    assert (Sums().cosine, Sums().gain) == (None, None)
    stayed = Sums(0.0, 0.0, 4.0)
    assert (stayed.cosine, stayed.gain) == (None, 0.0)


def test_products_of_large_numbers_do_not_overflow():
    large = torch.tensor([3e38, 3e38])
    assert dot(large, large) == pytest.approx(2 * float(large[0]) ** 2, rel=1e-12)
    assert math.isfinite(Sums(dot(large, large), dot(large, large), dot(large, large)).cosine)


# --- estimates --------------------------------------------------------------------------------------------------------


def test_the_cosine_of_signs_is_exact():
    tau = normal(5000)
    cosine, _ = fit_reference.cosine_and_gain([(torch.sign(tau), tau)])
    estimate = sign_estimate(statistics(tau))
    assert estimate.cosine == pytest.approx(cosine, rel=1e-12)
    assert (estimate.bits, estimate.numel) == (1.0, 5000)


def test_signed_masks_are_estimated_by_the_formula_without_storing_them():
    vectors = [normal(5000, seed=seed, scale=scale) for seed, scale in ((1, 1.0), (2, 0.1), (3, 5.0))]
    merged = fit_reference.mean_magnitude(vectors)
    for vector, estimate in zip(vectors, signed_estimates(tile(*vectors), 0.5), strict=True):
        sides = fit_reference.signed_sides(vector, merged, 1.2)
        cosine, _ = fit_reference.cosine_and_gain([(sides * merged, vector)])
        density = (sides != 0).double().mean().item()
        assert estimate.cosine == pytest.approx(cosine, rel=1e-5)
        assert estimate.bits == pytest.approx(entropy(density) + density + 4 / 3, rel=1e-6)
        assert estimate.numel == 2500
        assert estimate.sum_squares == pytest.approx((vector.double() ** 2).sum().item() / 2, rel=1e-12)


def test_a_task_alone_keeps_its_signs():
    (estimate,) = signed_estimates(tile(normal(5000)), 1.0)
    assert estimate.cosine == pytest.approx(1)
    assert estimate.bits == pytest.approx(1 + 4)


def test_where_nothing_is_kept_the_cosine_is_zero():
    vector = normal(5000)
    first, second = signed_estimates(tile(vector, vector), 1.0)
    assert first.cosine == second.cosine == 0.0
    assert combine([first]) is None


def test_tensors_add_up_as_their_reconstructions_would():
    vectors = [normal(5000, seed=1, scale=3.0), normal(900, seed=2) ** 3]
    reconstructions = [torch.sign(tau) * ((tau**2).sum() / tau.abs().sum()) for tau in vectors]
    cosine, _ = fit_reference.cosine_and_gain(list(zip(reconstructions, vectors, strict=True)))
    estimate = combine(sign_estimate(statistics(tau)) for tau in vectors)
    assert estimate.cosine == pytest.approx(cosine, rel=1e-5)


def test_bits_count_by_elements():
    estimate = combine([Estimated(0.9, 1.0, 300, 1.0), Estimated(0.9, 3.0, 100, 50.0)])
    assert estimate.bits == 1.5
    assert combine([]) is None


def test_the_order_does_not_matter():
    numbers = torch.rand(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e3 + 1e-9
    estimates = [Estimated(cosine / 1e3, bits, numel, squares) for cosine, bits, numel, squares in numbers.tolist()]
    assert combine(estimates) == combine(reversed(estimates))
