"""The report: sizes are those on disk, fidelity is that of the loaded weights, reasons and advice are what they say."""

from __future__ import annotations

import json

import pytest
import torch

import tallstore
from tallstore import LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform
from tallstore.sizes import readable
from tests import fit_reference
from tests.packing_cases import METHODS, base_model, experts_of, forced, normal, pack, tuned

CODED = ("block.kernel", "block.weight", "embed.weight", "norm.weight")


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def nbytes(state):
    return sum(tensor.nbytes for tensor in state.values())


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"embed_base": True}, {"evaluate": lambda *_: 0.123456789}], ids=" ".join)
def test_sizes_are_those_of_the_files(tmp_path, options):
    base = base_model()
    experts = experts_of(base)
    report = pack(base, experts, tmp_path / "bundle", **options).report
    assert report.bundle_nbytes == size(tmp_path / "bundle")
    assert report.shared_nbytes == size(tmp_path / "bundle/groups")
    assert {task.name: task.nbytes for task in report.tasks} == {
        task: size(tmp_path / "bundle/tasks" / task) for task in experts
    }
    assert report.base_nbytes == nbytes(base)
    assert {task.name: task.checkpoint_nbytes for task in report.tasks} == {
        task: nbytes(expert) for task, expert in experts.items()
    }
    assert report.checkpoints_nbytes == sum(map(nbytes, experts.values()))


def test_bits_are_what_a_coded_parameter_costs_its_share_included(tmp_path):
    base = {"w": normal(200, 300)}
    experts = {task: tuned(base, seed) for seed, task in enumerate("abcd", start=1)}
    packed = pack(base, experts, tmp_path / "bundle")
    for task in packed.report.tasks:
        assert task.coded_numel == 60_000
        files = task.nbytes + packed.report.shared_nbytes / 4
        assert task.bits == pytest.approx(8 * files / 60_000, rel=0.1)  # task.json, headers and indexes aside
        assert 1.8 < task.bits < 2.4


def test_whole_tensors_are_listed_with_their_reasons_and_cost(tmp_path):
    base = base_model()
    experts = experts_of(base)
    experts["a"] |= {"classifier.weight": torch.zeros(100, 100), "embed.weight": normal(310, 20, seed=7)}
    experts["a"]["embed.weight"][:300] = base["embed.weight"]
    report = pack(base, experts, tmp_path / "bundle", private="block.kernel").report
    found = {stored.tensor: (stored.reason, stored.nbytes) for stored in report.tasks[0].whole}
    assert found.keys() == {"block.kernel", "classifier.weight", "embed.weight", "head.bias", "temperature"}
    assert found["head.bias"] == ("fewer than 4,096 elements", 7 * 4)
    assert found["embed.weight"] == ("rows from 300, which the base does not have", 10 * 20 * 4)
    assert found["classifier.weight"][0] == "the base does not have it"
    assert 0 < found["classifier.weight"][1] < 1000  # zstd saw that it is all zero
    assert found["block.kernel"][0] == "asked for by private="
    assert 0.8 < found["block.kernel"][1] / base["block.kernel"].nbytes <= 1


# --- fidelity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "expert_dtype"),
    [
        *((name, torch.float32, torch.float32) for name in METHODS),
        *((name, torch.float64, torch.bfloat16) for name in METHODS),
        *((name, dtype, dtype) for name in ("signed", "uniform centred") for dtype in (torch.bfloat16, torch.float16)),
        *(("two levels", torch.float32, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        *(("sign centred", torch.bfloat16, dtype) for dtype in (torch.float16, torch.float32, torch.float64)),
    ],
    ids=str,
)
def test_cosine_and_gain_are_those_of_the_weights_that_a_reader_gets(tmp_path, name, dtype, expert_dtype):
    """After the final rounding, over every coded tensor together."""
    base = base_model(dtype)
    experts = {
        task: {key: tensor.to(expert_dtype) if tensor.is_floating_point() else tensor for key, tensor in expert.items()}
        for task, expert in experts_of(base).items()
    }
    packed = pack(base, experts, tmp_path / "bundle", method=METHODS[name])
    for task, expert in experts.items():
        assert not {"private", "same"} & {packed.kinds(task)[key] for key in CODED}
        assert {packed.states[task][key].dtype for key in CODED} == {expert_dtype}
        pairs = [
            (
                packed.states[task][key].double() - base[key].double(),
                fit_reference.task_vector(base[key], expert[key]),
            )
            for key in CODED
        ]
        cosine, gain = fit_reference.cosine_and_gain(pairs)
        reported = next(found for found in packed.report.tasks if found.name == task)
        assert reported.cosine == pytest.approx(cosine, rel=6e-6)
        assert reported.gain == pytest.approx(gain, rel=6e-6)
        fidelity, entry = packed.tables[task].fidelity, packed.files.entry(task)
        assert (fidelity.cosine, fidelity.gain) == (entry.cosine, entry.gain) == (reported.cosine, reported.gain)


@pytest.mark.parametrize("tile", [None, 900])
def test_estimates_are_near_what_those_fits_reach(tmp_path, tile, monkeypatch):
    """Whatever the number of tiles: each tensor counts by its size."""
    base = {"w": normal(300, 100), "v": normal(70, 90, seed=1)}
    experts = {task: tuned(base, seed) for seed, task in enumerate("abc", start=1)}
    for expert in experts.values():  # heavy tails in one of them: the two tensors are not alike
        expert["v"] = base["v"] + (expert["v"] - base["v"]) ** 3 * 1e3
    if tile is not None:
        forced(monkeypatch, tile=tile, smallest_tile=tile)
    tall = pack(base, experts, tmp_path / "tall", method=TallMask())
    signed = pack(base, experts, tmp_path / "signed")
    for task, reached in zip(tall.report.tasks, signed.report.tasks, strict=True):
        assert task.estimates["signed"].cosine == pytest.approx(reached.cosine, abs=0.02)
        assert task.estimates["signed"].bits == pytest.approx(reached.bits, rel=0.12)
        taus = [fit_reference.task_vector(base[name], experts[task.name][name]) for name in base]
        reconstructions = [torch.where(tau < 0, -1.0, 1.0) * ((tau**2).sum() / tau.abs().sum()) for tau in taus]
        cosine, _ = fit_reference.cosine_and_gain(list(zip(reconstructions, taus, strict=True)))
        assert task.estimates["sign"].cosine == pytest.approx(cosine, rel=1e-5)
        assert task.estimates["sign"].bits == 1.0
        assert tall.tables[task.name].fidelity.estimates == task.estimates
    assert set(signed.report.tasks[0].estimates) == {"sign"}


def test_a_task_of_which_nothing_is_coded_has_no_fidelity(tmp_path):
    base = base_model()
    experts = experts_of(base)
    packed = pack(base, experts | {"same": base}, tmp_path / "bundle")
    same = packed.report.tasks[-1]
    assert (same.cosine, same.gain, same.bits, same.coded_numel) == (None, None, None, 0)
    assert same.estimates == {}


# --- advice, and the report as text and JSON --------------------------------------------------------------------------


def test_advice_where_another_fit_would_be_smaller_and_truer(tmp_path):
    """Of few weights that move far, masks over a sum keep more than signs do, and signed masks more still."""
    base = {"w": normal(300, 100)}
    experts = {str(seed): {"w": base["w"] + normal(300, 100, seed=seed) ** 3} for seed in range(1, 5)}
    tall = pack(base, experts, tmp_path / "tall", method=TallMask()).report
    (line,) = tall.advice
    assert line.startswith("SignedMask() would be smaller and truer here: about ")
    assert str(tall).splitlines()[-1] == line
    signed = pack(base, experts, tmp_path / "signed").report
    assert signed.advice == ()
    assert signed.bundle_nbytes < tall.bundle_nbytes
    assert signed.tasks[0].cosine > tall.tasks[0].cosine


def test_no_advice_where_the_chosen_fit_is_as_good(tmp_path):
    """One direction that all share: the sum is what every task needs."""
    base = {"w": normal(300, 100)}
    step = normal(300, 100, seed=1, scale=0.02)
    experts = {str(seed): {"w": base["w"] + step * (1 + seed / 10)} for seed in range(1, 5)}
    assert pack(base, experts, tmp_path / "bundle", method=TallMask()).report.advice == ()


def test_advice_where_little_is_left_of_a_task(tmp_path):
    """The least true task is named, and a method by its estimate; none where the fit is true."""
    base = {"w": normal(300, 100)}
    experts = {str(seed): tuned(base, seed) for seed in range(1, 5)}
    report = pack(base, experts, tmp_path / "thin", method=Localize(density=0.01)).report
    worst = min(report.tasks, key=lambda task: task.cosine)
    assert max(task.cosine for task in report.tasks) < 0.5
    (line,) = report.advice
    estimate = max(worst.estimates.values(), key=lambda estimate: estimate.cosine)
    assert line.startswith(
        f"task {worst.name!r} (and 3 more): at cosine {worst.cosine:.2f} predictions probably change; "
    )
    assert line.endswith(f"would reach about {estimate.cosine:.2f} at {estimate.bits:.2f} bits a parameter")
    for method in (SignedMask(), Uniform(levels=3), Sign(), LeastSquares(levels=2)):
        told = pack(base, experts, tmp_path / type(method).__name__, method=method).report.advice
        assert not any("predictions" in line for line in told)


def test_the_report_is_json_and_a_few_lines(tmp_path):
    base = base_model()
    report = tallstore.pack(base, experts_of(base), tmp_path / "bundle", method=TallMask(), merged_dtype="bfloat16")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["path"] == str(tmp_path / "bundle")
    assert plain["merged_dtype"] == "BF16"
    assert plain["method"] == "TallMask(mask_lambda=1.0, merge='sum', gain='one', normalise=False)"
    assert plain["checkpoints_nbytes"] == report.checkpoints_nbytes
    assert plain["tasks"][0]["estimates"]["sign"]["bits"] == 1.0
    assert {"tensor", "reason", "nbytes", "degenerate"} == set(plain["tasks"][0]["whole"][0])
    lines = str(report).splitlines()
    assert lines[0].startswith("packed 3 tasks with TallMask(")
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["a", "b", "c"]
    assert "2 tensors whole" in lines[1]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (5 * 10**13, "50.0 TB")]
)
def test_sizes_for_people(number, text):
    assert readable(number) == text


def test_a_private_pattern_that_matches_nothing_is_mentioned(tmp_path):
    base = {"w": torch.randn(70, 64, generator=torch.Generator().manual_seed(0))}
    experts = {task: {"w": base["w"] * factor} for task, factor in (("a", 1.01), ("b", 0.99))}
    packed = tallstore.pack(base, experts, tmp_path / "bundle", private=["w", "head.*"])
    assert packed.advice == ("private='head.*' matches no tensor of any expert",)


def test_an_expert_with_few_of_the_bases_tensors_is_mentioned(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(70, 64, generator=generator) for name in ("a", "b", "c")}
    whole = {name: tensor * 1.01 for name, tensor in base.items()}
    part = {"a": base["a"] * 0.99, "model.b": base["b"]}
    packed = tallstore.pack(base, {"whole": whole, "part": part}, tmp_path / "bundle")
    (line,) = packed.advice
    assert line.startswith("expert 'part' (a state dict) has 1 of the base's 3 tensors")
    assert "key_mapping" in line
