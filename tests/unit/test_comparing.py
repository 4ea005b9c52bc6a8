"""`compare` and `Auto`: predictions on a sample against what `pack` then writes."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import tallstore
from tallstore import Auto, Emr, LeastSquares, Localize, OptionError, Sign, SignedMask, TallMask, Uniform
from tallstore.packing import sampling

METHODS = (
    SignedMask(),
    SignedMask(1.6, scale="row"),
    TallMask(),
    TallMask.published(),
    Emr(gain="published"),
    LeastSquares(2),
    Sign(scale="row"),
    Uniform(3, threshold=1.0),
    Uniform(8),
    Localize(0.05),
)


@pytest.fixture(scope="module")
def models():
    """A base and three experts: a large tensor with rows that moved unequally, small ones, one whole."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    shapes = {"embed": (1500, 96), "up": (400, 96), "down": (96, 400), "norm": (96,), "bias": (400,)}
    base = {name: normal(*shape) for name, shape in shapes.items()}
    experts = {}
    for task in ("a", "b", "c"):
        experts[task] = {name: value + 0.02 * normal(*value.shape) for name, value in base.items()}
        still = torch.arange(1500) % 3 == 0
        experts[task]["embed"][still] = base["embed"][still]
        experts[task]["head"] = normal(5, 96)
    return base, experts


@pytest.fixture
def small_samples(monkeypatch):
    """Sample tensors that are small enough for a test as large ones are."""
    monkeypatch.setattr(sampling, "_WHOLE_NUMEL", 1 << 17)
    monkeypatch.setattr(sampling, "_LEAST_NUMEL", 1 << 16)
    monkeypatch.setattr(sampling, "_BLOCK_NUMEL", 1 << 8)


@pytest.mark.usefixtures("small_samples")
def test_predictions_are_near_what_pack_writes(models, tmp_path):
    base, experts = models
    compared = tallstore.compare(base, experts, methods=METHODS)
    for number, row in enumerate(compared.rows):
        report = tallstore.pack(base, experts, tmp_path / str(number), method=row.method)
        # A thin mask in a small sample compresses worse than in the whole.
        margin = 0.1 if isinstance(row.method, Localize) else 0.03
        assert row.bundle_nbytes == pytest.approx(report.bundle_nbytes, rel=margin)
        bits = sum(task.bits for task in report.tasks) / 3
        assert row.bits == pytest.approx(bits, rel=margin)
        for task in report.tasks:
            assert row.cosine[task.name] == pytest.approx(task.cosine, abs=0.02)
            assert row.gain[task.name] == pytest.approx(task.gain, abs=0.02)
        assert not row.measured


def test_without_a_sample_predictions_are_exact_but_for_numbers_in_tables(models, tmp_path):
    base, experts = models
    [row] = tallstore.compare(base, experts, methods=[SignedMask()]).rows
    report = tallstore.pack(base, experts, tmp_path / "bundle")
    assert row.bundle_nbytes == pytest.approx(report.bundle_nbytes, abs=64)
    assert row.cosine == {task.name: pytest.approx(task.cosine, rel=1e-5) for task in report.tasks}


def test_the_front_is_what_nothing_beats(models):
    base, experts = models
    compared = tallstore.compare(base, experts, methods=METHODS)
    assert compared.best
    for one, other in itertools.permutations(compared.rows, 2):
        if one.is_best:
            assert not (other.bundle_nbytes < one.bundle_nbytes and other.mean_cosine > one.mean_cosine)
        elif other.is_best and other.bundle_nbytes <= one.bundle_nbytes and other.mean_cosine >= one.mean_cosine:
            break
    text = str(compared)
    assert all(type(row.method).__name__ in text for row in compared.rows)
    assert len(json.loads(json.dumps(compared.to_dict()))["rows"]) == len(METHODS)


def test_a_score_of_ones_own_is_measured_on_full_weights(models):
    base, experts = models

    def closeness(task, weights):
        return -sum(float((weights[name] - value).abs().sum()) for name, value in experts[task].items())

    rows = tallstore.compare(base, experts, methods=[Sign(), Uniform(16)], evaluate=closeness).rows
    assert all(row.measured and set(row.score) == {"a", "b", "c"} for row in rows)
    assert rows[1].mean_score > rows[0].mean_score
    assert rows[1].is_best


def test_nothing_is_left_behind_and_nothing_is_changed(models, tmp_path, monkeypatch):
    base, experts = models
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = {name: value.clone() for name, value in base.items()}
    told = []
    tallstore.compare(base, experts, methods=[SignedMask(), Sign()], progress=lambda *how: told.append(how))
    assert list(tmp_path.iterdir()) == []
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert all(torch.equal(base[name], value) for name, value in before.items())


def test_somebody_elses_merged_model_is_sampled_too(models, small_samples, tmp_path):
    base, experts = models
    merged = {name: sum(weights[name] for weights in experts.values()) / 3 for name in base}
    method = TallMask(merge=merged)
    [row] = tallstore.compare(base, experts, methods=[method]).rows
    report = tallstore.pack(base, experts, tmp_path / "bundle", method=method)
    assert row.bundle_nbytes == pytest.approx(report.bundle_nbytes, rel=0.05)


@pytest.mark.parametrize("methods", [[], [Localize(masks={})]])
def test_what_cannot_be_compared_is_refused(models, methods):
    base, experts = models
    with pytest.raises(OptionError, match="methods"):
        tallstore.compare(base, experts, methods=methods)


# --- Auto -------------------------------------------------------------------------------------------------------------


def test_a_larger_budget_is_kept_and_never_less_true(models, tmp_path):
    base, experts = models
    cosines = []
    for number, budget in enumerate((1.0, 1.6, 3.0)):
        report = tallstore.pack(base, experts, tmp_path / str(number), method=Auto(budget))
        bits = [task.bits for task in report.tasks]
        assert sum(bits) / len(bits) <= budget
        cosines.append(sum(task.cosine for task in report.tasks) / 3)
        assert tallstore.verify(tmp_path / str(number)) == []
    assert cosines == sorted(cosines)


@pytest.mark.slow
def test_no_single_method_of_that_size_is_truer(models, tmp_path):
    base, experts = models
    for method in (SignedMask(), Uniform(3, threshold=1.0), Sign(scale="row")):
        single = tallstore.pack(base, experts, tmp_path / "single", method=method, overwrite=True)
        bits = sum(task.bits for task in single.tasks) / 3
        report = tallstore.pack(base, experts, tmp_path / "auto", method=Auto(1.03 * bits), overwrite=True)
        truth = [sum(task.cosine for task in found.tasks) for found in (report, single)]
        assert truth[0] >= truth[1] - 1e-3


def test_a_bundle_of_several_kinds_comes_back(models, tmp_path):
    base, experts = models
    tallstore.pack(base, experts, tmp_path / "bundle", method=Auto(1.4))
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as bundle:
        assert bundle.manifest.groups[0].method.name == "auto"
        for task, weights in experts.items():
            found = bundle.state_dict(task)
            moved = torch.cat([(found[name] - base[name]).flatten() for name in base])
            exact = torch.cat([(weights[name] - base[name]).flatten() for name in base])
            assert torch.dot(moved, exact) / torch.dot(exact, exact) == pytest.approx(1.0, abs=0.01)
            assert torch.equal(found["head"], weights["head"])


def test_a_budget_that_cannot_be_kept_says_what_can(models, tmp_path):
    base, experts = models
    with pytest.raises(OptionError, match=r"max_bits=0\.01 cannot be kept here; give at least 0\.\d+"):
        tallstore.pack(base, experts, tmp_path / "bundle", method=Auto(0.01))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("budget", [0, -1, float("nan"), "1", None, True])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(OptionError, match="max_bits"):
        Auto(budget)
