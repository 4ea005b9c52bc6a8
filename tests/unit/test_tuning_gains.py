"""`pack(…, calibrate=…)`: gains tuned on a loss, from the weights that it sees to the bundle's bytes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tallstore
from tallstore import Auto, Calibration, Localize, OptionError, Sign, SignedMask, TallMask, Uniform
from tallstore.checkpoints import open_checkpoint
from tallstore.format.bundle_files import BundleFiles
from tallstore.loading.pinned_base import PinnedBase
from tallstore.packing.calibrating import AdjustableExpert, Tuned
from tests.packing_cases import METHODS, Model, Packed, assert_same, base_model, contents, experts_of, normal, pack
from tests.reference import same_bits
from tests.tuning_problem import Problem, trained_problem


@pytest.fixture(scope="module")
def problem() -> Problem:
    return trained_problem()


@dataclass(frozen=True)
class Prescribed:
    """A calibration that knows its factors: those of each task, for its coded tensors in turn."""

    factors: dict[str, tuple[float, ...]]
    steps: int = 1

    def tune(
        self, task: str, weights_at: Callable[[Tensor], Model], count: int, after_step: Callable[[], None]
    ) -> Tuned:
        after_step()
        given = self.factors[task]
        return Tuned(tuple(given[place % len(given)] for place in range(count)), before=1.0, after=0.5)


def square(weights: Model) -> Tensor:
    """Of all floating-point weights."""
    return torch.stack([value.double().square().sum() for value in weights.values() if value.is_floating_point()]).sum()


# --- worth it ---


@pytest.mark.parametrize(
    ("method", "share"),
    [(Sign(), 0.9), (Uniform(3), 0.98), (TallMask.published(), 0.9), (SignedMask(), 0.98)],
    ids=repr,
)
def test_a_calibrated_bundle_is_nearer_on_batches_that_it_did_not_see(problem, tmp_path, method, share):
    distances = {task: problem.distance(task, problem.seen) for task in problem.experts}
    calibration = Calibration(lambda task, weights: distances[task](weights), steps=30)
    found: dict[str, dict[str, float]] = {}
    for name, calibrate in {"fitted": None, "calibrated": calibration}.items():
        packed = pack(problem.base, problem.experts, tmp_path / name, method=method, calibrate=calibrate)
        assert not any("calibrate" in line for line in packed.report.advice)
        found[name] = {
            task: problem.distance(task, problem.held_out)(packed.states[task]).item() for task in problem.experts
        }
    for task, distance in found["calibrated"].items():
        assert distance < share * found["fitted"][task], (task, found)


# --- what the loss sees ---


def adjustable(packed: Packed, task: str) -> AdjustableExpert:
    files = BundleFiles(packed.root)
    with contextlib.closing(files):
        base = PinnedBase(files.base, lambda: open_checkpoint(packed.base), "never")
        return AdjustableExpert(files.task(task), files, base)


@pytest.mark.parametrize("method", METHODS)
def test_at_factors_of_one_the_weights_are_the_readers(method, tmp_path):
    base = base_model()
    experts = experts_of(base)
    for expert in experts.values():
        expert["again.weight"] = expert["block.weight"]
    packed = pack(base, experts, tmp_path / "b", method=METHODS[method])
    for task in experts:
        expert = adjustable(packed, task)
        coded = [name for name, kind in packed.kinds(task).items() if kind not in ("private", "same", "alias")]
        assert sorted(expert.names) == sorted(coded)
        weights = expert(torch.ones(len(coded)))
        assert_same(weights, packed.states[task])
        assert weights["block.weight"] is weights["again.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [200, 400])
def test_other_dtypes_and_resized_vocabularies(dtype, rows, tmp_path):
    base = base_model(dtype)
    experts = experts_of(base)
    for seed, expert in enumerate(experts.values()):
        more = normal(150, 20, seed=seed).to(dtype)
        expert["embed.weight"] = torch.cat([expert["embed.weight"], more])[:rows]
    packed = pack(base, experts, tmp_path / "b", method=SignedMask())
    assert packed.kinds("a")["embed.weight"] == ("extended" if rows > 300 else "private")
    expert = adjustable(packed, "a")
    assert_same(expert(torch.ones(len(expert.names))), packed.states["a"])


@pytest.mark.parametrize("method", ["signed", "sign centred", "uniform", "two levels"])
def test_slopes_reach_the_factors(method, tmp_path):
    """A factor's slope is the inner product of the weights' slopes and what the task adds."""
    base = base_model()
    packed = pack(base, experts_of(base), tmp_path / "b", method=METHODS[method])
    expert = adjustable(packed, "b")
    factors = torch.ones(len(expert.names), requires_grad=True)
    weights = expert(factors)
    [slopes] = torch.autograd.grad(square(weights), [factors])
    for place, name in enumerate(expert.names):
        more = expert(torch.ones(len(expert.names)).index_fill(0, torch.tensor(place), 2.0))[name].double()
        added = more - weights[name].detach().double()
        expected = (2 * weights[name].detach().double() * added).sum()
        torch.testing.assert_close(slopes[place].double(), expected, rtol=1e-4, atol=1e-3)


# --- what is stored ---


@pytest.mark.parametrize(
    "method", ["signed", "tall ties", "emr published", "two levels", "sign centred", "uniform", "localize"]
)
def test_gains_are_multiplied_and_nothing_else_changes(method, tmp_path):
    base = base_model()
    experts = experts_of(base)
    factors = {"a": (2.0, 0.5, 4.0), "b": (0.25,), "c": (1.0, 2.0)}  # powers of two: exact
    plain = pack(base, experts, tmp_path / "plain", method=METHODS[method])
    tuned = pack(base, experts, tmp_path / "tuned", method=METHODS[method], calibrate=Prescribed(factors))
    assert plain.states.keys() == tuned.states.keys()
    for task, given in factors.items():
        assert tuned.kinds(task) == plain.kinds(task)
        coded = adjustable(plain, task).names
        assert coded
        for place, name in enumerate(coded):
            factor = given[place % len(given)]
            assert torch.equal(tuned.codes(task, name), plain.codes(task, name)), name
            assert torch.equal(tuned.gains(task, name), factor * plain.gains(task, name)), name
        at = torch.tensor([given[place % len(given)] for place in range(len(coded))])
        assert_same(tuned.states[task], adjustable(plain, task)(at))


def test_the_gain_that_came_out_is_recorded(tmp_path):
    base = {"w": normal(80, 80, seed=1)}
    experts = {"t": {"w": base["w"] + 0.01 * normal(80, 80, seed=2)}}
    packed = pack(base, experts, tmp_path / "b", method=Sign(), calibrate=Prescribed({"t": (0.75,)}))
    assert packed.tables["t"].fidelity.gain == pytest.approx(0.75, rel=1e-3)
    assert packed.report.tasks[0].gain == pytest.approx(0.75, rel=1e-3)


def test_factors_are_rounded_as_gains_are(tmp_path):
    base = {"w": normal(80, 80, seed=1)}
    experts = {"t": {"w": base["w"] + 0.01 * normal(80, 80, seed=2)}}
    plain, tuned = (
        pack(base, experts, tmp_path / str(place), method=Sign(scale="row"), calibrate=calibrate)
        for place, calibrate in enumerate((None, Prescribed({"t": (1.1,)})))
    )
    torch.testing.assert_close(tuned.gains("t", "w"), 1.1 * plain.gains("t", "w"), rtol=2.0**-12, atol=0)


@pytest.mark.parametrize(
    ("factor", "dtype", "reason"),
    [
        (2.0**-58, torch.float32, "its scales are beyond what the format holds"),
        (2.0**30, torch.float16, "its reconstruction overflows F16"),
    ],
)
def test_a_factor_that_takes_a_tensor_out_of_range_makes_it_whole(factor, dtype, reason, tmp_path):
    base = {"w": normal(80, 80, seed=1).to(dtype), "v": normal(80, 80, seed=3).to(dtype)}
    experts = {"t": {name: value + (0.01 * normal(80, 80, seed=2)).to(dtype) for name, value in base.items()}}
    calibrate = Prescribed({"t": (1.0, factor)})
    packed = pack(base, experts, tmp_path / "b", method=Sign(), calibrate=calibrate)
    assert packed.whole("t") == {"w": reason}
    assert same_bits(packed.states["t"]["w"], experts["t"]["w"])


# --- where it does not help ---


def test_a_loss_that_does_not_care_changes_nothing(problem, tmp_path):
    flat = Calibration(lambda _, weights: 0 * square(weights) + 3, steps=3)
    plain = pack(problem.base, problem.experts, tmp_path / "plain", method=Sign())
    tuned = pack(problem.base, problem.experts, tmp_path / "tuned", method=Sign(), calibrate=flat)
    assert contents(tuned.root) == contents(plain.root)
    lines = [line for line in tuned.report.advice if line.startswith("calibrate: ")]
    assert lines == [
        f"calibrate: the loss of task {task!r} did not fall (3, then 3); its gains are those of the fit"
        for task in problem.experts
    ]


def test_a_task_that_is_not_helped_keeps_its_gains(problem, tmp_path):
    """The steps of one task are far too long; the other's are of use."""
    distances = {task: problem.distance(task, problem.seen) for task in problem.experts}

    def loss(task: str, weights: Model) -> Tensor:
        distance = distances[task](weights)
        return distance if task == "flipped" else 3 + 0 * distance

    plain = pack(problem.base, problem.experts, tmp_path / "plain", method=Sign())
    tuned = pack(problem.base, problem.experts, tmp_path / "tuned", method=Sign(), calibrate=Calibration(loss, 10))
    assert [line for line in tuned.report.advice if "calibrate" in line] == [
        "calibrate: the loss of task 'shifted' did not fall (3, then 3); its gains are those of the fit"
    ]
    names = adjustable(plain, "shifted").names
    assert all(torch.equal(tuned.gains("shifted", name), plain.gains("shifted", name)) for name in names)
    assert not all(torch.equal(tuned.gains("flipped", name), plain.gains("flipped", name)) for name in names)


def test_a_rate_that_overshoots_is_taken_back(problem, tmp_path):
    distances = {task: problem.distance(task, problem.seen) for task in problem.experts}
    wild = Calibration(lambda task, weights: distances[task](weights), steps=1, learning_rate=50.0)
    plain = pack(problem.base, problem.experts, tmp_path / "plain", method=Uniform(16))
    tuned = pack(problem.base, problem.experts, tmp_path / "tuned", method=Uniform(16), calibrate=wild)
    assert contents(tuned.root) == contents(plain.root)
    assert sum("did not fall" in line for line in tuned.report.advice) == len(problem.experts)


def test_nothing_coded_is_nothing_to_calibrate(tmp_path):
    base = {"w": torch.zeros(3)}
    experts = {"t": {"w": torch.ones(3)}}

    def loss(_task: str, _weights: Model) -> Tensor:
        raise AssertionError("there is nothing to ask for")

    packed = pack(base, experts, tmp_path / "b", method=Sign(), calibrate=Calibration(loss))
    assert same_bits(packed.states["t"]["w"], experts["t"]["w"])


# --- with all else that pack does ---


def test_scores_are_of_the_calibrated_weights(problem, tmp_path):
    scored: list[tuple[str, Model]] = []

    def evaluate(task: str, weights: Model) -> float:
        scored.append((task, weights))
        return problem.score(task, weights).accuracy

    packed = pack(
        problem.base,
        problem.experts,
        tmp_path / "b",
        method=TallMask((0.4, 1.0)),
        evaluate=evaluate,
        calibrate=Prescribed(dict.fromkeys(problem.experts, (0.5,))),
    )
    for task, weights in scored[-2:]:
        assert_same(weights, packed.states[task])
        assert packed.tables[task].fidelity.score == problem.score(task, packed.states[task]).accuracy


def test_auto_is_calibrated_within_its_budget(problem, tmp_path):
    seen: list[tuple[int, int]] = []
    calibrate = Prescribed(dict.fromkeys(problem.experts, (0.5,)))
    packed = pack(
        problem.base,
        problem.experts,
        tmp_path / "b",
        method=Auto(2.5),
        calibrate=calibrate,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [task.gain for task in packed.report.tasks] == pytest.approx([0.5, 0.5], rel=1e-2)
    assert sum(task.bits for task in packed.report.tasks) / 2 <= 2.5
    assert_it_ends(seen)


def test_a_merged_model_of_somebody_else(problem, tmp_path):
    merged = {name: sum(expert[name] for expert in problem.experts.values()) / 2 for name in problem.base}
    calibrate = Prescribed(dict.fromkeys(problem.experts, (0.5,)))
    method = TallMask(merge=merged)
    plain = pack(problem.base, problem.experts, tmp_path / "plain", method=method)
    tuned = pack(problem.base, problem.experts, tmp_path / "tuned", method=method, calibrate=calibrate)
    name = adjustable(plain, "flipped").names[0]
    assert torch.equal(tuned.gains("flipped", name), 0.5 * plain.gains("flipped", name))


@pytest.mark.parametrize("method", [Sign(), TallMask.published()], ids=["sign", "two passes before"])
def test_progress_goes_up_to_its_end(problem, tmp_path, method):
    seen: list[tuple[int, int]] = []
    calibration = Calibration(lambda _, weights: square(weights), steps=4)
    pack(
        problem.base,
        problem.experts,
        tmp_path / "b",
        method=method,
        calibrate=calibration,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert_it_ends(seen)
    assert len(set(seen)) > 8  # steps count


def assert_it_ends(seen: list[tuple[int, int]]) -> None:
    done = [value for value, _ in seen]
    assert done == sorted(done)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_in_modes_without_gradients(problem, tmp_path, mode):
    distances = {task: problem.distance(task, problem.seen) for task in problem.experts}
    calibration = Calibration(lambda task, weights: distances[task](weights), steps=3)
    expected = pack(problem.base, problem.experts, tmp_path / "a", method=Sign(), calibrate=calibration)
    with mode():
        found = pack(problem.base, problem.experts, tmp_path / "b", method=Sign(), calibrate=calibration)
    assert contents(found.root) == contents(expected.root)


def test_batches_drawn_by_torch_are_the_same_in_every_pack(problem, tmp_path):
    distances = {task: problem.distance(task, problem.seen) for task in problem.experts}

    def loss(task: str, weights: Model) -> Tensor:
        return distances[task](weights) * (0.5 + torch.rand(()))

    packed = [
        pack(problem.base, problem.experts, tmp_path / name, method=Sign(), calibrate=Calibration(loss, 3))
        for name in "ab"
    ]
    assert contents(packed[0].root) == contents(packed[1].root)


def test_a_dry_run_calibrates_and_writes_nothing(problem, tmp_path):
    calibrate = Prescribed(dict.fromkeys(problem.experts, (0.5,)))
    report = tallstore.pack(
        problem.base, problem.experts, tmp_path / "b", method=Sign(), calibrate=calibrate, dry_run=True
    )
    assert [task.gain for task in report.tasks] == pytest.approx([0.5, 0.5], rel=1e-2)
    assert not (tmp_path / "b").exists()


# --- refused ---


def constant(_task: str, _weights: Model) -> Tensor:
    return torch.tensor(1.0)


def nan_at(step: int) -> Any:
    calls = iter(range(1, 1000))
    return lambda _, weights: square(weights) * (math.nan if next(calls) == step else 1.0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (constant, "step 1, does not depend on the weights that it is given"),
        (lambda _, weights: square(weights).detach(), "step 1, does not depend on the weights that it is given"),
        (lambda *_: None, "step 1, gave an object of type NoneType; return a tensor of one number"),
        (lambda _, weights: weights["2.weight"], r"step 1, gave torch.float32 of shape \[128, 128\]"),
        (nan_at(1), "step 1, gave nan"),
        (nan_at(3), "step 3, gave nan"),
        (nan_at(5), "at the end, gave nan"),
    ],
)
def test_a_loss_that_cannot_be_used(problem, tmp_path, loss, message):
    with pytest.raises(OptionError, match=f"^calibrate: the loss of task 'flipped', {message}"):
        pack(problem.base, problem.experts, tmp_path / "b", method=Sign(), calibrate=Calibration(loss, steps=4))
    assert list(Path(tmp_path).iterdir()) == []


def test_an_error_of_the_loss_itself_comes_through(problem, tmp_path):
    def loss(_task: str, _weights: Model) -> Tensor:
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError, match="of its own"):
        pack(problem.base, problem.experts, tmp_path / "b", method=Localize(0.1), calibrate=Calibration(loss))
    assert list(Path(tmp_path).iterdir()) == []


def test_what_is_no_calibration(problem, tmp_path):
    with pytest.raises(OptionError, match=r"^calibrate is <function .*; give tallstore.Calibration\(loss\)"):
        tallstore.pack(problem.base, problem.experts, tmp_path / "b", calibrate=constant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": 3}, "loss is 3; give a function"),
        ({"steps": 0}, "steps is 0; give a whole number from 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=f"^Calibration: {message}"):
        Calibration(**{"loss": constant, **options})
