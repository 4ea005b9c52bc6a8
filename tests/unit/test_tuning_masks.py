"""`train_masks`: masks that a loss chose, against a reference written from the formula, and on a real problem."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import tallstore
from tallstore import Localize, OptionError, train_masks
from tallstore.checkpoints import open_checkpoint
from tallstore.errors import NameMismatchError
from tallstore.packing.plan import name_experts
from tallstore.tuning import masks as masks_module
from tests.packing_cases import Model, base_model, normal, pack, tuned
from tests.reference import same_bits
from tests.tuning_problem import Problem, trained_problem


@pytest.fixture(scope="module")
def problem() -> Problem:
    return trained_problem()


# --- worth it ---


def test_trained_masks_keep_more_of_an_expert_than_the_largest_moves(problem, tmp_path):
    """Both through a bundle, scored on examples that training did not see."""
    expert = problem.experts["flipped"]
    masks = train_masks(problem.base, expert, problem.loss("flipped"), density=0.05, steps=100)
    scores = {}
    for name, method in {"largest": Localize(0.05), "trained": Localize(masks={"flipped": masks})}.items():
        packed = pack(problem.base, {"flipped": expert}, tmp_path / name, method=method)
        scores[name] = problem.score("flipped", packed.states["flipped"])
    assert bits_set(masks) <= bits_set(
        train_masks(problem.base, expert, problem.loss("flipped"), density=0.05, steps=0)
    )
    assert scores["trained"].loss < 0.85 * scores["largest"].loss
    assert scores["trained"].accuracy > scores["largest"].accuracy + 0.01


# --- the formula ---


def small_models() -> tuple[Model, Model]:
    base = {"w": normal(12, 9, seed=1), "v": normal(40, seed=2)}
    return base, {name: tensor + 0.3 * normal(*tensor.shape, seed=9 + tensor.dim()) for name, tensor in base.items()}


def curved(weights: Model) -> Tensor:
    """A loss whose slope depends on the weights."""
    return (weights["w"].tanh() * normal(12, 9, seed=5)).sum() + (weights["v"] ** 2 * normal(40, seed=6)).mean()


def reference_slopes(base: Model, expert: Model, scores: Model, l1: float) -> Model:
    """Of the objective, by autograd straight through the rounding, in float64."""
    leaves = {name: score.double().requires_grad_() for name, score in scores.items()}
    sigmoids = {name: torch.sigmoid(score) for name, score in leaves.items()}
    weights = {
        name: base[name] + (sigmoid + (sigmoid.round() - sigmoid).detach()) * (expert[name] - base[name]).double()
        for name, sigmoid in sigmoids.items()
    }
    objective = curved(weights) + l1 * torch.cat([sigmoid.flatten() for sigmoid in sigmoids.values()]).mean()
    return dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))


def reference_step(scores: Model, slopes: Model, rate: float, most: int) -> Model:
    """Down the slopes, and down by as much as leaves *most* scores above 0."""
    moved = {name: scores[name].double() - rate * slope for name, slope in slopes.items()}
    in_order = flat(moved).sort(descending=True).values
    return {name: score - max(0.0, in_order[most].item()) for name, score in moved.items()}


def flat(model: Model) -> Tensor:
    return torch.cat([value.flatten() for value in model.values()])


def rms(slopes: Model) -> float:
    return flat(slopes).square().mean().sqrt().item()


@pytest.mark.parametrize("l1", [0.0, 3.0])
def test_a_step_is_the_gradient_of_the_objective(l1):
    base, expert = small_models()
    opened = open_checkpoint(base)
    [named] = name_experts(opened, {"t": open_checkpoint(expert)}, {})
    localised = masks_module._Localised(opened, named, (), 0.2)
    start = {scored.part.name: scored.scores.view(scored.shape).clone() for scored in localised.scored}
    most = sum(int((score > 0).sum()) for score in start.values())
    assert most == math.floor(0.2 * 148) + 1  # the trim keeps what ties with the last one that it drops

    localised.descend(localised.slopes(curved, "the loss"), 0.7, l1)

    slopes = reference_slopes(base, expert, start, l1)
    expected = reference_step(start, slopes, 0.7 / rms(slopes), most)
    for scored in localised.scored:
        torch.testing.assert_close(
            scored.scores.view(scored.shape).double(), expected[scored.part.name], rtol=1e-5, atol=1e-5
        )


def test_all_steps_together_are_the_reference():
    base, expert = small_models()
    found = train_masks(base, expert, curved, density=0.2, steps=25, learning_rate=0.8, l1=0.5)
    first = train_masks(base, expert, curved, density=0.2, steps=0)
    scores = {name: torch.where(mask, 2.0, -2.0) for name, mask in first.items()}
    unit = 1 / rms(reference_slopes(base, expert, scores, 0.5))
    for step in range(25):
        slopes = reference_slopes(base, expert, scores, 0.5)
        scores = reference_step(scores, slopes, 0.8 * (1 - step / 25) * unit, bits_set(first))
    assert all(torch.equal(found[name], torch.sigmoid(scores[name]) > 0.5) for name in base)
    assert any(not torch.equal(found[name], first[name]) for name in base)


# --- density ---


def bits_set(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def test_training_starts_from_the_mask_of_the_data_free_method(problem, tmp_path):
    expert = problem.experts["flipped"]
    packed = pack(problem.base, {"t": expert}, tmp_path / "b", method=Localize(0.05))
    masks = train_masks(problem.base, expert, problem.loss("flipped"), density=0.05, steps=0)
    coded = [name for name, kind in packed.kinds("t").items() if kind == "sparse"]
    assert coded
    for name in coded:
        assert torch.equal(packed.codes("t", name).bool(), masks[name]), name


@pytest.mark.parametrize(("learning_rate", "l1"), [(0.1, 0.0), (1.0, 0.1), (30.0, 0.0), (1.0, 5.0)])
def test_no_more_bits_are_set_than_at_the_start(learning_rate, l1):
    base, expert = small_models()
    most = bits_set(train_masks(base, expert, curved, density=0.2, steps=0))
    found = train_masks(base, expert, curved, density=0.2, steps=12, learning_rate=learning_rate, l1=l1)
    assert 0 < bits_set(found) <= most


def test_a_large_l1_gives_up_what_does_not_pay():
    """Of eight weights only one matters: the penalty takes the others, and not that one."""
    base = {"w": torch.zeros(64)}
    expert = {"w": torch.arange(1.0, 65.0)}
    most = {
        l1: train_masks(base, expert, lambda weights: (64 - weights["w"][63]) / 64, density=0.125, steps=40, l1=l1)["w"]
        for l1 in (0.0, 20.0)
    }
    assert most[0.0].sum() == 9
    assert most[20.0].nonzero().tolist() == [[63]]


def test_an_expert_that_is_the_base_has_empty_masks():
    base, _ = small_models()
    masks = train_masks(base, base, curved, density=0.2, steps=3)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {"w": (12, 9), "v": (40,)}
    assert bits_set(masks) == 0


# --- what the loss sees ---


def test_the_loss_sees_the_whole_expert_under_its_own_names():
    base = {"a.weight": normal(6, 5, seed=1), "b.weight": normal(4, 4, seed=2), "steps": torch.tensor(3)}
    tied = normal(6, 5, seed=3)
    expert = {
        "model.a.weight": tied,
        "model.again.weight": tied,
        "model.b.weight": normal(4, 4, seed=4).bfloat16(),
        "model.steps": torch.tensor(4),
        "model.head.weight": normal(2, 4, seed=5),
    }
    seen: list[Model] = []

    def loss(weights: Model) -> Tensor:
        seen.append({name: tensor.detach().clone() for name, tensor in weights.items()})
        assert weights["model.again.weight"] is weights["model.a.weight"]
        return weights["model.a.weight"].sum() + weights["model.b.weight"].float().sum()

    masks = train_masks(base, expert, loss, density=0.3, steps=2, key_mapping={"^model\\.": ""})
    assert set(masks) == {"a.weight", "b.weight"}
    assert len(seen) == 2
    for weights in seen:
        assert {name: (value.dtype, value.shape) for name, value in weights.items()} == {
            name: (value.dtype, value.shape) for name, value in expert.items()
        }
        for name in ("model.steps", "model.head.weight"):
            assert same_bits(weights[name], expert[name])
        weight = weights["model.a.weight"]
        assert ((weight == base["a.weight"]) | (weight == base["a.weight"] + (tied - base["a.weight"]))).all()


def test_tensors_of_every_shape():
    base = base_model()
    expert = tuned(base, 1)

    def loss(weights: Model) -> Tensor:
        assert {name: (value.dtype, value.shape) for name, value in weights.items()} == {
            name: (value.dtype, value.shape) for name, value in expert.items()
        }
        return torch.stack([value.square().sum() for value in weights.values() if value.requires_grad]).sum()

    masks = train_masks(base, expert, loss, density=0.1, steps=3)
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: value.shape for name, value in base.items() if value.is_floating_point() and value.numel()
    }
    assert {mask.dtype for mask in masks.values()} == {torch.bool}


def test_private_tensors_are_the_experts_own():
    base, expert = small_models()

    def loss(weights: Model) -> Tensor:
        assert same_bits(weights["w"], expert["w"])
        return curved(weights)

    assert set(train_masks(base, expert, loss, density=0.2, steps=1, private=["w*"])) == {"v"}
    assert set(train_masks(base, expert, loss, density=0.2, steps=1, private="w")) == {"v"}


@pytest.mark.parametrize("rows", [100, 150])
def test_a_resized_vocabulary_has_masks_for_the_rows_of_both(rows, tmp_path):
    base = {"embed": normal(140, 64, seed=1)}
    expert = {"embed": torch.cat([base["embed"] + 0.01 * normal(140, 64, seed=2), normal(10, 64, seed=3)])[:rows]}

    def loss(weights: Model) -> Tensor:
        assert weights["embed"].shape == (rows, 64)
        assert same_bits(weights["embed"][140:].detach(), expert["embed"][140:])
        return (weights["embed"] * normal(rows, 64, seed=4)).sum()

    masks = train_masks(base, expert, loss, density=0.1, steps=4)
    assert masks["embed"].shape == (min(rows, 140), 64)
    packed = pack(base, {"t": expert}, tmp_path / "b", method=Localize(masks={"t": masks}))
    assert torch.equal(packed.codes("t", "embed").bool(), masks["embed"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    base, expert = ({name: value.to(dtype) for name, value in model.items()} for model in small_models())

    def loss(weights: Model) -> Tensor:
        assert all(value.dtype is dtype for value in weights.values())
        return curved(weights)

    start, found = (train_masks(base, expert, loss, density=0.2, steps=steps) for steps in (0, 10))
    assert bits_set(found) <= bits_set(start)
    assert any(not torch.equal(found[name], start[name]) for name in base)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_in_modes_without_gradients(mode):
    base, expert = small_models()
    expected = train_masks(base, expert, curved, density=0.2, steps=5)
    with mode():
        found = train_masks(base, expert, curved, density=0.2, steps=5)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inputs_stay_as_they_are(problem):
    before = {name: value.clone() for name, value in problem.base.items()}
    expert = problem.experts["flipped"]
    own = {name: value.clone() for name, value in expert.items()}
    train_masks(problem.base, expert, problem.loss("flipped"), steps=2)
    assert all(same_bits(problem.base[name], before[name]) for name in before)
    assert all(same_bits(expert[name], own[name]) for name in own)


def test_buffers_may_be_written_to():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    expert = {name: value + 1 for name, value in base.items()}
    own = {name: value.clone() for name, value in expert.items()}

    def loss(weights: Model) -> Tensor:
        return functional_call(model, weights, normal(8, 6)).square().mean()

    with pytest.raises(OptionError, match=r"step 1, uses a tensor that .* private="):
        train_masks(base, expert, loss)
    assert set(train_masks(base, expert, loss, private="*running*")) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(same_bits(expert[name], own[name]) for name in own)


# --- the same every time ---


def test_what_the_loss_draws_is_the_same_in_every_run(problem):
    expert = problem.experts["flipped"]

    def loss(weights: Model) -> Tensor:
        chosen = torch.randint(0, 256, (16,))
        return functional.cross_entropy(
            functional_call(problem.model, weights, problem.seen["flipped"].inputs[chosen]),
            problem.seen["flipped"].labels[chosen],
        )

    train = functools.partial(train_masks, problem.base, expert, loss, density=0.05, steps=15)
    torch.manual_seed(123)
    first = train()
    drawn = torch.rand(4)
    torch.manual_seed(123)
    assert torch.equal(torch.rand(4), drawn)  # nobody else's numbers were used up
    again, other = train(), train(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_progress_counts_steps():
    base, expert = small_models()
    seen: list[tuple[int, int]] = []
    train_masks(base, expert, curved, density=0.2, steps=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_paths_are_read_too(tmp_path):
    base, expert = small_models()
    torch.save(base, tmp_path / "base.pt")
    torch.save(expert, tmp_path / "expert.pt")
    found = train_masks(tmp_path / "base.pt", str(tmp_path / "expert.pt"), curved, density=0.2, steps=5)
    expected = train_masks(base, expert, curved, density=0.2, steps=5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- refused ---


def nan_at(step: int) -> object:
    calls = iter(range(1, 1000))
    return lambda weights: curved(weights) * (math.nan if next(calls) == step else 1.0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda _: 1.5, "loss, step 1, gave an object of type float; return a tensor of one number"),
        (lambda weights: weights["v"], r"step 1, gave torch.float32 of shape \[40\]; return one floating-point number"),
        (lambda weights: weights["v"].sum().long(), r"gave torch.int64 of shape \[\]"),
        (lambda weights: curved(weights).detach(), "step 1, does not depend on the weights that it is given"),
        (lambda _: torch.ones((), requires_grad=True), "step 1, does not depend on the weights that it is given"),
        (nan_at(1), "loss, step 1, gave nan"),
        (nan_at(3), "loss, step 3, gave nan"),
        (lambda weights: weights["v"].abs().sum() * math.inf, "step 1, gave inf"),
        (lambda weights: (weights["v"] * 0).sum().abs().sqrt(), "step 1, is 0, and its gradient is not finite"),
    ],
)
def test_a_loss_that_cannot_be_used(loss, message):
    base, expert = small_models()
    with pytest.raises(OptionError, match=message):
        train_masks(base, expert, loss, density=0.2, steps=5)


def test_an_error_of_the_loss_itself_comes_through():
    def loss(_: Model) -> Tensor:
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError, match="of its own"):
        train_masks(*small_models(), loss)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("loss", None, "loss is None; give a function"),
        ("density", 0, "density is 0; give a share above 0"),
        ("density", 1.5, "density is 1.5"),
        ("density", "thin", "density is 'thin'"),
        ("steps", -1, "steps is -1; give a whole number from 0"),
        ("steps", 2.5, "steps is 2.5"),
        ("steps", True, "steps is True"),
        ("learning_rate", -1.0, "learning_rate is -1.0"),
        ("l1", math.nan, "l1 is nan"),
    ],
)
def test_options_out_of_range(option, value, message):
    with pytest.raises(OptionError, match=f"train_masks: {message}"):
        train_masks(*small_models(), **{"loss": curved, option: value})


def test_models_without_a_name_in_common():
    base, expert = small_models()
    with pytest.raises(NameMismatchError, match=r"^the expert \(a state dict\): has no tensor name in common"):
        train_masks(base, {f"x.{name}.y": value for name, value in expert.items()}, curved)


def test_the_name_is_public():
    assert tallstore.train_masks is masks_module.train_masks
