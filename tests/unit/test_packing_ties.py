"""Tied weights: stored once, under the name that the base has, and tied again when they are read."""

from __future__ import annotations

import pytest
import torch

from tests.packing_cases import assert_same, base_model, experts_of, pack, tuned
from tests.reference import same_bits

# --- ties -------------------------------------------------------------------------------------------------------------


def tied(state, name, of):
    return {**state, name: state[of]}


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    base = tied(base_model(), "lm_head.weight", "embed.weight")
    experts = {
        task: tied(expert, "lm_head.weight", "embed.weight") for task, expert in experts_of(base_model()).items()
    }
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.kinds("a")["lm_head.weight"] == "alias"
    state = packed.states["a"]
    assert state["lm_head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert [tensor.alias_of for tensor in packed.files.base.values() if tensor.alias_of] == ["embed.weight"]
    assert packed.manifest.tasks[0].parameters == sum(
        tensor.numel() for tensor in experts_of(base_model())["a"].values()
    )


def test_a_tie_is_carried_by_the_name_that_the_base_has(tmp_path):
    """A directory keeps one of two tied names, and not always the first: GPT-2's has no lm_head.weight."""
    base = base_model()
    experts = {task: tied(expert, "a_head.weight", "embed.weight") for task, expert in experts_of(base).items()}
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.kinds("a")["embed.weight"] == "signed"
    assert (packed.kinds("a")["a_head.weight"], packed.entry("a", "a_head.weight").of) == ("alias", "embed.weight")
    assert "a_head.weight" not in packed.whole("a")
    assert same_bits(packed.states["a"]["a_head.weight"], packed.states["a"]["embed.weight"])


@pytest.mark.parametrize("name", ["embed.weight", "a_head.weight"])
def test_experts_that_have_one_name_of_a_tie_of_the_base(tmp_path, name):
    """Whichever name it is, and nothing is dropped: the tensor is there."""
    plain = base_model()
    base = tied(plain, "a_head.weight", "embed.weight")
    experts = experts_of(plain)
    for expert in experts.values():
        expert[name] = expert.pop("embed.weight")
    packed = pack(base, experts, tmp_path / "bundle")
    for task, expert in experts.items():
        assert "dropped" not in packed.kinds(task).values()
        assert packed.kinds(task)[name] == "signed"
        assert sorted(packed.states[task]) == sorted(expert)


def test_experts_that_untied_what_the_base_ties(tmp_path):
    base = tied(base_model(), "lm_head.weight", "embed.weight")
    experts = {}
    for seed, task in enumerate("ab", start=1):
        experts[task] = tuned(base, seed)
    experts["c"] = tied(tuned(base_model(), 3), "lm_head.weight", "embed.weight")
    packed = pack(base, experts, tmp_path / "bundle")
    assert packed.kinds("a")["lm_head.weight"] == "signed"
    assert packed.kinds("c")["lm_head.weight"] == "alias"
    assert not torch.equal(packed.states["a"]["lm_head.weight"], packed.states["a"]["embed.weight"])


def test_a_tie_and_the_base_that_was_embedded(tmp_path):
    base = tied(base_model(), "a_head.weight", "embed.weight")
    experts = {task: tied(expert, "a_head.weight", "embed.weight") for task, expert in experts_of(base_model()).items()}
    apart, inside = pack(base, experts, tmp_path / "apart"), pack(base, experts, tmp_path / "inside", embed_base=True)
    for task in experts:
        assert_same(inside.states[task], apart.states[task])
