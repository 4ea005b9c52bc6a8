"""Where a fit degenerates: under every method, what it cannot shape is the base's or comes back bit for bit."""

from __future__ import annotations

import pytest
import torch

from tallstore import (
    Emr,
    InputError,
    LeastSquares,
    NonFiniteError,
    Sign,
    SignedMask,
    TallMask,
    TooFewExpertsError,
    Uniform,
)
from tests import fit_reference
from tests.packing_cases import METHODS, SINGLE, assert_same, normal, pack
from tests.reference import same_bits

MERGED = [name for name in METHODS if name not in {"sign", "sign rows", "ternary", "uniform", "uniform tensors"}]
MASKED = [name for name in METHODS if name.startswith(("tall", "emr")) and name != "tall ties"]  # each has its own trim
SHAPE = (80, 64)
ORDINARY = 0.02
TOO_SMALL = "its task vector is too small for a scale"
NO_PART = "the fit has no part along its task vector"


def step(seed, scale=ORDINARY, shape=SHAPE):
    return normal(*shape, seed=seed, scale=scale)


def model():
    """A tensor for each way to degenerate, and two experts."""
    base = {
        name: normal(*SHAPE, seed=seed)
        for seed, name in enumerate(("ordinary", "zero", "zero rows", "equal", "constant", "alone", "tiny rows"))
    }
    base["opposite"], base["tiny"] = torch.zeros(SHAPE), torch.zeros(SHAPE)
    experts = {}
    for seed, task in enumerate("ab", start=1):
        expert = {name: tensor + step(100 * seed + place) for place, (name, tensor) in enumerate(base.items())}
        expert["zero"] = base["zero"].clone()
        expert["zero rows"][:20] = base["zero rows"][:20]
        expert["equal"] = base["equal"] + step(98)
        expert["opposite"] = step(99) if task == "a" else -step(99)
        expert["constant"] = base["constant"] + step(seed, shape=(80, 1))
        expert["tiny"] = step(seed, 1e-40)
        expert["tiny rows"][:20] = base["tiny rows"][:20] = 0.0
        expert["tiny rows"][:20] = step(seed, 1e-40, (20, 64))
        experts[task] = expert
    experts["b"]["alone"] = base["alone"].clone()
    return base, experts


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The model under a method, packed once, in its own dtype or in another."""
    base, experts = model()
    found = {}

    def of(name, dtype=None):
        if (name, dtype) not in found:
            root = tmp_path_factory.mktemp("packed") / "bundle"
            found[name, dtype] = pack(base, experts, root, method=METHODS[name], merged_dtype=dtype)
        return found[name, dtype]

    return of


BASE, EXPERTS = model()


def moved(packed, name, task="a"):
    """What came of a tensor, and what was due: cosine, gain, the largest difference in units of the task vector."""
    tau = fit_reference.task_vector(BASE[name], EXPERTS[task][name]).double()
    found = packed.states[task][name].double() - BASE[name].double()
    cosine, gain = fit_reference.cosine_and_gain([(found, tau)])
    return cosine, gain, ((found - tau).abs().amax() / tau.abs().amax()).item()


# --- tensors and rows that did not move -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_tensor_that_no_task_moved_costs_nothing(packed, name):
    for task in EXPERTS:
        assert packed(name).kinds(task)["zero"] == "same"
        assert_same(packed(name).states[task], BASE, "zero")


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_no_task_moved_are_the_bases(packed, name):
    """Bit for bit, but where one scale serves a whole tensor that has no level of 0."""
    for task in EXPERTS:
        rows = packed(name).states[task]["zero rows"][:20]
        if name in {"sign", "sign centred", "uniform tensors"}:
            assert (rows - BASE["zero rows"][:20]).abs().amax() < 2 * ORDINARY
        else:
            assert same_bits(rows, BASE["zero rows"][:20])


@pytest.mark.parametrize("name", METHODS)
def test_rows_too_small_for_a_scale_stay_nearly_where_they_were(packed, name):
    for task in EXPERTS:
        assert packed(name).kinds(task)["tiny rows"] != "private"
        rows = packed(name).states[task]["tiny rows"][:20]
        bound = 2 * ORDINARY if name in {"sign", "sign centred", "uniform tensors"} else 1e-38
        assert rows.abs().amax() < bound


@pytest.mark.parametrize("name", METHODS)
def test_a_task_vector_too_small_for_a_scale_is_whole(packed, name):
    """Of subnormal numbers."""
    for task in EXPERTS:
        assert packed(name).whole(task)["tiny"] == TOO_SMALL
        assert_same(packed(name).states[task], EXPERTS[task], "tiny")


# --- tasks that are alike, opposite, or alone -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["signed", "signed rows"])
def test_signed_masks_of_equal_tasks_keep_every_sign(packed, name):
    """None exceeds 1.2 times the mean of both. Four bits for a magnitude are off by 13 % at most."""
    found = packed(name)
    for task in EXPERTS:
        assert (found.codes(task, "equal") != 0).all()
        cosine, gain, largest = moved(found, "equal", task)
        assert cosine > 0.99
        assert gain == pytest.approx(1, abs=2.0**-12)
        assert largest < 0.2
    assert_same({"": found.states["a"]["equal"]}, {"": found.states["b"]["equal"]})


@pytest.mark.parametrize("name", ["signed", "signed rows", "least squares", "two levels", "tall normalised"])
def test_equal_tasks_are_exact_in_float32_but_for_their_scales(packed, name):
    found = packed(name, "float32")
    for task in EXPERTS:
        assert moved(found, "equal", task)[2] < 2.0**-12


@pytest.mark.parametrize("name", ["tall mean", "emr"])
def test_equal_tasks_are_exact_in_float32(packed, name):
    """The merged vector is theirs, or a half of two."""
    found = packed(name, "float32")
    for task, expert in EXPERTS.items():
        tau = fit_reference.task_vector(BASE["equal"], expert["equal"])
        assert same_bits(found.states[task]["equal"], BASE["equal"] + tau)


@pytest.mark.parametrize("mask_lambda", [0.0, 0.5, 0.99])
def test_the_sum_of_equal_tasks_is_exact(tmp_path, mask_lambda):
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=TallMask(mask_lambda), merged_dtype="float32")
    tau = fit_reference.task_vector(BASE["equal"], EXPERTS["a"]["equal"])
    assert packed.gains("a", "equal").item() == 0.5
    assert same_bits(packed.states["a"]["equal"], BASE["equal"] + tau)


def test_the_sum_of_equal_tasks_at_lambda_one_keeps_nothing(packed):
    """|tau| is not larger than |2 tau - tau|."""
    found = packed("tall", "float32")
    assert found.whole("a")["equal"] == NO_PART
    assert_same(found.states["a"], EXPERTS["a"], "equal")


@pytest.mark.parametrize("name", MASKED)
def test_opposite_tasks_leave_nothing_to_mask(packed, name):
    for task in EXPERTS:
        assert packed(name).whole(task)["opposite"] == NO_PART
        assert_same(packed(name).states[task], EXPERTS[task], "opposite")
    assert ("opposite", "merged") not in packed(name).files.group("g0001").vectors


@pytest.mark.parametrize("name", ["signed", "signed rows", "two levels"])
def test_opposite_tasks_share_a_magnitude_or_two_levels(packed, name):
    for task in EXPERTS:
        cosine, gain, _ = moved(packed(name), "opposite", task)
        assert cosine > 0.99
        assert gain == pytest.approx(1, abs=2.0**-12)


@pytest.mark.parametrize("name", ["sign centred", "uniform centred"])
def test_a_centre_of_opposite_tasks_is_nothing(packed, name):
    """Codes and gains are those without it."""
    plain = Sign() if name == "sign centred" else Uniform(16)
    for task in EXPERTS:
        cosine, gain, _ = moved(packed(name), "opposite", task)
        assert gain == pytest.approx(1, abs=2.0**-12)
        (due,) = fit_reference.formulas(plain, {"w": BASE["opposite"]}, {task: {"w": EXPERTS[task]["opposite"]}})[
            "w"
        ].values()
        expected, _ = fit_reference.cosine_and_gain([(due.sides, EXPERTS[task]["opposite"])])
        assert cosine == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_tensor_that_one_task_moved(packed, name):
    """The other's is the base's; its own shares with nobody."""
    found = packed(name)
    assert found.kinds("b")["alone"] == "same"
    assert_same(found.states["b"], BASE, "alone")
    if found.kinds("a")["alone"] == "private":
        assert name == "sign centred"  # the centre is the task vector, and what is left is its rounding
        assert_same(found.states["a"], EXPERTS["a"], "alone")
        return
    cosine, gain, _ = moved(found, "alone")
    if name in MERGED and name not in {"tall ties", "localize"}:
        assert cosine > 0.99
    if METHODS[name].parameters["gain"] == "one":
        assert gain == pytest.approx(1, abs=2.0**-12)


@pytest.mark.parametrize("name", ["signed rows", "sign rows", "ternary", "uniform", "uniform centred", "two levels"])
def test_rows_that_moved_by_one_number_come_back(packed, name):
    """A scale a row is all that they need."""
    for task in EXPERTS:
        assert moved(packed(name), "constant", task)[2] < 0.01


@pytest.mark.parametrize("name", METHODS)
def test_ordinary_tensors_beside_all_that_are_as_good_as_ever(packed, name):
    for task in EXPERTS:
        cosine, gain, _ = moved(packed(name), "ordinary", task)
        assert cosine > 0.7
        if METHODS[name].parameters["gain"] == "one":
            assert gain == pytest.approx(1, abs=2.0**-12)


# --- centres that leave little ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Sign(centre=True), Sign("row", centre=True), Uniform(16, centre=True)], ids=str)
def test_what_is_left_beside_a_centre_may_be_little(tmp_path, method):
    """A twentieth of the task vector: the gain makes up for a scale that was measured on all of it."""
    base = {"w": normal(*SHAPE)}
    experts = {
        task: {"w": base["w"] + step(50) + step(seed, ORDINARY / 20)} for seed, task in enumerate("abc", start=1)
    }
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    for task, expert in experts.items():
        tau = fit_reference.task_vector(base["w"], expert["w"])
        cosine, gain = fit_reference.cosine_and_gain([(packed.states[task]["w"] - base["w"], tau)])
        assert cosine > 0.999
        assert gain == pytest.approx(1, abs=2.0**-12)


@pytest.mark.parametrize("levels", [4, 8, 16])
@pytest.mark.parametrize("gain", ["one", "least-squares"])
def test_rows_that_a_centre_meets_are_not_left_behind(tmp_path, levels, gain):
    """A reader adds the centre only where something is added to it."""
    base = {"w": normal(*SHAPE)}
    experts = {task: {"w": base["w"] + step(seed)} for seed, task in enumerate("ab", start=1)}
    experts["b"]["w"][:40] = experts["a"]["w"][:40]
    method = Uniform(levels, gain=gain, centre=True)
    packed = pack(base, experts, tmp_path / "bundle", method=method, merged_dtype="float32")
    for task, expert in experts.items():
        found = packed.states[task]["w"]
        torch.testing.assert_close(found[:40], expert["w"][:40], rtol=0, atol=1e-6)
        if gain == "one":
            tau = fit_reference.task_vector(base["w"], expert["w"])
            assert fit_reference.cosine_and_gain([(found - base["w"], tau)])[1] == pytest.approx(1, abs=2.0**-12)


# --- thin masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [SignedMask(2.4), SignedMask(2.6, "row"), Uniform(3, "tensor", threshold=2.6), Uniform(3, threshold=2.6)],
    ids=str,
)
def test_thin_masks_stay_thin_under_large_gains(tmp_path, method):
    """What little they keep goes the whole way."""
    base = {"w": normal(200, 128)}
    experts = {task: {"w": base["w"] + step(seed, shape=(200, 128))} for seed, task in enumerate("abcd", start=1)}
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    for task, expert in experts.items():
        codes = packed.codes(task, "w")
        assert 0.002 < ((codes != 1) if method.name == "uniform" else (codes != 0)).double().mean() < 0.1
        found, tau = packed.states[task]["w"].double() - base["w"], fit_reference.task_vector(base["w"], expert["w"])
        cosine, gain = fit_reference.cosine_and_gain([(found, tau)])
        assert cosine**-2 > 6
        assert gain == pytest.approx(1, abs=2.0**-11)


def test_what_a_fit_cannot_go_along_is_whole_and_counts(tmp_path):
    """Nothing exceeds ten times the root mean square; a tensor that was asked for whole costs the method nothing."""
    base = {"w": normal(*SHAPE), "head": normal(*SHAPE, seed=1)}
    experts = {task: {name: tensor + step(seed) for name, tensor in base.items()} for seed, task in enumerate("ab")}
    packed = pack(base, experts, tmp_path / "b", method=Uniform(3, "tensor", threshold=10.0), private=["head"])
    for task in packed.report.tasks:
        assert [(stored.tensor, stored.degenerate) for stored in task.whole] == [("head", False), ("w", True)]
        assert 24 < task.bits < 34
        assert_same(packed.states[task.name], experts[task.name])


# --- few experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_one_expert(tmp_path, name):
    base, experts = {"w": normal(*SHAPE)}, {"a": {"w": normal(*SHAPE) + step(1)}}
    method = METHODS[name]
    if method.minimum_experts == 2:
        with pytest.raises(TooFewExpertsError, match=f"{method.name} merges experts and was given 1; give at least 2"):
            pack(base, experts, tmp_path / "bundle", method=method)
        return
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    if name in SINGLE:
        tau = fit_reference.task_vector(base["w"], experts["a"]["w"])
        cosine, gain = fit_reference.cosine_and_gain([(packed.states["a"]["w"] - base["w"], tau)])
        assert cosine > 0.6
        assert gain == pytest.approx(1, abs=1e-3) or method.parameters["gain"] != "one"
    elif packed.kinds("a")["w"] == "private":  # a centre is all of it
        assert_same(packed.states["a"], experts["a"])


# --- large numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e17, 1e30, 3e37], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_task_vectors_of_huge_norm_come_back_or_are_whole(tmp_path, name, size):
    """Beyond 2^60 there is no scale; a plain float32 vector needs none."""
    base = {"w": torch.zeros(SHAPE), "v": normal(*SHAPE, seed=1)}
    experts = {
        task: {"w": step(seed, size), "v": base["v"] + step(10 * seed)} for seed, task in enumerate("ab", start=1)
    }
    method = METHODS[name]
    for dtype in (None, "float32") if method.allowed_dtypes else (None,):
        packed = pack(base, experts, tmp_path / str(dtype), method=method, merged_dtype=dtype)
        for task, expert in experts.items():
            if packed.kinds(task)["w"] == "private":
                assert size > 1e17
                assert_same(packed.states[task], expert, "w")
            else:
                cosine, gain = fit_reference.cosine_and_gain([(packed.states[task]["w"], expert["w"])])
                assert cosine > 0.6
                assert gain == pytest.approx(1, abs=2.0**-11) or method.parameters["gain"] != "one"
    if size == 1e30 and isinstance(method, TallMask | Emr) and not getattr(method, "normalise", False):
        assert packed.kinds("a")["w"] == "mask"  # in float32, as it is


@pytest.mark.parametrize(
    ("method", "role"),
    [(TallMask(0.4), "merged"), (TallMask(merge="mean"), "merged"), (Sign(centre=True), "centre")],
    ids=str,
)
def test_a_sum_beyond_float32_is_refused_with_the_tensors_name(tmp_path, method, role):
    """Where it would be stored as it is; with steps it is beyond what the format holds, and whole."""
    base = {"w": torch.zeros(SHAPE), "v": normal(*SHAPE, seed=1)}
    experts = {
        task: {"w": torch.full(SHAPE, 3e38), "v": base["v"] + step(10 * seed)}
        for seed, task in enumerate("ab", start=1)
    }
    with pytest.raises(InputError, match=f"the {role} vector of tensor 'w': is beyond float32; .* private='w'"):
        pack(base, experts, tmp_path / "plain", method=method, merged_dtype="float32")
    packed = pack(base, experts, tmp_path / "steps", method=method)
    assert packed.kinds("a")["w"] == "private"
    assert_same(packed.states["a"], experts["a"], "w")
    packed = pack(base, experts, tmp_path / "asked", method=method, merged_dtype="float32", private="w")
    assert_same(packed.states["a"], experts["a"], "w")


# --- what is not finite, or would not be ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_is_refused_by_name(tmp_path, name, value):
    base = {"w": normal(*SHAPE), "v": normal(*SHAPE, seed=1)}
    experts = {task: {key: base[key] + step(seed) for key in base} for seed, task in enumerate("ab", start=1)}
    experts["b"]["w"][2, 5] = value
    with pytest.raises(NonFiniteError, match=r"expert 'b' .*: tensor 'w' has NaN or infinity \(element 133"):
        pack(base, experts, tmp_path / "bundle", method=METHODS[name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "method",
    [
        SignedMask(0),
        SignedMask(0, "row"),
        TallMask(0.0),
        TallMask(0.0, "mean"),
        LeastSquares(),
        Uniform(4),
        Uniform(16),
    ],
    ids=str,
)
def test_a_reconstruction_that_overflows_float16_is_whole(tmp_path, method):
    """Some weights of the experts are the largest float16s, and the fit would carry them beyond."""
    base = {"w": torch.full(SHAPE, 62000.0).half(), "v": normal(*SHAPE, seed=1).half()}
    experts = {}
    for seed, task in enumerate("abc", start=1):
        far = normal(*SHAPE, seed=seed) > 0.6
        w = 62000.0 + torch.where(far, 3504.0, 100.0) + step(30 + seed, 40.0)
        experts[task] = {"w": w.clamp(max=65504).half(), "v": base["v"] + step(10 * seed).half()}
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    for task, expert in experts.items():
        assert packed.whole(task) == {"w": "its reconstruction overflows F16"}
        assert_same(packed.states[task], expert, "w")
    assert {tensor for tensor, _ in packed.files.group("g0001").vectors} <= {"v"}
