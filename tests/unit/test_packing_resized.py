"""Resized vocabularies: rows that the base has are coded, rows that it does not have come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from tallstore import SignedMask, TallMask
from tests import fit_reference
from tests.packing_cases import assert_same, normal, pack, tuned
from tests.reference import same_bits

METHODS = [SignedMask(), TallMask(), TallMask.published()]


def moved(tensor, seed, scale=0.02):
    return tuned({"tensor": tensor}, seed, scale)["tensor"]


# --- resized vocabularies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=["signed", "tall", "published"])
def test_resized_vocabularies_are_extended(tmp_path, method):
    """Longer and shorter than the base, each another: leading rows are coded, further rows come back bit for bit."""
    base = {"embed": normal(100, 60), "bias": normal(5000, seed=1), "w": normal(80, 60, seed=2)}
    experts = {}
    for seed, (task, rows, length) in enumerate(
        [("a", 130, 6000), ("b", 90, 4500), ("c", 100, 5000), ("d", 101, 5001)]
    ):
        embed = torch.cat([moved(base["embed"], seed), normal(50, 60, seed=70 + seed)])[:rows]
        bias = torch.cat([moved(base["bias"], seed), normal(2000, seed=80 + seed)])[:length]
        experts[task] = {"embed": embed, "bias": bias, "w": moved(base["w"], seed)}
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    coded = packed.kinds("c")["embed"]
    assert packed.kinds("a") == {"bias": "extended", "embed": "extended", "w": coded}
    assert (packed.entry("a", "embed").rows, packed.entry("b", "embed").rows) == (100, 90)
    assert packed.entry("b", "embed").further is None
    assert packed.whole("a") == {
        "bias": "rows from 5000, which the base does not have",
        "embed": "rows from 100, which the base does not have",
    }
    for task, expert in experts.items():
        for name, rows in (("embed", 100), ("bias", 5000)):
            found = packed.states[task][name]
            assert found.shape == expert[name].shape
            assert same_bits(found[rows:], expert[name][rows:])
            both = min(rows, len(found))
            tau = fit_reference.task_vector(base[name][:both], expert[name][:both])
            cosine, gain = fit_reference.cosine_and_gain([(found[:both] - base[name][:both], tau)])
            assert cosine > 0.6
            if method.__class__ is SignedMask or method.gain == "one":
                assert gain == pytest.approx(1, abs=1e-3)


def test_resized_rows_are_shared_by_the_tasks_that_have_them(tmp_path):
    base = {"embed": normal(150, 40)}
    experts = {
        "short": {"embed": moved(base["embed"], 1)[:120]},
        "long": {"embed": torch.cat([moved(base["embed"], 2), normal(10, 40, seed=9)])},
        "middle": {"embed": moved(base["embed"], 3)[:130]},
    }
    packed = pack(base, experts, tmp_path / "bundle", merged_dtype="float32")
    vectors = {
        task: fit_reference.task_vector(base["embed"][: len(e["embed"])], e["embed"][:150])
        for task, e in experts.items()
    }
    merged = torch.zeros(150, 40)
    for first, last, sharers in (
        (0, 120, ("short", "long", "middle")),
        (120, 130, ("long", "middle")),
        (130, 150, ("long",)),
    ):
        units = [fit_reference.unit_magnitude(vectors[task])[first:last] for task in sharers]
        merged[first:last] = fit_reference.in_order(units) / len(units)
    codes, _ = packed.shared("embed")
    assert same_bits(codes, merged)
    for task, tau in vectors.items():
        sides = fit_reference.signed_sides(tau, merged[: len(tau)], 1.2)
        if task == "long":  # alone in its last rows, where every sign is kept
            sides[130:] = torch.sign(tau[130:]).to(torch.int8)
        assert same_bits(packed.sides(task, "embed"), sides)


def test_rows_of_the_base_that_every_expert_cut_off_stand_for_nothing(tmp_path):
    base = {"embed": normal(150, 40), "bias": normal(6000, seed=1)}
    experts = {
        task: {"embed": moved(base["embed"], seed)[:120], "bias": moved(base["bias"], seed)[:5000]}
        for seed, task in enumerate("ab", start=1)
    }
    for merged_dtype in ("log4", "int8", "float32"):
        method = TallMask() if merged_dtype == "int8" else SignedMask()
        packed = pack(base, experts, tmp_path / merged_dtype, method=method, merged_dtype=merged_dtype)
        codes, steps = packed.shared("embed")
        if steps is None:
            assert not codes[120:].any()
        else:
            assert not steps[120:].any()
            assert steps[:120].all()
        assert packed.states["a"]["embed"].shape == (120, 40)
        assert packed.states["a"]["bias"].shape == (5000,)


def test_a_vocabulary_that_was_only_resized_costs_its_new_rows(tmp_path):
    base = {"embed": normal(100, 60), "w": normal(80, 60, seed=2)}
    experts = {
        "a": {"embed": torch.cat([base["embed"], normal(3, 60, seed=9)]), "w": moved(base["w"], 1)},
        "b": {"embed": base["embed"][:90], "w": moved(base["w"], 2)},
    }
    packed = pack(base, experts, tmp_path / "bundle")
    for task, expert in experts.items():
        entry = packed.entry(task, "embed")
        assert (entry.__struct_config__.tag, entry.leading.__struct_config__.tag) == ("extended", "same")
        assert_same(packed.states[task], expert, "embed")
    assert packed.whole("b") == {}
    assert next(stored for stored in packed.report.tasks[0].whole).nbytes == 3 * 60 * 4


def test_a_resized_vocabulary_in_another_dtype(tmp_path):
    base = {"embed": normal(100, 60), "w": normal(80, 60, seed=2)}
    experts = {
        task: {name: torch.cat([moved(tensor, seed), tensor[:4]]).bfloat16() for name, tensor in base.items()}
        for seed, task in enumerate("ab", start=1)
    }
    packed = pack(base, experts, tmp_path / "bundle")
    for task, expert in experts.items():
        for name, rows in (("embed", 100), ("w", 80)):
            assert packed.states[task][name].dtype == torch.bfloat16
            assert same_bits(packed.states[task][name][rows:], expert[name][rows:])
