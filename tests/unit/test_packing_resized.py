"""Resized vocabularies: rows that the base has are coded, rows that it does not have come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from tallstore import SignedMask, TallMask
from tests import fit_reference
from tests.packing_cases import METHODS, assert_same, normal, pack, tuned
from tests.reference import same_bits

SELECTING = ["signed", "signed rows", "tall", "tall normalised", "tall mean", "emr", "least squares", "two levels"]


def moved(tensor, seed, scale=0.02):
    return tuned({"tensor": tensor}, seed, scale)["tensor"]


# --- resized vocabularies ---------------------------------------------------------------------------------------------


def vocabularies():
    """Longer and shorter than the base, each another; with whole rows, with short ones, and of one dimension."""
    base = {"embed": normal(100, 60), "wide": normal(100, 70, seed=3), "bias": normal(5000, seed=1)}
    base["w"] = normal(80, 60, seed=2)
    experts = {}
    for seed, (task, rows, length) in enumerate(
        [("a", 130, 6000), ("b", 90, 4500), ("c", 100, 5000), ("d", 101, 5001)]
    ):
        experts[task] = {
            name: torch.cat([moved(base[name], seed), normal(50, size, seed=70 + seed)])[:rows]
            for name, size in (("embed", 60), ("wide", 70))
        }
        experts[task]["bias"] = torch.cat([moved(base["bias"], seed), normal(2000, seed=80 + seed)])[:length]
        experts[task]["w"] = moved(base["w"], seed)
    return base, experts


@pytest.mark.parametrize("name", METHODS)
def test_resized_vocabularies_are_extended_under_every_kind(tmp_path, name):
    """Leading rows are coded, further rows come back bit for bit."""
    base, experts = vocabularies()
    method = METHODS[name]
    packed = pack(base, experts, tmp_path / "bundle", method=method)
    coded = packed.kinds("c")["embed"]
    for resized in ("embed", "wide", "bias"):
        assert packed.kinds("a")[resized] == packed.kinds("b")[resized] == "extended"
        assert packed.entry("a", resized).leading.__struct_config__.tag == coded
        assert packed.entry("b", resized).leading.__struct_config__.tag == coded
    assert packed.kinds("a")["w"] == coded
    assert (packed.entry("a", "embed").rows, packed.entry("b", "embed").rows) == (100, 90)
    assert packed.entry("b", "embed").further is None
    assert packed.whole("a") == {
        "bias": "rows from 5000, which the base does not have",
        "embed": "rows from 100, which the base does not have",
        "wide": "rows from 100, which the base does not have",
    }
    by_row = getattr(method, "scale", "tensor") == "row"
    assert [packed.gains(task, "wide").numel() for task in "abc"] == ([100, 90, 100] if by_row else [1, 1, 1])
    for task, expert in experts.items():
        for resized, rows in (("embed", 100), ("wide", 100), ("bias", 5000)):
            found = packed.states[task][resized]
            assert found.shape == expert[resized].shape
            assert same_bits(found[rows:], expert[resized][rows:])
            both = min(rows, len(found))
            tau = fit_reference.task_vector(base[resized][:both], expert[resized][:both])
            cosine, gain = fit_reference.cosine_and_gain([(found[:both] - base[resized][:both], tau)])
            assert cosine > 0.6
            if method.parameters["gain"] == "one":
                assert gain == pytest.approx(1, abs=2.0**-12)


@pytest.mark.parametrize("name", SELECTING)
def test_codes_of_resized_vocabularies_are_chosen_by_the_shared_vectors_as_stored(tmp_path, name):
    """Of the tasks that have a row; bit for bit."""
    base, experts = vocabularies()
    packed = pack(base, experts, tmp_path / "bundle", method=METHODS[name])
    for resized, row_length in (("wide", 70), ("bias", 1)):
        stored = packed.stored(resized)
        for task, expert in experts.items():
            both = min(len(base[resized]), len(expert[resized]))
            assert both * row_length >= 4096
            tau = fit_reference.task_vector(base[resized][:both], expert[resized][:both])
            shared = {role: vector[:both] for role, vector in stored.items()}
            due = fit_reference.codes_due(METHODS[name], tau, shared, alone=False)
            assert same_bits(packed.codes(task, resized), due), (task, resized)


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
        units = [fit_reference.at_unit(vectors[task]).abs()[first:last] for task in sharers]
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
