"""Numbers at the ends of their range: what would overflow or vanish is stored whole, and zeros keep their sign."""

from __future__ import annotations

import pytest
import torch

from tallstore import SignedMask, TallMask
from tests import fit_reference
from tests.packing_cases import assert_same, normal, pack, tuned


def moved(tensor, seed, scale=0.02):
    return tuned({"tensor": tensor}, seed, scale)["tensor"]


# --- numbers at the ends of their range -------------------------------------------------------------------------------


def test_a_reconstruction_that_overflows_float16_is_whole(tmp_path):
    base = {"w": torch.full((80, 60), 65504.0).half(), "v": normal(80, 60, seed=1).half()}
    experts = {}
    for seed, task in enumerate("ab", start=1):
        tensor = (base["w"].float() - normal(80, 60, seed=seed).abs() * 200).half()
        tensor[0, 0] = 65504.0
        experts[task] = {"w": tensor, "v": moved(base["v"], seed)}
    packed = pack(base, experts, tmp_path / "down", method=SignedMask(0))
    assert packed.kinds("a")["w"] == "signed"
    for expert in experts.values():
        expert["w"] = (torch.full((80, 60), 60000.0) + normal(80, 60, seed=5).abs() * 2600).clamp(max=65504).half()
    base["w"] = torch.full((80, 60), 60000.0).half()
    packed = pack(base, experts, tmp_path / "up", method=SignedMask(0))
    assert packed.whole("a") == {"w": "its reconstruction overflows F16"}
    assert_same(packed.states["a"], experts["a"], "w")


def test_where_all_that_was_coded_overflows_the_bundle_is_sound(tmp_path):
    base = {"w": torch.full((80, 60), 65000.0).half()}
    experts = {
        task: {"w": (base["w"].float() + normal(80, 60, seed=seed).abs() * 200).clamp(max=65504).half()}
        for seed, task in enumerate("ab", start=1)
    }
    packed = pack(base, experts, tmp_path / "bundle", method=SignedMask(0))
    assert packed.whole("a") == {"w": "its reconstruction overflows F16"}
    assert_same(packed.states["a"], experts["a"])
    assert packed.group.vectors == ()


@pytest.mark.parametrize("exponent", [-62, -75, -100, -130])
def test_a_task_vector_too_small_for_a_scale_is_whole(tmp_path, exponent):
    base = {"w": torch.zeros(80, 60), "v": normal(80, 60, seed=1)}
    experts = {
        task: {"w": normal(80, 60, seed=seed) * 2.0**exponent, "v": moved(base["v"], seed)}
        for seed, task in enumerate("ab", start=1)
    }
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.whole("a") == {"w": "its task vector is too small for a scale"}
    assert_same(packed.states["a"], experts["a"], "w")


@pytest.mark.parametrize("method", [SignedMask(), TallMask()], ids=["signed", "tall"])
@pytest.mark.parametrize("exponent", [-58, -50, 40, 58, 62, 100])
def test_task_vectors_at_the_ends_of_the_range_come_back(tmp_path, exponent, method):
    base = {"w": torch.zeros(80, 60), "v": normal(80, 60, seed=1)}
    experts = {
        task: {"w": normal(80, 60, seed=seed) * 2.0**exponent, "v": moved(base["v"], seed)}
        for seed, task in enumerate("ab", start=1)
    }
    for merged_dtype in (None, "float32"):
        packed = pack(base, experts, tmp_path / str(merged_dtype), method=method, merged_dtype=merged_dtype)
        if packed.kinds("a")["w"] == "private":
            assert_same(packed.states["a"], experts["a"], "w")
        else:
            cosine, gain = fit_reference.cosine_and_gain([(packed.states["a"]["w"], experts["a"]["w"])])
            assert cosine > 0.6
            assert gain == pytest.approx(1, abs=0.05)


def test_a_zero_that_only_changed_its_sign_comes_back(tmp_path):
    base = {"w": torch.zeros(80, 60), "v": normal(80, 60, seed=1)}
    experts = {task: {"w": -base["w"], "v": moved(base["v"], seed)} for seed, task in enumerate("ab", start=1)}
    packed = pack(base, experts, tmp_path / "bundle")
    assert_same(packed.states["a"], experts["a"], "w")


def test_where_base_and_expert_agree_in_an_element_the_expert_has_the_bases_bits(tmp_path):
    """-0.0 stays -0.0: an absent side is the base, bit for bit."""
    base = {"w": normal(80, 60)}
    base["w"][:40] = -0.0
    experts = {task: {"w": base["w"].clone()} for task in "ab"}
    for seed, expert in enumerate(experts.values(), start=1):
        expert["w"][40:] += normal(40, 60, seed=seed, scale=0.02)
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.kinds("a")["w"] == "signed"
    assert_same({"w": packed.states["a"]["w"][:40]}, {"w": base["w"][:40]})


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e300), (torch.float32, 3e38), (torch.bfloat16, 3e38)])
def test_a_task_vector_beyond_float32_is_whole(tmp_path, dtype, value):
    base = {"w": torch.full((80, 60), value, dtype=dtype), "v": normal(80, 60, seed=1)}
    experts = {task: {"w": -base["w"], "v": moved(base["v"], seed)} for seed, task in enumerate("ab", start=1)}
    for method in (SignedMask(), TallMask.published()):
        packed = pack(base, experts, tmp_path / method.name, method=method)
        assert packed.whole("a") == {"w": "its task vector is beyond float32"}
        assert_same(packed.states["a"], experts["a"], "w")
