"""TallMask over what somebody else merged: any sort of checkpoint, and what it lacks or gets wrong."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tallstore import CheckpointNotFoundError, InputError, NonFiniteError, TallMask
from tests import fit_reference
from tests.packing_cases import assert_same, base_model, contents, experts_of, pack
from tests.reference import same_bits

BASE = base_model()
EXPERTS = experts_of(BASE)
CODED = ("block.kernel", "block.weight", "embed.weight", "norm.weight")
LACKING = "the merged model does not have it"


def merged_model(dtype=torch.float32):
    """Six tenths of the sum: a merge that no name stands for."""
    moved = {
        name: tensor + 0.6 * sum(expert[name] - tensor for expert in EXPERTS.values())
        for name, tensor in BASE.items()
        if tensor.is_floating_point()
    }
    return {name: tensor.to(dtype) for name, tensor in moved.items()}


def given(merge, mask_lambda=0.5, gain="one"):
    return TallMask(mask_lambda, merge, gain)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files of the bundle that a state dict gives."""
    root = tmp_path_factory.mktemp("expected") / "bundle"
    pack(BASE, EXPERTS, root, method=given(merged_model()))
    return contents(root)


# --- sorts of checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", ["file", "text", "directory", "pickle"])
def test_any_sort_of_checkpoint(tmp_path, expected, sort):
    model = merged_model()
    if sort == "directory":
        path = tmp_path / "merged"
        path.mkdir()
        save_file(model, path / "model.safetensors")
    elif sort == "pickle":
        path = tmp_path / "merged.pt"
        torch.save(model, path)
    else:
        path = tmp_path / "merged.safetensors"
        save_file(model, path)
    pack(BASE, EXPERTS, tmp_path / "bundle", method=given(str(path) if sort == "text" else path))
    assert contents(tmp_path / "bundle") == expected


@pytest.mark.parametrize("merged_dtype", [None, "float32"])
def test_its_difference_to_the_base_is_the_merged_vector(tmp_path, merged_dtype):
    model = merged_model()
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=given(model), merged_dtype=merged_dtype)
    for name in CODED:
        tau = fit_reference.task_vector(BASE[name], model[name])
        shared = fit_reference.store(tau, "I8" if merged_dtype is None else "F32")
        codes, _ = packed.shared(name)
        assert same_bits(codes, shared.codes)
        for task, expert in EXPERTS.items():
            vector = fit_reference.task_vector(BASE[name], expert[name])
            assert same_bits(packed.sides(task, name), fit_reference.tall_sides(vector, shared.values, 0.5))


def test_a_bfloat16_model_over_a_float32_base(tmp_path):
    """Its differences to the base are those of what it holds."""
    model = merged_model(torch.bfloat16)
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=given(model), merged_dtype="float32")
    for name in CODED:
        codes, _ = packed.shared(name)
        assert same_bits(codes, fit_reference.store(model[name].float() - BASE[name], "F32").codes)
    assert packed.kinds("a")["embed.weight"] == "mask"


def test_one_expert_will_do(tmp_path):
    """It merges nothing itself."""
    packed = pack(BASE, {"a": EXPERTS["a"]}, tmp_path / "bundle", method=given(merged_model()))
    assert {packed.kinds("a")[name] for name in CODED} == {"mask"}


def test_a_merge_that_is_an_expert_gives_it_back(tmp_path):
    """At gain one point zero, and where another expert moved otherwise it does not matter."""
    packed = pack(
        BASE, EXPERTS, tmp_path / "bundle", method=given(EXPERTS["a"], gain="published"), merged_dtype="float32"
    )
    for name in CODED:
        tau = fit_reference.task_vector(BASE[name], EXPERTS["a"][name])
        assert same_bits(packed.states["a"][name], BASE[name] + tau)


def test_the_tensors_are_neither_recorded_nor_printed(tmp_path):
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=given(merged_model()))
    recorded = {"mask_lambda": 0.5, "merge": "checkpoint", "gain": "one", "normalise": False}
    assert packed.group.method.parameters == recorded
    shown = "TallMask(mask_lambda=0.5, merge='checkpoint', gain='one', normalise=False)"
    assert packed.report.method == shown
    assert shown in str(packed.report)


# --- what it lacks ----------------------------------------------------------------------------------------------------


def test_tensors_that_it_lacks_or_has_otherwise_are_whole(tmp_path):
    model = merged_model()
    del model["block.kernel"]
    model["block.weight"] = model["block.weight"].T.contiguous()
    model["norm.weight"] = model["norm.weight"].to(torch.int32)
    model["head of its own"] = torch.ones(3)
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=given(model))
    for task, expert in EXPERTS.items():
        whole = packed.whole(task)
        assert {name for name in CODED if whole.get(name) == LACKING} == {"block.kernel", "block.weight", "norm.weight"}
        assert packed.kinds(task)["embed.weight"] == "mask"
        assert_same(packed.states[task], expert, "block.kernel", "block.weight", "norm.weight")
    assert {tensor for tensor, _ in packed.files.group("g0001").vectors} == {"embed.weight"}


def test_a_tensor_that_it_lacks_and_nobody_moved_is_the_same(tmp_path):
    model = merged_model()
    del model["block.kernel"]
    experts = {task: {**expert, "block.kernel": BASE["block.kernel"]} for task, expert in EXPERTS.items()}
    packed = pack(BASE, experts, tmp_path / "bundle", method=given(model))
    assert packed.kinds("a")["block.kernel"] == "same"


def test_a_tensor_that_it_left_at_the_base_has_nothing_to_mask(tmp_path):
    model = merged_model() | {"embed.weight": BASE["embed.weight"]}
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=given(model))
    assert packed.whole("a")["embed.weight"] == "the fit has no part along its task vector"
    assert_same(packed.states["a"], EXPERTS["a"], "embed.weight")


@pytest.mark.parametrize(
    "model",
    [{"other": torch.ones(3)}, {"embed.weight": torch.ones(20, 300)}, {"position_ids": torch.arange(12)}],
    ids=["names", "shapes", "integers"],
)
def test_a_model_with_nothing_in_common_is_refused(tmp_path, model):
    with pytest.raises(InputError, match=r"^merge \(a state dict\): has no tensor of the base, by name and shape"):
        pack(BASE, EXPERTS, tmp_path / "bundle", method=given(model))
    assert list(tmp_path.iterdir()) == []


# --- what is wrong with it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max", "Sum", "tie", "no/such/path", "./merged.safetensors"])
def test_a_name_that_is_neither_a_merge_nor_a_path(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        pack(BASE, EXPERTS, tmp_path / "bundle", method=given(name))
    message = str(caught.value)
    assert message.startswith("merge (")
    assert message.endswith("(merge takes 'sum', 'ties' or 'mean', or a merged checkpoint)")
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_there_has_the_error_of_one(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="merge "):
        pack(BASE, EXPERTS, tmp_path / "bundle", method=given(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("merged_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_it_is_refused_by_name(tmp_path, value, merged_dtype):
    model = merged_model()
    model["embed.weight"][2, 5] = value
    with pytest.raises(NonFiniteError) as caught:
        pack(BASE, EXPERTS, tmp_path / "bundle", method=given(model), merged_dtype=merged_dtype)
    message = str(caught.value)
    assert message.startswith("merge (a state dict): tensor 'embed.weight' has NaN or infinity")
    assert "element 45" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_in_it_and_not_needed_does_not_matter(tmp_path):
    """The experts' tensors are private, or the base's."""
    model = merged_model()
    for name in ("embed.weight", "norm.weight"):
        model[name].view(-1)[5] = torch.nan
    experts = {task: {**expert, "norm.weight": BASE["norm.weight"]} for task, expert in EXPERTS.items()}
    packed = pack(BASE, experts, tmp_path / "bundle", method=given(model), private="embed.*")
    assert packed.kinds("a")["block.weight"] == "mask"


def test_resized_experts_over_a_merged_model(tmp_path):
    """The model has the base's shape, the experts have theirs."""
    experts = {
        "longer": {**EXPERTS["a"], "embed.weight": torch.cat([EXPERTS["a"]["embed.weight"], torch.ones(5, 20)])},
        "shorter": {**EXPERTS["b"], "embed.weight": EXPERTS["b"]["embed.weight"][:250]},
    }
    packed = pack(BASE, experts, tmp_path / "bundle", method=given(merged_model()))
    for task, rows in (("longer", 300), ("shorter", 250)):
        assert packed.kinds(task)["embed.weight"] == "extended"
        tau = fit_reference.task_vector(BASE["embed.weight"][:rows], experts[task]["embed.weight"][:rows])
        stored = packed.stored("embed.weight")["merged"][:rows]
        assert same_bits(packed.sides(task, "embed.weight"), fit_reference.tall_sides(tau, stored, 0.5))
