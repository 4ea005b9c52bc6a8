"""Every sort of tensor that checkpoints have comes back right, and takes the kind that costs least."""

from __future__ import annotations

import json

import pytest
import torch

from tallstore import SignedMask, TallMask
from tests import fit_reference
from tests.packing_cases import assert_same, base_model, experts_of, normal, pack, tuned
from tests.reference import same_bits

METHODS = [SignedMask(), TallMask(), TallMask.published()]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


def moved(tensor, seed, scale=0.02):
    return tuned({"tensor": tensor}, seed, scale)["tensor"]


# --- tensors that equal the base's ------------------------------------------------------------------------------------


def test_a_tensor_that_equals_the_bases_costs_nothing(tmp_path):
    base = base_model()
    experts = experts_of(base)
    experts["b"] = {name: tensor.clone() for name, tensor in base.items()}
    packed = pack(base, experts, tmp_path / "bundle")
    assert set(packed.kinds("b").values()) == {"same"}
    assert sorted(path.name for path in (tmp_path / "bundle/tasks/b").iterdir()) == ["task.json"]
    assert packed.whole("b") == {}
    assert_same(packed.states["b"], base)
    assert (packed.tables["b"].fidelity.cosine, packed.tables["b"].fidelity.gain) == (None, None)
    assert "nothing coded" in str(packed.report)


def test_where_no_expert_moved_anything_there_is_no_shared_vector(tmp_path):
    base = base_model()
    packed = pack(base, {"a": dict(base), "b": dict(base)}, tmp_path / "bundle")
    assert packed.group.vectors == ()
    assert packed.group.shards == ()
    assert_same(packed.states["a"], base)


@pytest.mark.parametrize("method", METHODS, ids=["signed", "tall", "published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_infinities_and_nan_that_equal_the_bases_are_no_hindrance(tmp_path, dtype, method):
    """The causal masks of some models: -inf, in tensors large enough to be coded."""
    mask = torch.full((1, 1, 70, 70), -torch.inf, dtype=dtype).triu(1)
    odd = normal(5000).to(dtype)
    odd[7] = torch.nan
    base = {"attention.bias": mask, "odd": odd, "w": normal(80, 60).to(dtype)}
    experts = {name: {**base, "w": moved(base["w"], seed)} for seed, name in enumerate("ab", start=1)}
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    for task, expert in experts.items():
        assert packed.kinds(task) == {"attention.bias": "same", "odd": "same", "w": packed.kinds("a")["w"]}
        assert_same(packed.states[task], expert, "attention.bias", "odd")


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tensor_that_is_the_bases_in_another_dtype_costs_nothing(tmp_path, base_dtype, dtype):
    base = {"w": normal(5000).to(base_dtype), "v": normal(80, 60, seed=1).to(base_dtype)}
    experts = {
        "a": {"w": base["w"].to(dtype), "v": moved(base["v"], 1)},
        "b": {"w": base["w"], "v": moved(base["v"], 2)},
    }
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.kinds("a")["w"] == "same"
    assert packed.entry("a", "w").dtype == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert_same(packed.states["a"], experts["a"], "w")


def test_what_only_a_double_rounding_makes_equal_is_not_the_same(tmp_path):
    """torch takes float64 to 16 bits by way of float32, which rounds twice; a reader rounds once."""
    base = {"w": normal(5000).double(), "v": normal(80, 60, seed=1).double()}
    base["w"][5] = 1 + 2.0**-8 + 2.0**-40  # above the middle of two bfloat16, and the middle itself as float32
    twice = base["w"].to(torch.bfloat16)
    assert not same_bits(twice, fit_reference.cast(base["w"], torch.bfloat16))
    experts = {name: {"w": twice, "v": moved(base["v"], seed)} for seed, name in enumerate("ab")}
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.kinds("a")["w"] != "same"
    assert (packed.states["a"]["w"].double() - twice.double()).abs().max() < 2**-7


# --- what is not coded ------------------------------------------------------------------------------------------------


def test_integers_bools_and_other_dtypes_come_back(tmp_path):
    base = {str(dtype): torch.arange(5000).to(dtype) for dtype in INTEGERS}
    base["bool"] = torch.arange(5000) % 3 == 0
    base["float8"] = normal(5000).to(torch.float8_e4m3fn)
    base["float8 too"] = normal(5000).to(torch.float8_e5m2)
    base["complex"] = torch.complex(normal(5000), normal(5000, seed=1))
    base["w"] = normal(80, 60)
    experts = {}
    for seed, task in enumerate("ab", start=1):
        experts[task] = {name: tensor.roll(seed) for name, tensor in base.items()} | {"w": moved(base["w"], seed)}
    experts["b"]["bool"], experts["b"]["complex"] = base["bool"], base["complex"]
    packed = pack(base, experts, tmp_path / "bundle")
    assert set(packed.kinds("a").values()) == {"private", "signed"}
    assert (packed.kinds("b")["bool"], packed.kinds("b")["complex"]) == ("same", "same")
    assert packed.whole("a")["torch.int64"] == "I64 is not coded"
    for task, expert in experts.items():
        assert_same(packed.states[task], expert, *(base.keys() - {"w"}))


def test_a_tensor_whose_dtype_became_another_sort_is_whole(tmp_path):
    base = {"w": normal(80, 60), "ids": torch.arange(5000)}
    experts = {
        "a": {"w": moved(base["w"], 1), "ids": torch.arange(5000).float()},
        "b": {"w": moved(base["w"], 2), "ids": torch.arange(5000, dtype=torch.int32)},
    }
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.whole("a") == {"ids": "I64 is not coded"}
    assert packed.whole("b") == {"ids": "I32 is not coded"}
    for task, expert in experts.items():
        assert_same(packed.states[task], expert, "ids")


def test_0_d_empty_and_small_tensors_come_back(tmp_path):
    base = base_model()
    experts = experts_of(base)
    experts["a"]["nothing"] = torch.empty(0, 5)
    experts["b"]["nothing"] = torch.empty(0, 3, dtype=torch.int32)
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.whole("a")["temperature"] == "fewer than 4,096 elements"
    assert packed.kinds("c")["nothing"] == "same"
    assert (packed.kinds("a")["nothing"], packed.kinds("b")["nothing"]) == ("private", "private")
    for task, expert in experts.items():
        assert_same(packed.states[task], expert, "temperature", "nothing", "head.bias", "is_trained", "position_ids")


def test_nan_and_infinity_in_small_and_private_tensors_come_back_bit_for_bit(tmp_path):
    base = base_model()
    experts = experts_of(base)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1.0, 2.0, 3.0])
    odd.view(torch.int32)[0] = 0x7FC12345
    experts["a"]["head.bias"] = odd
    experts["b"]["norm.weight"][3] = torch.nan
    for method in METHODS:
        packed = pack(base, experts, tmp_path / str(method)[:40], method=method, private=["norm.*"])
        assert_same(packed.states["a"], experts["a"], "head.bias", "norm.weight")
        assert_same(packed.states["b"], experts["b"], "norm.weight")
        assert packed.whole("b")["norm.weight"] == "asked for by private="


def test_non_contiguous_tensors_are_packed_as_their_contiguous_copies(tmp_path):
    base, plain = base_model(), experts_of(base_model())
    strided = {
        task: {
            name: torch.stack([tensor, tensor], -1)[..., 0] if tensor.ndim == 1 else tensor.mT.contiguous().mT
            for name, tensor in expert.items()
            if tensor.ndim
        }
        for task, expert in plain.items()
    }
    contiguous = {
        task: {name: tensor.contiguous() for name, tensor in expert.items()} for task, expert in strided.items()
    }
    assert not strided["a"]["block.weight"].is_contiguous()
    first, second = pack(base, strided, tmp_path / "first"), pack(base, contiguous, tmp_path / "second")
    for task in plain:
        assert_same(first.states[task], second.states[task])


# --- tensors that only some have --------------------------------------------------------------------------------------


def test_heads_and_tensors_of_one_expert_are_whole_and_lacking_ones_dropped(tmp_path):
    base = base_model() | {"mlm.weight": normal(90, 50, seed=9)}
    experts = experts_of(base)
    del experts["a"]["mlm.weight"]
    experts["a"]["classifier.weight"] = normal(5, 1000, seed=10)
    experts["a"]["classifier.ids"] = torch.arange(5)
    del experts["b"]["norm.weight"], experts["b"]["nothing"]
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.kinds("a")["mlm.weight"] == "dropped"
    assert packed.whole("a")["classifier.weight"] == "the base does not have it"
    assert [name for name, kind in packed.kinds("b").items() if kind == "dropped"] == ["norm.weight", "nothing"]
    for task, expert in experts.items():
        assert sorted(packed.states[task]) == sorted(expert)
    assert_same(packed.states["a"], experts["a"], "classifier.weight", "classifier.ids")


def test_a_head_of_the_same_name_and_another_shape_is_whole(tmp_path):
    base = base_model() | {"classifier.weight": normal(10, 600, seed=9)}
    experts = experts_of(base)
    experts["a"]["classifier.weight"] = normal(600, 10, seed=10)
    experts["b"]["classifier.weight"] = normal(52, 600, seed=11)  # more rows, of which the first are not the base's
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.whole("a")["classifier.weight"] == "its shape is not the base's [10, 600]"
    assert packed.whole("b")["classifier.weight"] == "its rows are not a resizing of the base's"
    for task in "ab":
        assert_same(packed.states[task], experts[task], "classifier.weight")


# --- tensors that one expert, or few, moved ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SignedMask(), TallMask()], ids=["signed", "tall"])
def test_a_tensor_that_one_expert_moved_is_coded_for_it_and_same_for_the_others(tmp_path, method):
    base = base_model()
    experts = experts_of(base)
    for task in "bc":
        experts[task]["embed.weight"] = base["embed.weight"].clone()
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    assert packed.kinds("a")["embed.weight"] in {"signed", "mask"}
    assert (packed.kinds("b")["embed.weight"], packed.kinds("c")["embed.weight"]) == ("same", "same")
    pair = (
        packed.states["a"]["embed.weight"] - base["embed.weight"],
        fit_reference.task_vector(base["embed.weight"], experts["a"]["embed.weight"]),
    )
    cosine, gain = fit_reference.cosine_and_gain([pair])
    assert cosine > 0.98
    assert gain == pytest.approx(1, abs=3e-4)
    assert_same(packed.states["b"], experts["b"], "embed.weight")


def test_experts_that_are_equal_come_back_equal(tmp_path):
    base = base_model()
    experts = experts_of(base, 2)
    experts["twin"] = {name: tensor.clone() for name, tensor in experts["a"].items()}
    packed = pack(base, experts, tmp_path / "bundle")
    assert_same(packed.states["twin"], packed.states["a"])


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_private_patterns_are_globs_of_whole_names_case_and_all(tmp_path):
    base = base_model()
    experts = experts_of(base)
    packed = pack(base, experts, tmp_path / "bundle", private=["block.*", "EMBED.weight", "norm"])
    kinds = packed.kinds("a")
    assert (kinds["block.kernel"], kinds["block.weight"]) == ("private", "private")
    assert (kinds["embed.weight"], kinds["norm.weight"]) == ("signed", "signed")
    assert packed.whole("a")["block.kernel"] == "asked for by private="
    assert_same(packed.states["a"], experts["a"], "block.kernel", "block.weight")


def test_one_pattern_may_be_given_as_text(tmp_path):
    base = base_model()
    packed = pack(base, experts_of(base), tmp_path / "bundle", private="*.weight")
    assert packed.kinds("a")["block.weight"] == "private"
    assert packed.kinds("a")["block.kernel"] == "signed"


# --- compression ------------------------------------------------------------------------------------------------------


def codecs_of(packed):
    """How every payload, and every pool, of every table of a bundle is stored."""
    found = set()

    def look(value):
        if isinstance(value, dict):
            found.update({value["codec"]} if "codec" in value else ())
            value = list(value.values())
        for item in value if isinstance(value, list) else ():
            look(item)

    for path in [*packed.root.glob("groups/*/group.json"), *packed.root.glob("tasks/*/task.json")]:
        look(json.loads(path.read_bytes()))
    return found


@pytest.mark.parametrize("method", METHODS, ids=["signed", "tall", "published"])
def test_without_compression_every_payload_is_raw_and_weights_are_the_same(tmp_path, method):
    base = base_model() | {"counts": torch.zeros(3000, 3, dtype=torch.int64), "embed.large": normal(500, 20, seed=8)}
    experts = experts_of(base)
    for seed, expert in enumerate(experts.values()):
        expert["counts"][seed] = seed + 1  # whole, and not pooled
        expert["embed.large"] = moved(torch.cat([base["embed.large"], normal(400, 20)]), seed + 1)  # further rows
        expert["zeros"] = torch.zeros(700)  # pooled, and the pool is worth compressing
    small = pack(base, experts, tmp_path / "small", method=method)
    raw = pack(base, experts, tmp_path / "raw", method=method, compress=False)
    assert codecs_of(small) >= {"zstd", "planes-zstd", "pooled"}
    assert codecs_of(raw) == {"raw", "pooled"}
    assert raw.report.bundle_nbytes > small.report.bundle_nbytes
    for task in experts:
        assert raw.kinds(task) == small.kinds(task)
        assert_same(raw.states[task], small.states[task])
