"""Packed experts are those of the dense formula, bit for bit: merged vectors, masks, steps, and rebuilt weights."""

from __future__ import annotations

import pytest
import torch

from tallstore import SignedMask, TallMask
from tests import fit_reference
from tests.packing_cases import base_model, experts_of, normal, pack
from tests.reference import r13, same_bits

CODED = {"block.kernel", "block.weight", "embed.weight", "norm.weight"}
SHARED_DTYPES = {"log4": "LOG4", "int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def check(packed, base, experts, fitted, *, gain=None):
    """Everything that was stored of coded tensors, and every expert, is what the reference says."""
    assert set(fitted) == CODED
    for name, (shared, vectors, all_sides) in fitted.items():
        codes, steps = packed.shared(name)
        assert same_bits(codes, shared.codes), name
        assert (steps is None) == (shared.steps is None)
        assert steps is None or same_bits(steps, shared.steps), name
        for task, sides in all_sides.items():
            assert same_bits(packed.sides(task, name), sides), (task, name)
            entry = packed.entry(task, name)
            if gain is None:
                due = fit_reference.gain_of("one", vectors[task], sides * shared.values)
                assert entry.gain == pytest.approx(due, rel=2**-13)
                assert entry.gain == r13(entry.gain)
            else:
                assert entry.gain == gain
            dtype = experts[task][name].dtype
            expected = fit_reference.expert(base[name], shared, sides, entry.gain, dtype)
            assert same_bits(packed.states[task][name], expected), (task, name)
    for task, expert in experts.items():
        assert sorted(packed.states[task]) == sorted(expert)
        for name in expert.keys() - CODED:
            assert same_bits(packed.states[task][name], expert[name]), (task, name)


# --- methods and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged_dtype", [None, "int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("threshold", [0.0, 1.2])
def test_signed_masks_are_the_formulas(tmp_path, threshold, merged_dtype):
    base = base_model()
    experts = experts_of(base)
    packed = pack(base, experts, tmp_path / "bundle", method=SignedMask(threshold), merged_dtype=merged_dtype)
    dtype = SHARED_DTYPES[merged_dtype or "log4"]
    check(packed, base, experts, fit_reference.fit_signed(base, experts, dtype, threshold))


@pytest.mark.parametrize("merged_dtype", [None, "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("merge", ["sum", "mean", "ties"])
def test_tall_masks_are_the_formulas(tmp_path, merge, merged_dtype):
    base = base_model()
    experts = experts_of(base)
    method = TallMask(0.8, merge)
    packed = pack(base, experts, tmp_path / "bundle", method=method, merged_dtype=merged_dtype)
    lambdas = dict.fromkeys(experts, 0.8)
    fitted = fit_reference.fit_tall(base, experts, SHARED_DTYPES[merged_dtype or "int8"], merge, lambdas)
    check(packed, base, experts, fitted)


def test_the_published_method_has_gain_one_point_zero(tmp_path):
    base = base_model()
    experts = experts_of(base)
    packed = pack(base, experts, tmp_path / "bundle", method=TallMask.published())
    fitted = fit_reference.fit_tall(base, experts, "I8", "ties", dict.fromkeys(experts, 0.4))
    check(packed, base, experts, fitted, gain=1.0)
    recorded = {"mask_lambda": 0.4, "merge": "ties", "gain": "published", "normalise": False}
    assert packed.group.method.parameters == recorded


@pytest.mark.parametrize(
    "method", [SignedMask(), TallMask(), TallMask.published()], ids=["signed", "tall", "published"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_bases_of_every_dtype(tmp_path, dtype, method):
    base = base_model(dtype)
    experts = experts_of(base)
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    if isinstance(method, SignedMask):
        fitted = fit_reference.fit_signed(base, experts, "LOG4", 1.2)
    else:
        lambdas = dict.fromkeys(experts, method.mask_lambda)
        fitted = fit_reference.fit_tall(base, experts, "I8", method.merge, lambdas)
    check(packed, base, experts, fitted, gain=1.0 if method == TallMask.published() else None)


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_experts_whose_dtype_is_not_the_bases(tmp_path, base_dtype):
    """The result has the expert's own dtype, rounded once to it."""
    base = base_model(base_dtype)
    experts = experts_of(base, 4)
    dtypes = {"a": torch.float16, "b": torch.bfloat16, "c": torch.float32, "d": torch.float64}
    for task, dtype in dtypes.items():
        experts[task] = {name: t.to(dtype) if t.is_floating_point() else t for name, t in experts[task].items()}
    packed = pack(base, experts, tmp_path / "bundle")
    check(packed, base, experts, fit_reference.fit_signed(base, experts, "LOG4", 1.2))


def test_the_trim_is_over_all_parameters_but_the_private_ones(tmp_path):
    """Small tensors, which are not coded, and tensors that equal the base's count."""
    base = base_model()
    experts = experts_of(base)
    experts["b"]["norm.weight"] = base["norm.weight"].clone()
    packed = pack(base, experts, tmp_path / "bundle", method=TallMask.published(), private="embed.*")
    without = {name: tensor for name, tensor in base.items() if not name.startswith("embed.")}
    fitted = fit_reference.fit_tall(without, experts, "I8", "ties", dict.fromkeys(experts, 0.4))
    for name, (shared, _, all_sides) in fitted.items():
        assert same_bits(packed.shared(name)[0], shared.codes)
        for task, sides in all_sides.items():
            assert same_bits(packed.sides(task, name), sides)


# --- gain -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SignedMask(), TallMask(), TallMask(0.6, "ties"), TallMask(merge="mean")], ids=str)
def test_gain_one_is_one_after_packing_for_every_tensor(tmp_path, method):
    base = base_model()
    experts = experts_of(base, 4)
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    for task, expert in experts.items():
        for name in CODED:
            pair = (packed.states[task][name] - base[name], fit_reference.task_vector(base[name], expert[name]))
            _, gain = fit_reference.cosine_and_gain([pair])
            assert gain == pytest.approx(1, abs=3e-4)


def test_a_mean_over_many_tasks_is_scaled_back_and_not_taken_for_degenerate(tmp_path):
    base = {"w": normal(70, 64)}
    experts = {f"task {seed}": {"w": base["w"] + normal(70, 64, seed=seed, scale=0.02)} for seed in range(1, 21)}
    packed = pack(base, experts, tmp_path / "bundle", method=TallMask(merge="mean"))
    assert {packed.kinds(task)["w"] for task in experts} == {"mask"}
    assert packed.entry("task 3", "w").gain > 8


# --- mask_lambda ------------------------------------------------------------------------------------------------------


def test_evaluate_chooses_mask_lambda_a_task_and_the_smaller_on_a_tie(tmp_path):
    base = base_model()
    experts = experts_of(base)
    wanted = {"a": 1.0, "b": 0.4, "c": 0.2}  # c scores the same everywhere
    seen = []

    def evaluate(task, state):
        density = (state["embed.weight"] != base["embed.weight"]).float().mean().item()
        seen.append((task, density))
        fitted = fit_reference.fit_tall(base, experts, "I8", "sum", dict.fromkeys(experts, wanted[task]))
        exact = (fitted["embed.weight"].sides[task] != 0).float().mean().item()
        return 1.0 if task == "c" else -abs(density - exact)

    packed = pack(base, experts, tmp_path / "bundle", method=TallMask((1.0, 0.2, 0.4)), evaluate=evaluate)
    assert [task for task, _ in seen] == ["a", "b", "c"] * 3
    check(packed, base, experts, fit_reference.fit_tall(base, experts, "I8", "sum", wanted))
    assert {task.name: task.mask_lambda for task in packed.report.tasks} == wanted
    assert {name: table.chosen for name, table in packed.tables.items()} == {
        name: {"mask_lambda": value} for name, value in wanted.items()
    }
    assert packed.group.method.parameters["mask_lambda"] == [0.2, 0.4, 1.0]
    assert packed.tables["c"].fidelity.score == 1.0


def test_evaluate_sees_weights_as_a_reader_gets_them(tmp_path):
    base = base_model()
    experts = experts_of(base)
    seen = {}

    def evaluate(task, state):
        seen[task] = state
        return 0.5

    packed = pack(base, experts, tmp_path / "bundle", evaluate=evaluate)
    for task, state in seen.items():
        assert sorted(state) == sorted(packed.states[task])
        for name, tensor in state.items():
            assert same_bits(tensor, packed.states[task][name])
    assert [task.score for task in packed.report.tasks] == [0.5, 0.5, 0.5]
    assert {table.fidelity.score for table in packed.tables.values()} == {0.5}
