"""The fidelity benchmark, small: its formulas are what bundles hold, and its experts are trained, packed and scored."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tallstore
from tallstore.demo.training import Phase, Recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = Recipe(pretraining=Phase(2, 2e-3), finetuning=Phase(1, 2e-3))
SHAPES = {"layer.0.wide": (96, 128), "layer.1.long": (64, 200), "convolution": (600, 3, 3), "bias": (96,)}
CODED = ("layer.0.wide", "layer.1.long", "convolution")
TASKS = ("one", "two", "three")


@pytest.fixture
def fidelity(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fidelity")


@pytest.fixture
def dense_fits(fidelity):
    return fidelity.dense_fits


@pytest.fixture(scope="module")
def checkpoints():
    """A base and three experts; rows and tensors move by different amounts, one row of one expert not at all."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = {}
    for size, task in enumerate(TASKS, start=1):
        experts[task] = {}
        for name, value in base.items():
            by_row = torch.rand(value.shape[:1], generator=generator).add(0.2).view(-1, *[1] * (value.ndim - 1))
            moved = 0.02 * size * by_row * torch.randn(value.shape, generator=generator)
            experts[task][name] = value + moved
    experts["two"]["layer.0.wide"][3] = base["layer.0.wide"][3]
    return base, experts


def test_every_method_has_a_row_and_every_row_its_own_name(fidelity):
    names = [fit.name for fit in fidelity.FITS]
    assert len(set(names)) == len(names)
    methods = {type(fit.method) for fit in fidelity.FITS} - {type(None)}
    assert methods == set(fidelity.Method.__args__)
    assert all(fit.dense is not None for fit in fidelity.FITS if type(fit.method) not in {tallstore.Auto, type(None)})
    assert {"deltatensors, 1 bit", "deltatensors, int4"} <= set(names)


def test_bundles_hold_what_the_formulas_say(fidelity, dense_fits, checkpoints, tmp_path):
    """With shared vectors in float32: in four or eight bits they move masks, too."""
    base, experts = checkpoints
    sharing = tallstore.SignedMask | tallstore.TallMask | tallstore.Emr | tallstore.LeastSquares
    for number, fit in enumerate(fit for fit in fidelity.FITS if fit.method is not None and fit.dense is not None):
        wide = "float32" if isinstance(fit.method, sharing) else None
        tallstore.pack(base, experts, tmp_path / str(number), method=fit.method, merged_dtype=wide)
        expected = dense_fits.rebuild(fit.dense, base, experts)
        with tallstore.open_bundle(tmp_path / str(number), base=base) as bundle:
            for task in TASKS:
                found = bundle.state_dict(task)
                assert torch.equal(found["bias"], experts[task]["bias"]), fit.name
                for name in CODED:
                    ours, theirs = found[name] - base[name], expected[task][name] - base[name]
                    assert (ours - theirs).norm() < 2e-3 * theirs.norm(), (fit.name, task, name)


@pytest.mark.parametrize(
    ("gain", "of"),
    [
        ("one", lambda tau, step: (step * tau).sum() / (tau * tau).sum()),
        ("norm", lambda tau, step: step.norm() / tau.norm()),
        ("magnitudes", lambda tau, step: step.abs().sum() / tau.abs().sum()),
        ("least-squares", lambda tau, step: (step * step).sum() / (step * tau).sum()),
    ],
)
@pytest.mark.parametrize("by", ["row", "tensor", "layer", "task"])
def test_gains_are_solved_for_over_what_they_are_asked_for(dense_fits, checkpoints, gain, of, by):
    base, experts = checkpoints
    fit = dense_fits.DenseFit(dense_fits.sign(), gain, by)
    rebuilt = dense_fits.rebuild(fit, base, experts)
    names = CODED[:2] if by == "row" else CODED
    for task in TASKS:
        tau = {name: (experts[task][name].double() - base[name].double()) for name in CODED}
        step = {name: (rebuilt[task][name].double() - base[name].double()) for name in CODED}
        if by == "task":
            everything = [torch.cat([values[name].flatten() for name in CODED]) for values in (tau, step)]
            assert of(*everything).item() == pytest.approx(1, abs=1e-4)
            continue
        for name in names:
            rows = range(len(tau[name])) if by == "row" else [slice(None)]
            for row in rows:
                if tau[name][row].any():
                    assert of(tau[name][row], step[name][row]).item() == pytest.approx(1, abs=1e-4), (name, row)


def test_levels_between_the_least_and_the_largest_value(dense_fits):
    stack = torch.tensor([[[-1.0, -0.4, 0.1, 2.0]]])
    assert dense_fits.asymmetric(2)(stack, ()).tolist() == [[[-1.0, 0.0, 0.0, 2.0]]]
    torch.testing.assert_close(dense_fits.asymmetric(12)(stack, ()), stack, atol=4e-4, rtol=0)


@pytest.fixture
def trained(fidelity, tmp_path):
    fidelity.small_experts.train(tmp_path / "experts", 2, QUICK)
    return tmp_path / "experts"


def test_small_experts_are_the_same_each_time(fidelity, trained, tmp_path):
    fidelity.small_experts.train(tmp_path / "again", 2, QUICK)
    tasks = fidelity.small_experts.names(tmp_path / "again")
    assert tasks == list(fidelity.small_experts.TASKS)[:2]
    for name in ("base", *tasks):
        first, second = (load_file(folder / name / "model.safetensors") for folder in (trained, tmp_path / "again"))
        assert all(torch.equal(first[key], second[key]) for key in first), name
    with pytest.raises(SystemExit, match="has 2 experts"), fidelity.small(3, "float32", trained):
        pass


def test_small_experts_are_packed_and_scored(fidelity, trained, tmp_path):
    fits = [fit for fit in fidelity.FITS if fit.name in {"SignedMask()", "Localize()", "TVQ, 4 bits"}]
    with fidelity.small(2, "bfloat16", trained) as family:
        tasks = family.tasks
        truth = [family.checkpoints / tasks[0] / "model.safetensors"]
        assert family.score(tasks[0], truth)[0][0] == 1.0
        rows = {row.fit: row for row in fidelity.measure(family, fits, tmp_path)}
    table = [fidelity.heading(tasks), *map(fidelity.line, rows.values())]
    columns = table[0].splitlines()[1].count("|")
    assert all(row.count("|") == columns for row in table[1:])
    assert len(rows) == 3
    for name in ("SignedMask()", "Localize()"):
        assert set(rows[name].packed) == set(rows[name].dense) == set(tasks)
    assert (rows["TVQ, 4 bits"].bits, rows["TVQ, 4 bits"].packed) == (4, {})
    assert rows["Localize()"].bits < 0.5
    assert 1 < rows["SignedMask()"].bits < 4
    assert 0 < rows["Localize()"].cosine < rows["SignedMask()"].cosine < rows["TVQ, 4 bits"].cosine < 1
    for row in rows.values():
        assert all(0 <= value <= 100 for value in (*row.agreement.values(), *row.accuracy.values()))
    assert min(rows["TVQ, 4 bits"].agreement.values()) > 95


def test_peers_are_scored_on_what_their_files_give_back(fidelity, trained, tmp_path):
    """One that stores signs, without an installation, and one that is not installed."""
    signs = next(peer for peer in fidelity.peers("float32") if peer.name.startswith("BitDelta"))
    absent = fidelity.replace(signs, name="absent", package="no-such-package-at-all")
    fits = [fidelity.Fit(peer.name, peer=peer) for peer in (signs, absent)]
    with fidelity.small(2, "float32", trained) as family:
        (row,) = fidelity.measure(family, fits, tmp_path)
    assert (row.fit, set(row.packed), row.dense) == (signs.name, set(family.tasks), {})
    assert 0.9 < row.bits < 8
    assert 0.5 < row.cosine < 1


def test_the_tasks_ask_different_things_of_images_nobody_trained_on(fidelity):
    small_experts = fidelity.small_experts
    digits = small_experts.load_digits()
    tasks = [small_experts.make_task(digits, name) for name in small_experts.TASKS]
    assert len(tasks) >= 20
    for task in tasks:
        assert len(task.test.labels) == small_experts.HELD_OUT
        assert len(task.train.labels) + len(task.test.labels) == len(digits.labels)
        assert task.train.labels.unique().tolist() == list(range(task.num_labels))
    shown = {(task.test.images.numpy().tobytes(), task.test.labels.numpy().tobytes()) for task in tasks}
    assert len(shown) == len(tasks)


def test_the_study_reads_agreement_between_two_thresholds(fidelity):
    study = importlib.import_module("study")
    rows = [
        fidelity.Row("float32", f"Fit by row, {bits}", {}, {"a": agreement}, {}, agreement / 100, bits)
        for bits, agreement in ((0.6, 90.0), (1.4, 98.0), (2.5, 99.0))
    ]
    told = study.at_bits([*rows, fidelity.Row("float32", "Fixed", {}, {"a": 1.0}, {}, 0.5, 1.0)])
    assert told.splitlines()[-1] == "| Fit by row |  | 91.50, 0.915 | 94.00, 0.940 | 98.09, 0.981 | 98.55, 0.985 |"
    assert study._entropy(1.0) == 1.0
    assert study._entropy(0.0) == 0.0
    assert study._entropy(2 / 3) == pytest.approx(math.log2(3))


def test_the_study_prints_its_tables(fidelity, trained, monkeypatch, capsys):
    study = importlib.import_module("study")
    words = ("gain", "whole", "shared", "frontier", "--small", "2", "--fits")
    texts = ("Sign(row): one", "single", "median by row", "Uniform(3) by tensor, 1.0", "Sign by row")
    monkeypatch.setattr(sys, "argv", ["study.py", *words, *texts, "--trained", str(trained)])
    study.main()
    printed = capsys.readouterr()
    assert [printed.out.count(f"\n{name}, 2 tasks\n") for name in ("gain", "whole", "shared", "frontier")] == [1] * 4
    assert printed.out.count("\n| float32 | ") == 5
    assert "nan" not in printed.out
    assert printed.err == ""


def test_copies_are_cast(fidelity, tmp_path):
    (tmp_path / "wide" / "base").mkdir(parents=True)
    save_file({"weight": torch.tensor([1.0, 1.001])}, tmp_path / "wide" / "base" / "model.safetensors")
    fidelity.copy_as(torch.bfloat16, tmp_path / "wide", tmp_path / "narrow")
    copied = load_file(tmp_path / "narrow" / "base" / "model.safetensors")["weight"]
    assert copied.dtype == torch.bfloat16
    assert copied.tolist() == [1.0, 1.0]
