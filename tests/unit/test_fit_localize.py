"""Localize on tiles: the largest moves over all tensors of a task together, or those of given masks; their values."""

from __future__ import annotations

import pytest
import torch

from tallstore import Localize, OptionError
from tallstore.fit import Inputs, prepare
from tests import fit_reference
from tests.fit_cases import prepared, rebuilt, task_vectors, tile

ROWS = 50


@pytest.mark.parametrize("values_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_the_largest_moves_are_kept_with_their_values(density, values_dtype):
    """What is beyond the share, and what is at its end."""
    vectors = task_vectors(1.0, 0.02)
    fit = prepared(Localize(density, values_dtype=values_dtype), vectors)
    kept = [vector.abs() >= fit_reference.threshold_of([vector], density) for vector in vectors]
    for position, formula in enumerate(fit_reference.localize(vectors, kept, values_dtype)):
        coded = fit.code(tile(vectors), position, {})
        assert coded.codes.sum().item() == len(coded.values) == min(5000, int(5000 * density) + 1)
        assert torch.equal(rebuilt(fit, coded, {}), formula.sides)


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1.0, 1e12])
def test_values_of_float32_are_the_task_vector_itself(scale):
    (vector,) = task_vectors(scale)
    fit = prepared(Localize(0.5, values_dtype="float32"), [vector])
    coded = fit.code(tile([vector]), 0, {})
    assert torch.equal(rebuilt(fit, coded, {})[coded.codes > 0], vector[coded.codes > 0].double())


@pytest.mark.parametrize(("values_dtype", "digits"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_small_moves_keep_their_digits(values_dtype, digits):
    """Of a tensor that moved by 1e-10: float16 alone would take it for 0."""
    (vector,) = task_vectors(1e-10)
    fit = prepared(Localize(1.0, values_dtype=values_dtype), [vector])
    found = rebuilt(fit, fit.code(tile([vector]), 0, {}), {})
    normal = vector.abs() > 1e-3 * vector.abs().amax()
    torch.testing.assert_close(found[normal], vector[normal].double(), rtol=digits, atol=0)


def test_equals_of_the_threshold_stay():
    vector = torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0, 0.5, 0.1, 0.0, -0.2, 0.3])
    assert prepared(Localize(0.2), [vector]).code(tile([vector]), 0, {}).codes.tolist() == [1, 1, 1, 1, *[0] * 6]


def test_what_did_not_move_is_never_kept():
    vector = torch.tensor([3.0, 0.0, -0.0, 0.0])
    for density in (0.5, 1.0):
        coded = prepared(Localize(density), [vector]).code(tile([vector]), 0, {})
        assert coded.codes.tolist() == [1, 0, 0, 0]
        assert len(coded.values) == 1


@pytest.mark.parametrize("values_dtype", ["float16", "bfloat16", "float32"])
def test_a_value_too_small_for_its_dtype_is_zero_of_one_sign(values_dtype):
    (vector,) = task_vectors(1.0)
    vector[:4] = torch.tensor([1e-9, -1e-9, 1e-30, -1e-30])
    values = prepared(Localize(1.0, values_dtype=values_dtype), [vector]).code(tile([vector]), 0, {}).values[:4]
    assert not (values.signbit() & (values == 0)).any()
    assert (values != 0).tolist() == [values_dtype != "float16"] * 2 + [False] * 2


def test_a_density_below_one_parameter_keeps_the_largest():
    (vector,) = task_vectors(1.0)
    coded = prepared(Localize(1e-9), [vector]).code(tile([vector]), 0, {})
    assert torch.nonzero(coded.codes).view(-1).tolist() == [vector.abs().argmax().item()]


def test_the_share_is_of_all_tensors_together():
    large, small = task_vectors(1.0, 0.01)
    fit = prepare(Localize(0.3), Inputs({"a": lambda: iter([large, small])}))
    kept = [fit.code(tile([vector]), 0, {}).codes.sum().item() for vector in (large, small)]
    assert kept == [3001, 0]


# --- given masks ------------------------------------------------------------------------------------------------------


def given(mask, **others):
    return prepare(Localize(masks={"a": {"w": mask}, **others}), Inputs({}))


@pytest.mark.parametrize("length", [100, 1000, 30])
def test_a_given_mask_is_taken_wherever_tiles_are_cut(length):
    (vector,) = task_vectors(1.0)
    mask = torch.rand(ROWS, 100, generator=torch.Generator().manual_seed(3)) < 0.1
    fit = given(mask)
    for start in (0, 1000, 3000):
        codes = fit.code(tile([vector], start, start + length, rows=ROWS), 0, {}).codes
        assert torch.equal(codes.bool(), mask.view(-1)[start : start + length])


def test_a_mask_keeps_nothing_that_did_not_move():
    (vector,) = task_vectors(1.0)
    vector[::2] = 0.0
    codes = given(torch.ones(1, 5000, dtype=torch.bool)).code(tile([vector]), 0, {}).codes
    assert torch.equal(codes.bool(), vector != 0)


def test_a_tensor_without_a_mask_keeps_nothing():
    (vector,) = task_vectors(1.0)
    coded = prepare(Localize(masks={"a": {}}), Inputs({})).code(tile([vector]), 0, {})
    assert not coded.codes.any()
    assert coded.values.numel() == 0


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(ROWS, 100),
        torch.ones(ROWS, 100, dtype=torch.uint8),
        torch.ones(100, ROWS, dtype=torch.bool),
        torch.ones(ROWS, 101, dtype=torch.bool),
        torch.ones(5000, dtype=torch.bool),
        torch.ones(ROWS - 1, 100, dtype=torch.bool),
    ],
    ids=["float", "uint8", "turned", "longer", "flat", "shorter"],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(mask):
    (vector,) = task_vectors(1.0)
    with pytest.raises(OptionError, match=r"Localize: the mask of task 'a' for 'w' is .* give bool"):
        given(mask).code(tile([vector], rows=ROWS), 0, {})


def test_a_task_without_masks_is_refused_by_name():
    vectors = task_vectors(1.0, 1.0)
    with pytest.raises(OptionError, match="Localize: masks has none for task 'b'"):
        given(torch.ones(1, 5000, dtype=torch.bool)).code(tile(vectors), 1, {})


def test_given_masks_need_no_pass_over_the_task_vectors():
    def stream():
        raise AssertionError

    assert prepare(Localize(masks={"a": {}}), Inputs({"a": stream})).thresholds == {}
