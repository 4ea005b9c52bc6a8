"""EMR on tiles: the elected vector, masks that agree with it, and the paper's rescaler over all of a task."""

from __future__ import annotations

import pytest
import torch

from tallstore import Emr
from tallstore.fit import EmrFit, Inputs, prepare
from tests import fit_reference
from tests.fit_cases import TASKS, prepared, rebuilt, task_vectors, tile
from tests.reference import same_bits


@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_the_elected_vector_and_its_masks_are_the_formulas(tasks):
    vectors = task_vectors(*[1.0, 0.5, 2.0, 0.1, 1.5, 0.7][:tasks], numel=20_000)
    fit = EmrFit(Emr())
    shared = fit.merge(tile(vectors))
    for position, formula in enumerate(fit_reference.emr(vectors, [1.0] * tasks)):
        found = rebuilt(fit, fit.code(tile(vectors), position, shared), shared)
        assert formula.decided.float().mean() > 0.999
        assert torch.equal(found[formula.decided], formula.sides[formula.decided])  # a maximum is not rounded


def test_by_hand():
    vectors = [torch.tensor([1.0, -3.0, 2.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, -5.0, 0.0, -1.0])]
    fit = EmrFit(Emr())
    shared = fit.merge(tile(vectors))
    assert shared["merged"].tolist() == [2.0, -3.0, -5.0, 0.0, 0.0]
    assert fit.code(tile(vectors), 0, shared).codes.tolist() == [1, 1, 0, 0, 0]
    assert fit.code(tile(vectors), 1, shared).codes.tolist() == [1, 0, 1, 0, 0]


def test_masks_follow_merged_as_stored():
    """An element that was rounded to 0 elects no sign."""
    vectors = task_vectors(1.0, 0.5)
    stored = torch.where(torch.arange(5000) % 3 == 0, 0.0, EmrFit(Emr()).merge(tile(vectors))["merged"])
    for position, vector in enumerate(vectors):
        codes = EmrFit(Emr()).code(tile(vectors), position, {"merged": stored}).codes
        assert same_bits(codes.to(torch.int8), fit_reference.emr_sides(vector, stored))
        assert not codes[::3].any()


def test_small_numbers_of_one_sign_agree():
    """Their product would be 0."""
    vectors = [torch.full((4,), 1e-25), torch.full((4,), 2e-25)]
    fit = EmrFit(Emr())
    assert fit.code(tile(vectors), 0, fit.merge(tile(vectors))).codes.tolist() == [1, 1, 1, 1]


def test_the_rescaler_is_over_all_of_a_tasks_tensors():
    first, second = task_vectors(1.0, 0.5, 2.0), task_vectors(0.1, 3.0, seed=2)
    tiles = [tile(first, 0, 2000), tile(first, 2000, 5000), tile(second)]  # the third task lacks the second tensor
    tensors = [lambda: tiles[:2], lambda: tiles[2:]]
    fit = prepare(Emr("published"), Inputs({task: lambda: iter(()) for task in TASKS[:3]}, tensors))
    merged = [fit_reference.elected(first), fit_reference.elected(second)]
    for position, task in enumerate(TASKS[:3]):
        own = [vectors[position] for vectors in (first, second) if position < len(vectors)]
        expected = fit_reference.rescaler_of(own, merged[: len(own)])
        assert fit.rescalers[task] == pytest.approx(expected, rel=1e-9)
        assert fit.code(tile(first), position, fit.merge(tile(first))).scale == fit.rescalers[task]


def test_a_task_that_nothing_agrees_with_has_no_rescaler():
    one = task_vectors(1.0)[0]
    fit = prepared(Emr("published"), [one, -one])
    assert fit.rescalers == {}
    coded = fit.code(tile([one, -one]), 0, fit.merge(tile([one, -one])))
    assert coded.scale == 1.0
    assert not coded.codes.any()


@pytest.mark.parametrize("gain", ["one", "least-squares"])
def test_other_gains_read_nothing_first(gain):
    def tiles():
        raise AssertionError

    assert prepare(Emr(gain), Inputs({}, [tiles])).rescalers == {}


@pytest.mark.parametrize("length", [7, 900])
def test_pieces_are_fitted_as_the_whole_is(length):
    vectors = task_vectors(1.0, 0.2, 3.0)
    fit = EmrFit(Emr())
    shared = fit.merge(tile(vectors))
    for start in range(0, 5000, 900):
        piece, part = tile(vectors, start, start + length), {"merged": shared["merged"][start : start + length]}
        assert same_bits(fit.merge(piece)["merged"], part["merged"])
        assert same_bits(
            fit.code(piece, 1, part).codes, fit.code(tile(vectors), 1, shared).codes[start : start + length]
        )
