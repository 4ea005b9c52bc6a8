"""Under every method: shapes of every sort, what is coded as what, and what stays whole."""

from __future__ import annotations

import pytest
import torch

from tests import fit_reference
from tests.packing_cases import METHODS, assert_same, base_model, experts_of, normal, pack, tuned

KINDS = {
    "signed": "signed",
    "tall": "mask",
    "emr": "mask",
    "least": "mask",
    "two": "two-level",
    "sign": "sign",
    "ternary": "uniform",
    "uniform": "uniform",
    "localize": "sparse",
}
ROLES = {"two levels": {"merged", "merged_lo"}} | {
    name: {"centre"} if name.endswith("centred") else set()
    for name in METHODS
    if name.startswith(("sign ", "ternary", "uniform", "localize")) or name == "sign"
}
CODED = ("block.kernel", "block.weight", "embed.weight", "norm.weight")


@pytest.fixture(scope="module")
def model():
    """One of every sort of tensor, and shapes that no limit of streaming or of bytes divides."""
    return base_model() | {
        "conv.long": normal(2, 2, 37, 31, seed=11),
        "one row": normal(1, 4999, seed=12),
        "one column": normal(4999, 1, seed=13),
        "shortest rows with a scale": normal(65, 64, seed=14),
        "longest rows without": normal(67, 63, seed=15),
        "deep": normal(*[1] * 13, 17, 1, 257, seed=16),
        "smallest": normal(4096, seed=17),
        "too small": normal(4095, seed=18),
        "no rows": torch.empty(0, 100),
        "no columns": torch.empty(100, 0),
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_shape_comes_back(tmp_path, model, name):
    experts = experts_of(model)
    method = METHODS[name]
    packed = pack(model, experts, tmp_path / "bundle", method=method)
    kind = KINDS[name.split()[0]]
    roles = ROLES.get(name, {"merged"})
    small = {key for key, tensor in model.items() if tensor.numel() < 4096 or not tensor.is_floating_point()}
    for task, expert in experts.items():
        state = packed.states[task]
        assert sorted(state) == sorted(expert)
        assert_same(state, expert, *small)
        for key in model.keys() - small:
            assert packed.kinds(task)[key] == kind, packed.whole(task)
            assert (state[key].dtype, state[key].shape) == (expert[key].dtype, expert[key].shape)
            tau = fit_reference.task_vector(model[key], expert[key])
            _, gain = fit_reference.cosine_and_gain([(state[key] - model[key], tau)])
            if method.parameters["gain"] == "one":
                assert gain == pytest.approx(1, abs=2.0**-12)
            assert set(packed.stored(key)) == roles
            rows = packed.entry(task, key).row_axes
            assert rows == (0 if key in {"one column", "longest rows without", "embed.weight"} else 1)
    assert {packed.whole(task).get("too small") for task in experts} == {"fewer than 4,096 elements"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_experts_of_another_dtype_over_a_float32_base(tmp_path, name, dtype):
    """The result has the expert's dtype; what is whole has its bits."""
    base = base_model()
    experts = {task: tuned(base, seed, 0.05) for seed, task in enumerate("ab", start=1)}
    for task, expert in experts.items():
        experts[task] = {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in expert.items()
        }
    packed = pack(base, experts, tmp_path / "bundle", method=METHODS[name])
    for task, expert in experts.items():
        state = packed.states[task]
        assert_same(state, expert, *(expert.keys() - set(CODED)))
        for key in CODED:
            assert packed.kinds(task)[key] not in {"private", "same"}
            assert state[key].dtype == dtype
            tau = fit_reference.task_vector(base[key], expert[key])
            cosine, gain = fit_reference.cosine_and_gain([(state[key].double() - base[key].double(), tau)])
            assert cosine > 0.6
            assert gain == pytest.approx(1, abs=1e-2) or METHODS[name].parameters["gain"] != "one"


@pytest.mark.parametrize("name", METHODS)
def test_tensors_that_only_some_experts_have(tmp_path, name):
    base = base_model()
    experts = experts_of(base)
    del experts["a"]["block.kernel"], experts["b"]["block.kernel"], experts["c"]["embed.weight"]
    experts["b"]["classifier.weight"] = normal(5, 1000, seed=10)
    packed = pack(base, experts, tmp_path / "bundle", method=METHODS[name], private="norm.*")
    for task, expert in experts.items():
        assert sorted(packed.states[task]) == sorted(expert)
        assert packed.whole(task)["norm.weight"] == "asked for by private="
        assert_same(packed.states[task], expert, "norm.weight")
    assert_same(packed.states["b"], experts["b"], "classifier.weight")
    assert packed.kinds("a")["block.kernel"] == packed.kinds("c")["embed.weight"] == "dropped"
    assert not packed.stored("norm.weight")


def test_what_keeps_nothing_is_the_base_and_is_not_stored_whole(tmp_path):
    """A thin mask has no bit in many tensors: the method leaves them at the base."""
    base = {"w": normal(80, 64), "v": normal(80, 64, seed=1)}
    experts = {
        task: {
            "w": base["w"] + normal(80, 64, seed=seed, scale=0.02),
            "v": base["v"] + normal(80, 64, seed=seed, scale=1e-5),
        }
        for seed, task in enumerate("ab", start=2)
    }
    packed = pack(base, experts, tmp_path / "bundle", method=METHODS["localize"])
    for task in experts:
        assert packed.whole(task) == {}
        entry = packed.entry(task, "v")
        assert (entry.count, entry.values) == (0, None)
        assert_same(packed.states[task], base, "v")
