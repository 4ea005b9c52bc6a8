"""Options that no method has are refused in a line that names the method and the option, before anything is read."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

from tallstore import Emr, LeastSquares, Localize, OptionError, Sign, SignedMask, TallMask, Uniform
from tests.packing_cases import METHODS

NO_NUMBER = [-0.1, math.nan, math.inf, "1.2", None, [1.2], True]
NO_GAIN = ["two", "One", "", None, 1.0, True, ["one"]]
NO_SCALE = ["column", "rows", None, 0, True]
GIVEN = {"w": torch.zeros(2)}


def refused(method, message, **options):
    with pytest.raises(OptionError) as caught:
        method(**options)
    text = str(caught.value)
    assert text.startswith(f"{method.__name__}: ")
    assert re.search(message, text), text
    assert "\n" not in text


@pytest.mark.parametrize("gain", NO_GAIN, ids=repr)
@pytest.mark.parametrize("method", [SignedMask, TallMask, Emr, LeastSquares, Sign, Uniform, Localize])
def test_gains(method, gain):
    if method is Localize and gain is None:
        return  # by its masks
    refused(method, r"gain is .*; give one of 'one', 'least-squares', 'published'", gain=gain)


@pytest.mark.parametrize("scale", NO_SCALE, ids=repr)
@pytest.mark.parametrize("method", [SignedMask, LeastSquares, Sign, Uniform])
def test_scales(method, scale):
    refused(method, "scale is .*; give one of 'tensor', 'row'", scale=scale)


@pytest.mark.parametrize("levels", [0, 3, "2", None, True, 1.0, 2.0], ids=repr)
def test_levels_of_least_squares(levels):
    refused(LeastSquares, "levels is .*; give one of 1, 2", levels=levels)


@pytest.mark.parametrize("levels", [0, 2, 5, 32, "4", None, 4.0, np.int64(4)], ids=repr)
def test_levels_of_uniform(levels):
    """4.0 and a number of numpy would be written as no integer is written."""
    refused(Uniform, "levels is .*; give one of 3, 4, 8, 16", levels=levels)


@pytest.mark.parametrize("threshold", NO_NUMBER, ids=repr)
def test_the_threshold_of_signed_masks(threshold):
    refused(SignedMask, r"threshold is .*; give a number from 0, such as 1\.2", threshold=threshold)


@pytest.mark.parametrize("threshold", [value for value in NO_NUMBER if value is not None], ids=repr)
def test_the_threshold_of_three_levels(threshold):
    refused(Uniform, "threshold is .*; give a number from 0", levels=3, threshold=threshold)


def test_a_threshold_of_other_levels():
    refused(Uniform, "threshold goes with levels=3", levels=4, threshold=1.0)


def test_a_centre_of_the_published_signs():
    refused(Sign, "published form has no centre", centre=True, gain="published")
    refused(Uniform, "where a level is not 0", levels=3, centre=True)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.001, 2, math.nan, math.inf, "0.1", None, True, [0.1]], ids=repr)
def test_densities(density):
    refused(Localize, "density is .*; give a share above 0 and at most 1", density=density)


@pytest.mark.parametrize("dtype", ["F16", "float64", torch.float16, None], ids=repr)
def test_the_dtype_of_values(dtype):
    refused(Localize, "values_dtype is .*; give one of 'float16', 'bfloat16', 'float32'", values_dtype=dtype)


@pytest.mark.parametrize("mask_lambda", [*NO_NUMBER[:4], None, (), (0.4, -1), "0.4", (0.4, None), {}], ids=repr)
def test_mask_lambdas(mask_lambda):
    refused(TallMask, "mask_lambda is .*; give a number from 0", mask_lambda=mask_lambda)


@pytest.mark.parametrize("merge", [3, None, ("sum",), 1.0], ids=repr)
def test_merges_that_are_no_name_and_no_checkpoint(merge):
    refused(TallMask, "merge is .*; give one of 'sum', 'ties', 'mean', or a merged checkpoint", merge=merge)


@pytest.mark.parametrize("merge", [GIVEN, "merged.safetensors"], ids=["state", "path"])
def test_normalising_what_somebody_else_merged(merge):
    refused(TallMask, "normalise goes with merge='sum', 'ties' or 'mean'", merge=merge, normalise=True)


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), 0.5, 1, 0], ids=repr)
def test_numbers_of_every_sort_are_taken_and_recorded_as_plain_ones(number):
    for method, name in (
        (SignedMask(number), "threshold"),
        (TallMask(number), "mask_lambda"),
        (Uniform(3, threshold=number), "threshold"),
    ):
        recorded = method.parameters[name]
        assert type(recorded) is float
        assert recorded == number


def test_a_density_of_every_sort():
    assert Localize(np.float32(0.5)).parameters["density"] == 0.5
    assert type(Localize(1).parameters["density"]) is float


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_recorded_but_for_tensors(name):
    method = METHODS[name]
    recorded = method.parameters
    assert json.loads(json.dumps(recorded)) == recorded
    options = {field.name for field in dataclasses.fields(method)} - {"values_dtype"}
    assert set(recorded) == options
    for option in options - {"masks", "mask_lambda"}:
        given = getattr(method, option)
        assert recorded[option] == given or (given is None and option == "gain")


def test_the_gain_that_serves_the_masks_of_localize_best():
    assert Localize().parameters["gain"] == "one"
    assert Localize(masks={}).parameters["gain"] == "published"
    for gain in ("one", "least-squares", "published"):
        assert Localize(gain=gain).parameters["gain"] == Localize(masks={}, gain=gain).parameters["gain"] == gain


def test_tensors_that_were_given_are_not_recorded():
    assert TallMask(merge=GIVEN).parameters["merge"] == "checkpoint"
    assert Localize(masks={"a": {}}).parameters == {"masks": "given", "gain": "published"}


def test_candidates_are_sorted():
    method = TallMask((0.6, 0.2, 0.4))
    assert method.lambdas == (0.2, 0.4, 0.6)
    assert method.parameters["mask_lambda"] == [0.2, 0.4, 0.6]
    assert TallMask(np.array([0.5, 0.25])).parameters["mask_lambda"] == [0.25, 0.5]


def test_published_is_the_papers_own():
    assert TallMask.published() == TallMask(mask_lambda=0.4, merge="ties", gain="published")
