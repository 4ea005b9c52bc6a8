"""TIES: the trim's threshold is exact and global, however it is streamed; a sign is elected, what has it is added."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tallstore.fit.ties import KEPT, disjoint_sum, trim_threshold, trimmed
from tests import fit_reference
from tests.reference import same_bits

RANDOM = torch.Generator().manual_seed(3)


def streamed(*chunks):
    return lambda: iter(chunks)


def kthvalue(vector, kept=KEPT):
    return vector.abs().kthvalue(vector.numel() - int(vector.numel() * kept)).values.item()


# --- the threshold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, 2, 4, 5, 6, 9, 10, 11, 999, 30_001])
def test_it_is_the_kth_smallest_magnitude(numel):
    vector = torch.randn(numel, generator=RANDOM)
    assert trim_threshold(streamed(vector)) == kthvalue(vector)


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.999])
def test_for_any_share(kept):
    vector = torch.randn(5000, generator=RANDOM)
    assert trim_threshold(streamed(vector), kept) == kthvalue(vector, kept)


def test_it_is_over_all_tensors_together():
    small, large = torch.randn(800, generator=RANDOM) * 1e-3, torch.randn(40, 20, generator=RANDOM)
    found = trim_threshold(streamed(small, large))
    assert found == fit_reference.threshold_of([small, large], KEPT) == kthvalue(torch.cat([small, large.view(-1)]))
    assert (small.abs() < found).all()  # the fifth that is kept lies in one tensor


@pytest.mark.parametrize("length", [1, 3, 64, 200])
def test_it_does_not_depend_on_the_pieces(length):
    vector = torch.randn(200, generator=RANDOM)
    assert trim_threshold(streamed(*vector.split(length))) == kthvalue(vector)


@pytest.mark.parametrize(
    "vector",
    [
        torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, -2.0, 2.0]),
        torch.tensor([-0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0]),
        torch.zeros(10),
        torch.tensor([2.0**-149, -(2.0**-149), 2.0**-140, 2.0**-126, 0.0]),
        torch.tensor([3.4028234663852886e38, -3.4028234663852886e38, 1.0, 2.0, 3.0]),
        torch.full((17,), -0.125),
        # Neighbours that share their upper 16 bits: the second pass decides.
        torch.from_numpy(np.arange(0x3F800000, 0x3F800064, dtype=np.uint32).view(np.float32)),
    ],
    ids=["ties", "mostly zero", "zeros", "subnormal", "largest", "equal", "neighbours"],
)
def test_on_ties_and_at_the_ends_of_float32(vector):
    assert trim_threshold(streamed(vector)) == kthvalue(vector)


def test_of_nothing_it_keeps_everything():
    assert trim_threshold(streamed()) == 0.0
    assert trim_threshold(streamed(torch.empty(0))) == 0.0


def test_it_is_streamed_twice_and_never_held():
    passes = []

    def chunks():
        passes.append(0)
        for _ in range(20):
            passes[-1] += 1
            yield torch.randn(100, generator=torch.Generator().manual_seed(len(passes)))

    trim_threshold(chunks)
    assert passes == [20, 20]


# --- the merge --------------------------------------------------------------------------------------------------------


def test_equals_of_the_threshold_stay():
    vector = torch.tensor([0.5, -1.0, 1.0, 2.0])
    assert trimmed(vector, 1.0).tolist() == [0.0, -1.0, 1.0, 2.0]


def test_the_sign_of_the_sum_is_elected_and_only_what_has_it_is_added():
    first = torch.tensor([3.0, 3.0, -3.0, 1.0, 0.0])
    second = torch.tensor([1.0, -1.0, 1.0, 1.0, -2.0])
    third = torch.tensor([1.0, -1.0, -1.0, -5.0, 0.0])
    assert disjoint_sum([first, second, third]).tolist() == [5.0, 3.0, -4.0, -5.0, -2.0]


def test_what_was_trimmed_has_no_vote():
    first, second = torch.tensor([0.9, 2.0]), torch.tensor([-0.1, -1.0])
    assert disjoint_sum([trimmed(first, 1.0), trimmed(second, 0.05)]).tolist() == [pytest.approx(-0.1), 2.0]


def test_where_the_values_cancel_nothing_is_merged():
    assert disjoint_sum([torch.tensor([2.0]), torch.tensor([-2.0])]).tolist() == [0.0]


def test_it_is_the_references():
    vectors = [torch.randn(10_000, generator=RANDOM) for _ in range(5)]
    thresholds = [kthvalue(vector) for vector in vectors]
    kept = [trimmed(vector, threshold) for vector, threshold in zip(vectors, thresholds, strict=True)]
    assert same_bits(disjoint_sum(kept), fit_reference.merge(vectors, "ties", thresholds))
