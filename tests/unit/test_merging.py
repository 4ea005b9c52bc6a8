"""Merged models from bundles against the papers' formulas on the original checkpoints, in float64 and plain numpy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tallstore
from tallstore import Localize, SignedMask, TallMask
from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES
from tallstore.checkpoints.writer import write_checkpoint
from tallstore.errors import IntegrityError, NotFetchedError, OptionError, UnknownTaskError
from tallstore.format import manifest as tables
from tallstore.format.dtypes import TensorSpec
from tallstore.loading import merging
from tests.bundle_builder import Bundle, Group, Task, raw_bytes
from tests.few_files import few_files
from tests.fit_reference import rows, threshold_of
from tests.packing_cases import Packed, experts_of, normal, pack, tuned
from tests.reference import same_bits

# --- models -----------------------------------------------------------------------------------------------------------


def base_model(dtype=torch.float32):
    """Tensors that are coded, and every sort that is not."""
    base = {
        "attention.mask": torch.full((4, 4), -torch.inf).triu(1),
        "block.kernel": normal(13, 8, 3, 17, seed=1),
        "block.weight": normal(70, 65, seed=2),
        "embed.weight": normal(90, 65, seed=3),
        "frozen.bias": normal(12, seed=10),
        "frozen.weight": normal(64, 66, seed=4),
        "head.weight": normal(5, 64, seed=5),
        "lone.bias": normal(21, seed=11),
        "lone.weight": normal(64, 67, seed=12),
        "norm.bias": normal(37, seed=6),
        "norm.weight": normal(5003, seed=7),
        "pooler.weight": normal(64, 65, seed=8),
        "scale": torch.tensor(2.5),
        "special.weight": normal(80, 60, seed=9),
        "nothing": torch.empty(0, 3),
    }
    base["norm.bias"][3] = base["block.weight"][2, 5] = -0.0
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    return base | {"position_ids": torch.arange(12), "is_trained": torch.tensor(True)}


def experts_over(base):
    """Four fine-tunes: with heads of their own, resized vocabularies, tensors that did not move or are not there."""
    experts = experts_of(base, 4)
    a, b, c, d = experts.values()
    for expert in experts.values():
        expert["frozen.weight"] = base["frozen.weight"].clone()
        expert["frozen.bias"] = base["frozen.bias"].clone()
        if expert is not c:
            expert["lone.weight"], expert["lone.bias"] = base["lone.weight"].clone(), base["lone.bias"].clone()
    a["embed.weight"] = torch.cat([a["embed.weight"], normal(7, 65, seed=50).to(a["embed.weight"].dtype)])
    b["embed.weight"] = b["embed.weight"][:81].clone()
    c["head.weight"] = normal(9, 64, seed=51).to(c["head.weight"].dtype)  # other classes
    b["block.weight"] = base["block.weight"].clone()
    b["norm.bias"] = base["norm.bias"].clone()
    c["position_ids"] = torch.arange(12) + 1
    d["lone.bias"] = torch.arange(21)  # no floats
    del d["pooler.weight"], d["scale"]
    for task, expert in experts.items():
        expert[f"classifier.{task}"] = normal(3, 64, seed=60)
    return experts


def leading_vector(base: Mapping, expert: Mapping, name: str) -> np.ndarray:
    """The task vector of the rows that expert and base both have: flat, float64; what is not finite counts as 0."""
    own, over = torch.atleast_1d(expert[name]), torch.atleast_1d(base[name])
    if own.shape[1:] != over.shape[1:]:
        return np.empty(0)
    count = min(len(own), len(over))
    return np.nan_to_num((own[:count].double() - over[:count].double()).numpy().reshape(-1), nan=0.0)


def vectors_of(base: Mapping, experts: Mapping, name: str) -> dict[str, np.ndarray]:
    """Task vectors of those that moved a tensor; 0 in the rows that one does not have. Small ones are not resized."""
    found = {}
    for task, expert in experts.items():
        is_float = name in expert and expert[name].is_floating_point()
        if is_float and (base[name].numel() >= 4096 or expert[name].shape == base[name].shape):
            vector = leading_vector(base, expert, name)
            if vector.any():
                found[task] = np.pad(vector, (0, base[name].numel() - vector.size))
    return found


def covering(base, experts, name, task) -> np.ndarray:
    """Which of the base's elements a task has."""
    return np.arange(base[name].numel()) < experts[task][name].numel()


def trim_of(base, experts, kept, private=()) -> dict[str, float]:
    """The smallest magnitude that a trim over all of a task's weights keeps."""
    names = [name for name, tensor in base.items() if tensor.is_floating_point() and name not in private]
    return {
        task: threshold_of(
            [
                torch.from_numpy(leading_vector(base, expert, name)).float()
                for name in names
                if name in expert and expert[name].is_floating_point()
            ],
            kept,
        )
        for task, expert in experts.items()
    }


class Due(SimpleNamespace):
    """A tensor as a formula has it.

    Attributes:
        value: float64, flat.
        delta: what was added to the base.
        size: sum of the magnitudes that went into *delta*.
        decided: False where a rounding could have tipped a choice.
    """


def consensus_due(base, experts, name, how, lambdas, *, k, scale=1.0, counted=None, trim=None, slack=0.0) -> Due:
    """base + scale * 1{at least k masks} * merged, with mask_t = |tau_t| > mask_lambda * |merged - tau_t|.

    *slack* is how far merged may be off: absolute, a number an element, beside some rounding.
    """
    over = base[name].double().numpy().reshape(-1)
    vectors = vectors_of(base, experts, name)
    size = sum(map(np.abs, vectors.values()), np.zeros(over.size))
    off = slack + 1e-6 * size
    decided = np.ones(over.size, bool)
    if how == "ties":
        kept = {task: np.where(np.abs(tau).astype(np.float32) >= trim[task], tau, 0.0) for task, tau in vectors.items()}
        total = sum(kept.values(), np.zeros(over.size))
        decided &= (np.abs(total) > 1e-6 * size) | (total == 0)
        merged = sum((np.where(tau * total > 0, tau, 0.0) for tau in kept.values()), np.zeros(over.size))
    else:
        merged = sum(vectors.values(), np.zeros(over.size))
        if how == "mean":
            having = sum((covering(base, experts, name, task) for task in vectors), np.zeros(over.size, int))
            merged = merged / np.maximum(1, having)
    masks = []
    for task in counted or experts:
        tau = vectors.get(task, np.zeros(over.size))
        limit = lambdas[task] * np.abs(merged - tau)
        masks.append((np.abs(tau) > limit) & (merged != 0))
        decided &= (np.abs(np.abs(tau) - limit) > (1 + lambdas[task]) * off) | (tau == 0)
    delta = np.where(sum(masks) >= k, scale * merged, 0.0)
    return Due(value=over + delta, delta=delta, size=abs(scale) * size, decided=decided)


# Half the distance from 1 to the next number: of the base's dtype, and of the one that is summed in.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def assert_due(found, base, name, due, *, slack=0.0, least_decided=0.999):
    """The tensor is what is due but for rounding: of what is added, in float32, and of the sum, to the base's dtype.

    Where nothing is added, it is the base bit for bit.
    """
    tensor = found[name]
    assert (tensor.dtype, tensor.shape) == (base[name].dtype, base[name].shape)
    value = tensor.double().numpy().reshape(-1)
    with np.errstate(invalid="ignore"):
        error = np.abs(value - due.value)
    smallest = 2.0**-24 if tensor.dtype == torch.float16 else 0.0  # the spacing of its subnormal numbers
    rounding = ROUNDING[tensor.dtype] + (0.0 if tensor.dtype == torch.float64 else 2.0**-24)
    bound = 1.01 * rounding * np.abs(due.value) + 1e-6 * due.size + slack + smallest
    finite = np.isfinite(base[name].double().numpy().reshape(-1))
    assert (~due.decided).sum() <= 1 + (1 - least_decided) * due.decided.size, name
    wrong = due.decided & finite & (error > bound)
    assert not wrong.any(), (name, np.flatnonzero(wrong)[:5], value[wrong][:5], due.value[wrong][:5])
    unmoved = torch.from_numpy(due.decided & (due.delta == 0))
    assert same_bits(tensor.reshape(-1)[unmoved], base[name].reshape(-1)[unmoved]), name


def assert_consensus(found, base, experts, how, lambdas, *, private=(), **options):
    """Every tensor of the base is what the formula gives on the originals."""
    assert list(found) == sorted(base)
    trim = trim_of(base, experts, 0.2, private) if how == "ties" else None
    moved = 0
    for name, tensor in base.items():
        if tensor.is_floating_point():
            due = consensus_due(base, experts, name, how, lambdas, trim=trim, **options)
            assert_due(found, base, name, due)
            moved += np.count_nonzero(due.delta)
        else:
            assert same_bits(found[name], tensor), name
    assert moved > 0


def constant(task_names, value=1.0):
    return dict.fromkeys(task_names, value)


# --- consensus: the formula -------------------------------------------------------------------------------------------

MERGES = ("sum", "mean", "ties")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bundle for each merge, with float32 merged vectors and one tensor kept whole because it was asked for."""
    base = base_model()
    experts = experts_over(base)
    root = tmp_path_factory.mktemp("merging")
    options = {"merged_dtype": "float32", "private": ("special.*",)}
    bundles = {how: pack(base, experts, root / how, method=TallMask(0.7, merge=how), **options) for how in MERGES}
    kinds = bundles["sum"].kinds("b")
    assert (kinds["block.weight"], kinds["norm.bias"], kinds["embed.weight"]) == ("same", "same", "extended")
    assert bundles["sum"].kinds("a")["special.weight"] == bundles["sum"].kinds("a")["norm.bias"] == "private"
    assert bundles["sum"].kinds("d")["pooler.weight"] == "dropped"
    assert bundles["sum"].kinds("a")["block.kernel"] == "mask"
    return SimpleNamespace(base=base, experts=experts, bundles=bundles)


def opened(packed, how="sum"):
    return tallstore.open_bundle(packed.bundles[how].root, base=packed.base)


@pytest.mark.parametrize("how", MERGES)
@pytest.mark.parametrize(("k", "scale"), [(0, 1.0), (1, 1.0), (2, 1.0), (2, 0.25), (3, -2), (4, np.float32(0.5))])
def test_consensus_is_the_formula_on_the_originals(packed, how, k, scale):
    found = opened(packed, how).consensus(k, scale)
    lambdas = constant(packed.experts, 0.7)
    assert_consensus(
        found, packed.base, packed.experts, how, lambdas, k=k, scale=float(scale), private=("special.weight",)
    )


@pytest.mark.parametrize("how", MERGES)
@pytest.mark.parametrize(("tasks", "k"), [(["c", "a"], 2), (["b"], 1), (["d", "b", "d"], 1), (["a", "b", "d"], 0)])
def test_masks_of_some_tasks_over_the_merged_vector_of_all(packed, how, tasks, k):
    found = opened(packed, how).consensus(k, tasks=tasks)
    lambdas = constant(packed.experts, 0.7)
    counted = list(dict.fromkeys(tasks))
    assert_consensus(
        found, packed.base, packed.experts, how, lambdas, k=k, counted=counted, private=("special.weight",)
    )


def test_two_masks_are_the_default(packed):
    bundle = opened(packed)
    for name, tensor in bundle.consensus().items():
        assert same_bits(tensor, bundle.consensus(2, 1.0, list(packed.experts))[name])


def test_k_0_is_task_arithmetic_and_all_of_it(packed):
    found, bundle = opened(packed).consensus(0, 0.3), packed.bundles["sum"]
    for name in ("block.kernel", "embed.weight", "norm.weight"):
        assert torch.equal(found[name], packed.base[name] + bundle.stored(name)["merged"] * 0.3)


def test_what_cannot_be_merged_stays_the_base(packed):
    """Integers, what no task moved, infinities, tensors without elements."""
    found = opened(packed).consensus(1)
    for name in ("position_ids", "is_trained", "frozen.weight", "frozen.bias", "nothing"):
        assert same_bits(found[name], packed.base[name]), name
    infinite = packed.base["attention.mask"].isinf()
    assert torch.equal(found["attention.mask"].isinf(), infinite)
    assert not torch.equal(found["attention.mask"], packed.base["attention.mask"])
    assert not torch.equal(found["head.weight"], packed.base["head.weight"])  # of the tasks that kept its classes


def test_a_merged_model_is_new_memory(packed):
    bundle = opened(packed)
    first = bundle.consensus()
    for tensor in first.values():
        tensor.zero_()
    assert all(same_bits(packed.base[name], base_model()[name]) for name in packed.base)
    second = bundle.consensus()
    assert second["frozen.weight"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", MERGES)
def test_bases_of_every_dtype(tmp_path, dtype, how):
    base = base_model(dtype)
    experts = experts_over(base)
    mask_lambda = 0.6180339887  # few tau, which are few-digit numbers here, are a tie with it
    pack(base, experts, tmp_path / "bundle", method=TallMask(mask_lambda, merge=how), merged_dtype="float32")
    found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(2, 0.5)
    assert_consensus(found, base, experts, how, constant(experts, mask_lambda), k=2, scale=0.5)


@pytest.mark.parametrize(("merged_dtype", "relative"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_merged_vectors_of_fewer_bits(tmp_path, merged_dtype, relative):
    base = base_model()
    experts = experts_over(base)
    pack(base, experts, tmp_path / "bundle", method=TallMask(0.7), merged_dtype=merged_dtype)
    found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(2)
    for name in ("block.kernel", "embed.weight", "norm.weight", "special.weight"):
        size = sum(map(np.abs, vectors_of(base, experts, name).values()))
        off = relative * size + 2.0**-24
        due = consensus_due(base, experts, name, "sum", constant(experts, 0.7), k=2, slack=off)
        assert_due(found, base, name, due, slack=off, least_decided=0.9)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_int8_is_off_by_half_a_step_of_its_row_times_the_scale(tmp_path, scale):
    base = base_model()
    experts = experts_over(base)
    packed = pack(base, experts, tmp_path / "bundle", method=TallMask(0.7))
    found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(2, scale)
    for name in ("block.kernel", "block.weight", "embed.weight", "norm.weight", "special.weight"):
        codes, steps = packed.shared(name)
        assert codes.dtype == torch.int8
        half = (steps[:, None] / 2).expand_as(rows(codes)).reshape(-1).double().numpy()
        due = consensus_due(base, experts, name, "sum", constant(experts, 0.7), k=2, scale=scale, slack=half)
        assert_due(found, base, name, due, slack=scale * half * (1 + 1e-6), least_decided=0.75)
        stored = packed.stored(name)["merged"].reshape(-1)
        moved = found[name].reshape(-1) != base[name].reshape(-1)
        assert torch.allclose(
            found[name].reshape(-1)[moved], (base[name].reshape(-1) + scale * stored)[moved], rtol=1e-6, atol=0
        )


def test_a_mask_lambda_for_each_task(tmp_path):
    """`evaluate` likes thin masks of one task and full ones of the others; small tensors follow the task's own."""
    base = base_model()
    experts = experts_over(base)

    def evaluate(task, state):
        moved = sum(int((state[name] != base[name]).sum()) for name in ("block.kernel", "norm.weight"))
        return -moved if task in "ac" else moved

    packed = pack(
        base, experts, tmp_path / "bundle", method=TallMask([0.2, 0.5, 1.5]), merged_dtype="float32", evaluate=evaluate
    )
    lambdas = {task.name: task.mask_lambda for task in packed.report.tasks}
    assert lambdas == {"a": 1.5, "b": 0.2, "c": 1.5, "d": 0.2}
    found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(2)
    assert_consensus(found, base, experts, "sum", lambdas, k=2)


@pytest.mark.parametrize("mask_lambda", [0.0, 50.0])
def test_masks_that_take_all_or_next_to_nothing(tmp_path, mask_lambda):
    """Where the fits of all tasks degenerate there is no merged vector, only tensors that are stored whole."""
    base = base_model()
    experts = experts_over(base)
    del base["embed.weight"]  # of another shape, it would be no fine-tune of the base's
    pack(base, experts, tmp_path / "bundle", method=TallMask(mask_lambda), merged_dtype="float32")
    found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(1)
    assert_consensus(found, base, experts, "sum", constant(experts, mask_lambda), k=1)


def test_tensors_over_several_chunks(tmp_path):
    base = {"w": normal(1050, 1000, seed=1), "w.bias": normal(10, seed=2)}
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", start=1)}
    experts["b"]["w"] = experts["b"]["w"][:1040].clone()
    pack(base, experts, tmp_path / "bundle", method=TallMask(0.5), merged_dtype="float32")
    for k in (1, 2):
        found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(k)
        assert_consensus(found, base, experts, "sum", constant(experts, 0.5), k=k)
    packed = pack(base, experts, tmp_path / "int8", method=TallMask(0.5))
    found = tallstore.open_bundle(tmp_path / "int8", base=base).consensus(1)["w"]
    expected = base["w"] + packed.stored("w")["merged"]
    assert torch.equal(found, torch.where(found == base["w"], found, expected))


def test_a_tensor_that_a_task_could_not_code_is_masked_by_the_formula(tmp_path):
    """A task whose fit degenerates stores its tensor whole, and is still one of those that were merged."""
    base = {"w": normal(80, 64, seed=1), "v": normal(80, 64, seed=2)}
    step = normal(80, 64, seed=3)
    experts = {"a": {"w": base["w"] + 0.5 * step, "v": base["v"] + 0.5 * step}}
    experts["b"] = {"w": base["w"] - 0.04 * step, "v": base["v"] + 0.3 * step}
    packed = pack(base, experts, tmp_path / "bundle", method=TallMask(0.01, gain="one"), merged_dtype="float32")
    assert (packed.kinds("a")["w"], packed.kinds("b")["w"]) == ("mask", "private")
    for k in (1, 2):
        found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(k)
        assert_consensus(found, base, experts, "sum", constant(experts, 0.01), k=k)


# --- consensus: whose merged vector it is -----------------------------------------------------------------------------


def test_a_merged_model_of_somebody_else(tmp_path):
    """Its vector is in the bundle for what was coded; tensors that were stored whole stay the base's."""
    base = base_model()
    experts = experts_over(base)
    given = {name: tensor for name, tensor in tuned(base, 77, 0.05).items() if name not in ("norm.weight", "norm.bias")}
    packed = pack(base, experts, tmp_path / "bundle", method=TallMask(0.7, merge=given), merged_dtype="float32")
    assert packed.kinds("a")["norm.weight"] == "private"
    found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(2, 0.5)
    for name in ("block.kernel", "embed.weight", "special.weight"):
        merged = (given[name].double() - base[name].double()).numpy().reshape(-1)
        masks = []
        for task, expert in experts.items():
            tau = vectors_of(base, experts, name).get(task, np.zeros(merged.size))
            masks.append(np.abs(tau) > 0.7 * np.abs(merged - tau))
            del expert
        delta = np.where(sum(masks) >= 2, 0.5 * merged, 0.0)
        error = np.abs(found[name].double().numpy().reshape(-1) - base[name].double().numpy().reshape(-1) - delta)
        assert (error > 1e-5).mean() < 1e-3
        assert np.count_nonzero(delta) > 100
    for name in ("norm.weight", "norm.bias", "scale", "head.weight"):
        assert same_bits(found[name], base[name]), name
    shutil.rmtree(tmp_path / "bundle" / "tasks" / "d")  # nothing is merged here, so the others are not needed
    some = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(1, tasks=["a", "b"])
    assert same_bits(some["norm.bias"], base["norm.bias"])
    assert not torch.equal(some["block.kernel"], base["block.kernel"])


def test_names_that_were_mapped(tmp_path):
    """Coded tensors know their base, and so do those that are stored whole under another name."""
    base = base_model()
    experts = experts_over(base)
    mapped = {task: {f"model.{name}": tensor for name, tensor in expert.items()} for task, expert in experts.items()}
    method = TallMask(0.7)
    pack(base, mapped, tmp_path / "bundle", method=method, merged_dtype="float32", key_mapping={"^model[.]": ""})
    found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(2)
    assert list(found) == sorted(base)
    for name in ("block.kernel", "embed.weight", "norm.weight", "norm.bias", "scale", "head.weight"):
        assert_due(found, base, name, consensus_due(base, experts, name, "sum", constant(experts, 0.7), k=2))
    assert not torch.equal(found["norm.bias"], base["norm.bias"])


@pytest.mark.parametrize("how", ["consensus", "stitch"])
def test_mapped_names_make_no_difference(tmp_path, how):
    base = base_model()
    experts = experts_over(base)
    method = TallMask(0.7) if how == "consensus" else Localize(0.2)
    found = {}
    for prefix in ("", "model."):
        named = {task: {prefix + name: tensor for name, tensor in expert.items()} for task, expert in experts.items()}
        root = tmp_path / f"bundle-{prefix}"
        pack(base, named, root, method=method, key_mapping={"^model[.]": ""}, private=["*special.weight"])
        found[prefix] = getattr(tallstore.open_bundle(root, base=base), how)()
    assert all(same_bits(tensor, found[""][name]) for name, tensor in found["model."].items())
    assert not torch.equal(found[""]["special.weight"], base["special.weight"])


def test_a_tensor_whose_name_is_the_bases_by_chance(tmp_path):
    """The expert lacks the base's tensor, and has another one of its name: it is no fine-tune of it."""
    base = base_model()
    experts = {task: dict(expert) for task, expert in experts_over(base).items()}
    for expert in experts.values():
        expert["other.bias"] = expert["norm.bias"]
    root = tmp_path / "bundle"
    pack(
        base,
        experts,
        root,
        method=TallMask(0.7),
        key_mapping={"^norm[.]bias$": "nowhere", "^other[.]bias$": "norm.bias"},
    )
    found = tallstore.open_bundle(root, base=base).consensus(2)
    due = consensus_due(base, experts, "norm.bias", "sum", constant(experts, 0.7), k=2)
    assert_due(found, base, "norm.bias", due)
    pack(base, experts, tmp_path / "lost", method=TallMask(0.7), key_mapping={"^norm[.]bias$": "nowhere"})
    lost = tallstore.open_bundle(tmp_path / "lost", base=base).consensus(2)
    assert same_bits(lost["norm.bias"], base["norm.bias"])


@pytest.fixture(params=["both names", "one name", "the other name"])
def tied(request):
    """A base whose head and embedding are one tensor, and experts that have them under one name or both."""
    plain = {"embed": normal(90, 60, seed=1), "bias": normal(9, seed=2)}
    experts = experts_of(plain, 3)
    plain["a_head"] = plain["embed"]
    due = {task: dict(expert) for task, expert in experts.items()}
    for expert in experts.values():
        if request.param != "one name":
            expert["a_head"] = expert["embed"]
        if request.param == "the other name":
            del expert["embed"]
    return plain, experts, due


def test_ties_of_weights_stay_ties(tmp_path, tied):
    base, experts, due = tied
    pack(base, experts, tmp_path / "bundle", method=TallMask(0.7), merged_dtype="float32")
    found = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus(2)
    assert sorted(found) == ["a_head", "bias", "embed"]
    assert found["a_head"] is found["embed"]
    for name in ("embed", "bias"):
        assert_due(found, base, name, consensus_due(base, due, name, "sum", constant(due, 0.7), k=2))


def test_a_tie_that_only_other_tasks_have(tmp_path, tied):
    """The merged vector goes by the name that they have; the masks that are counted are empty."""
    base, experts, due = tied
    base["w"] = normal(80, 60, seed=4)
    for seed, expert in enumerate(experts.values()):
        expert["w"] = base["w"] + 0.01 * normal(80, 60, seed=20 + seed)
    last = experts["c"] = {"w": experts["c"]["w"]}
    packed = pack(base, experts, tmp_path / "bundle", method=TallMask(0.7), merged_dtype="float32")
    assert packed.kinds("c") == dict.fromkeys(["a_head", "bias"], "dropped") | {"w": "mask"}
    bundle = tallstore.open_bundle(tmp_path / "bundle", base=base)
    due["c"] = last
    for k in (0, 1):
        found = bundle.consensus(k, tasks=["c"])
        assert found["a_head"] is found["embed"]
        formula = consensus_due(base, due, "embed", "sum", constant(due, 0.7), k=k, counted=["c"])
        assert formula.delta.any() == (k == 0)
        assert_due(found, base, "embed", formula)


def test_experts_that_untied_what_the_base_ties(tmp_path):
    base = {"embed": normal(90, 60, seed=1), "w": normal(80, 60, seed=2)}
    base["head"] = base["embed"]
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", start=1)}
    pack(base, experts, tmp_path / "alike", method=TallMask(0.7), merged_dtype="float32")
    found = tallstore.open_bundle(tmp_path / "alike", base=base).consensus(2)
    assert not torch.equal(found["head"], found["embed"])
    assert_consensus(found, base, experts, "sum", constant(experts, 0.7), k=2)

    experts["c"] = tuned({name: base[name] for name in ("embed", "w")}, 3)
    experts["c"]["head"] = experts["c"]["embed"]
    pack(base, experts, tmp_path / "mixed", method=TallMask(0.7), merged_dtype="float32")
    with pytest.raises(OptionError, match="'c' has 'embed' and 'head' tied, and others of its group have not"):
        tallstore.open_bundle(tmp_path / "mixed", base=base).consensus(2)


# --- consensus: what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k is 5; give how many of the 4 masks must agree, from 0 to 4"),
        ({"k": -1}, "k is -1; give"),
        ({"k": 1.5}, "k is 1.5; give"),
        ({"k": "2"}, "k is '2'; give"),
        ({"k": 2, "tasks": ["a"]}, "k is 2; give how many of the 1 masks"),
        ({"scale": float("nan")}, "scale is nan; give a finite number"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": "1"}, "scale is '1'"),
        ({"tasks": []}, "tasks: there are none"),
        ({"tasks": "a"}, "tasks is 'a'; give a list of names"),
    ],
)
def test_arguments_out_of_range(packed, arguments, message):
    with pytest.raises(OptionError, match=message):
        opened(packed).consensus(**arguments)


def test_a_task_that_is_not_there(packed):
    with pytest.raises(UnknownTaskError, match="no task named 'e'"):
        opened(packed).consensus(tasks=["a", "e"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SignedMask(), "which signed-mask does not have; pack with TallMask"),
        (Localize(0.1), "which localize does not have; pack with TallMask"),
        (TallMask(normalise=True), "which tall-mask, normalised does not have; pack with TallMask"),
    ],
)
def test_consensus_of_other_methods_is_refused(tmp_path, method, message):
    base = {"w": normal(80, 60)}
    pack(base, experts_of(base), tmp_path / "bundle", method=method)
    with pytest.raises(OptionError, match=message):
        tallstore.open_bundle(tmp_path / "bundle", base=base).consensus()


def test_stitching_of_other_methods_is_refused(packed):
    with pytest.raises(
        OptionError, match="stitch: needs sparse experts, and these are of tall-mask; pack with Localize"
    ):
        opened(packed).stitch()


def test_tasks_of_several_groups_share_no_vector(tmp_path):
    base = {"w": torch.ones(20)}
    groups = [Group(tmp_path / "bundle", base, number) for number in (1, 2)]
    tasks = [Task(group, name) for group, name in zip(groups, "ab", strict=True)]
    for task in tasks:
        task.same("w")
    bundle = tallstore.open_bundle(Bundle(tmp_path / "bundle", base, groups, tasks).seal())
    for merge in (bundle.consensus, bundle.stitch):
        with pytest.raises(OptionError, match="'a' is of group g0001, 'b' of g0002; give tasks of one group"):
            merge()


def by_method(root, name, parameters, fill, *, chosen=None, others=()):
    """A bundle of two tasks that says it was packed by such a method; *fill* adds to a task what it has.

    *others* are tasks of a second group, all else alike.
    """
    base = {"w": normal(40, seed=1), "v": normal(30, seed=2)}
    groups = [Group(root, base, number) for number in range(1, 3 if others else 2)]
    for group in groups:
        group.vector("w", "F32", normal(40, seed=3))
    tasks = [*(Task(groups[0], task) for task in "ab"), *(Task(groups[1], task) for task in others)]
    for task in tasks:
        fill(task)
    method = tables.Method(name=name, parameters=parameters)

    def rename(table):
        if isinstance(table, tables.Manifest):
            entries = tuple(msgspec.structs.replace(entry, method=method) for entry in table.groups)
            return msgspec.structs.replace(table, groups=entries)
        return msgspec.structs.replace(table, method=method)

    return Bundle(
        root,
        base,
        groups,
        tasks,
        edit_manifest=rename,
        edit_group=rename,
        edit_task=lambda table: msgspec.structs.replace(table, chosen=chosen or {}),
    ).seal()


def masked(task):
    task.mask("w", np.arange(40) % 2)
    task.private("v", torch.ones(30))


def signed(task):
    task.signed("w", np.arange(40) % 3)
    task.same("v")


TALL = {"mask_lambda": 1.0, "merge": "sum", "normalise": False}


@pytest.mark.parametrize(
    ("parameters", "fill", "message"),
    [
        (TALL | {"merge": "ties"}, masked, "task 'a' does not record its trim_threshold; pack it again"),
        (TALL | {"mask_lambda": [0.2, 0.4]}, masked, "task 'a' does not record its mask_lambda; pack it again"),
        (TALL | {"merge": "slerp"}, masked, "the group says that it was merged by 'slerp'"),
        ({}, masked, "the group says that it was merged by None"),
        (TALL, signed, "task 'a' has no mask for 'w'"),
    ],
)
def test_bundles_that_do_not_say_what_is_needed(tmp_path, parameters, fill, message):
    root = by_method(tmp_path / "bundle", "tall-mask", parameters, fill)
    with pytest.raises(OptionError, match=message):
        tallstore.open_bundle(root).consensus(1)


def test_what_the_tasks_record_is_enough(tmp_path):
    chosen = {"mask_lambda": 0.5, "trim_threshold": 0.25}
    parameters = TALL | {"merge": "ties", "mask_lambda": [1, 2]}
    root = by_method(tmp_path / "bundle", "tall-mask", parameters, masked, chosen=chosen)
    with tallstore.open_bundle(root) as bundle:
        found, base = bundle.consensus(2), bundle._pinned()
        v, w = base.read("v", 0, 30), base.read("w", 0, 40)
        merged = normal(40, seed=3)
        assert torch.equal(found["w"], torch.where(torch.arange(40) % 2 == 1, w + merged, w))
        tau = 1 - v
        kept = torch.where(tau.abs() >= 0.25, tau, 0.0)
        assert torch.equal(
            found["v"], torch.where((tau.abs() > 0.5 * (2 * kept - tau).abs()) & (kept != 0), v + 2 * kept, v)
        )


def test_tasks_of_other_groups_are_none_of_the_merged_ones(tmp_path):
    parameters = TALL | {"mask_lambda": 0.2}
    alone = by_method(tmp_path / "alone", "tall-mask", parameters, masked)
    beside = by_method(tmp_path / "beside", "tall-mask", parameters, masked, others=("y", "z"))
    due = tallstore.open_bundle(alone).consensus(2)
    found = tallstore.open_bundle(beside).consensus(2, tasks=["a", "b"])
    assert all(same_bits(found[name], due[name]) for name in ("w", "v"))


# --- consensus: partial, damaged and large bundles --------------------------------------------------------------------


def test_a_partial_bundle_merges_what_is_here_unless_it_needs_the_rest(tmp_path, packed):
    """A mask of the shared vector needs no other task's files; the vector of a tensor that is stored whole does."""
    weights = ("block.kernel", "block.weight", "frozen.weight", "norm.weight", "position_ids")
    base = {name: packed.base[name] for name in weights}
    experts = {task: {name: expert[name] for name in weights} for task, expert in packed.experts.items()}
    pack(base, experts, tmp_path / "coded", method=TallMask(0.7), merged_dtype="float32")
    whole = shutil.copytree(packed.bundles["sum"].root, tmp_path / "whole")
    due = tallstore.open_bundle(tmp_path / "coded", base=base).consensus(2, tasks=["a", "c"])
    for root in (tmp_path / "coded", whole):
        shutil.rmtree(root / "tasks" / "d")
    bundle = tallstore.open_bundle(tmp_path / "coded", base=base)
    found = bundle.consensus(2, tasks=["a", "c"])
    assert all(same_bits(found[name], due[name]) for name in weights)
    with pytest.raises(NotFetchedError, match="'d'"):
        bundle.consensus()
    with pytest.raises(NotFetchedError, match="'d'"):
        tallstore.open_bundle(whole, base=packed.base).consensus(2, tasks=["a", "c"])


def test_k_0_takes_what_only_other_tasks_moved(tmp_path):
    """Of a tensor that is stored whole, too, and though no task that is counted stores one."""
    base = {"w": normal(80, 60, seed=1), "bias": normal(60, seed=2)}
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", start=1)}
    experts["a"]["bias"] = base["bias"].clone()
    pack(base, experts, tmp_path / "bundle", method=TallMask(0.7), merged_dtype="float32")
    bundle = tallstore.open_bundle(tmp_path / "bundle", base=base)
    assert_consensus(bundle.consensus(0, tasks=["a"]), base, experts, "sum", constant(experts, 0.7), k=0)
    assert same_bits(bundle.consensus(1, tasks=["a"])["bias"], base["bias"])


@pytest.mark.parametrize("place", ["tasks/b/mask-*", "tasks/b/private-*", "groups/g0001/merged-*"])
def test_changed_bytes_are_never_merged(tmp_path, packed, place):
    root = shutil.copytree(packed.bundles["sum"].root, tmp_path / "bundle")
    [path] = root.glob(place)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError):
        tallstore.open_bundle(root, base=packed.base).consensus()


@pytest.mark.parametrize("how", ["consensus", "stitch"])
def test_more_tasks_than_may_be_open_at_once(tmp_path, monkeypatch, how):
    base = {"w": normal(80, 60)}
    tasks = [f"task {number}" for number in range(30)]
    experts = {task: tuned(base, seed) for seed, task in enumerate(tasks)}
    method = TallMask(0.1) if how == "consensus" else Localize(0.1)
    pack(base, experts, tmp_path / "bundle", method=method)
    due = getattr(tallstore.open_bundle(tmp_path / "bundle", base=base), how)()["w"]
    assert not torch.equal(due, base["w"])
    monkeypatch.setattr(merging, "MAX_HELD", 10)
    with few_files(monkeypatch):
        assert same_bits(getattr(tallstore.open_bundle(tmp_path / "bundle", base=base), how)()["w"], due)


# --- stitching --------------------------------------------------------------------------------------------------------


class Stitchable:
    """A bundle of sparse experts, its originals and what is due."""

    def __init__(self, root, base, experts, method, private=()):
        self.base, self.experts, self.method, self.private = base, experts, method, private
        self.packed: Packed = pack(base, experts, root, method=method, private=private)
        self.trim = {} if method.masks else trim_of(base, experts, method.density, private)

    def open(self):
        return tallstore.open_bundle(self.packed.root, base=self.base)

    def due(self, name, counted=None) -> Due:
        """base + sum of mask_t * tau_t / number of masks; tau_t as stored, mask_t from the original."""
        over = self.base[name].double().numpy().reshape(-1)
        total, count, size = np.zeros(over.size), np.zeros(over.size), np.zeros(over.size)
        for task, tau in vectors_of(self.base, self.experts, name).items():
            if task in (counted or self.experts):
                mask = self._mask(task, name, tau)
                total += np.where(mask, self._stored(task, name, tau, mask), 0.0)
                count += mask
                size += np.abs(tau)
        delta = total / np.maximum(1, count)
        return Due(value=over + delta, delta=delta, size=size, decided=np.ones(over.size, bool))

    def _mask(self, task, name, tau):
        if not self.method.masks:
            return (np.abs(tau).astype(np.float32) >= np.float32(self.trim[task])) & (tau != 0)
        given = self.method.masks[task].get(name)
        if self.packed.kinds(task)[name] == "private":
            return tau != 0
        mask = np.zeros(tau.size, bool)
        if given is not None:
            flat = given.numpy().reshape(-1)[: tau.size]
            mask[: flat.size] = flat
        return mask & (tau != 0)

    def _stored(self, task, name, tau, mask):
        """The values of a task: its own where it is stored whole, else what its payload has, in its unit."""
        if self.packed.kinds(task)[name] == "private":
            return tau
        unit = self.packed.unit(task, name)
        values = self.packed.values(task, name).double().numpy() * unit
        found = np.zeros(tau.size)
        assert mask.sum() == values.size, (task, name)
        found[mask] = values
        bits = {"float32": 23, "float16": 10, "bfloat16": 7}[self.method.values_dtype]
        assert (np.abs(found - tau)[mask] <= 2.0 ** -(bits + 1) * np.abs(tau)[mask] + 2.0**-24 * unit).all()
        return found

    def check(self, found, counted=None):
        assert list(found) == sorted(self.base)
        moved = 0
        for name, tensor in self.base.items():
            if tensor.is_floating_point():
                due = self.due(name, counted)
                assert_due(found, self.base, name, due)
                moved += np.count_nonzero(due.delta)
            else:
                assert same_bits(found[name], tensor), name
        assert moved > 0


@pytest.fixture(scope="module")
def stitchable(tmp_path_factory):
    base = base_model()
    root = tmp_path_factory.mktemp("stitching") / "bundle"
    return Stitchable(root, base, experts_over(base), Localize(0.2), ("special.weight",))


def test_stitching_is_the_mean_of_what_tasks_claim(stitchable):
    assert stitchable.packed.kinds("a")["norm.bias"] == stitchable.packed.kinds("a")["special.weight"] == "private"
    assert stitchable.packed.kinds("a")["embed.weight"] == stitchable.packed.kinds("b")["embed.weight"] == "extended"
    assert stitchable.packed.kinds("a")["block.weight"] == "sparse"
    found = stitchable.open().stitch()
    stitchable.check(found)
    whole = stitchable.due("norm.bias")
    assert 0 < np.count_nonzero(whole.delta) < whole.delta.size  # small tensors have a mask too


@pytest.mark.parametrize("tasks", [["b"], ["d", "a"], ["c", "b", "c", "a"]])
def test_some_tasks_are_stitched(stitchable, tasks):
    stitchable.check(stitchable.open().stitch(tasks), tasks)


@pytest.mark.parametrize("gain", ["published", "one", "least-squares"])
@pytest.mark.parametrize("values_dtype", ["float16", "float32", "bfloat16"])
def test_stitching_of_all_values_and_gains(tmp_path, gain, values_dtype):
    base = base_model()
    method = Localize(0.3, gain=gain, values_dtype=values_dtype)
    case = Stitchable(tmp_path / "bundle", base, experts_over(base), method)
    gains = case.packed.gains("a", "block.kernel").item()
    assert (gains == case.packed.unit("a", "block.kernel")) == (gain != "one")
    case.check(case.open().stitch())
    plain = Stitchable(tmp_path / "plain", base, case.experts, Localize(0.3, values_dtype=values_dtype)).open().stitch()
    assert all(same_bits(tensor, plain[name]) for name, tensor in case.open().stitch().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stitching_on_bases_of_every_dtype(tmp_path, dtype):
    base = base_model(dtype)
    case = Stitchable(tmp_path / "bundle", base, experts_over(base), Localize(0.2, values_dtype="float32"))
    case.check(case.open().stitch())


def test_stitching_by_masks_that_were_given(tmp_path):
    """What is stored whole is claimed wherever it moved; a value that float16 loses still counts as a claim."""
    base = base_model()
    experts = experts_over(base)
    random = np.random.default_rng(0)
    masks = {
        task: {name: torch.from_numpy(random.random(tuple(base[name].shape)) < 0.3) for name in names}
        for task, names in (
            ("a", ["block.kernel", "embed.weight", "norm.weight"]),
            ("b", ["block.kernel", "norm.weight"]),
            ("c", ["embed.weight", "norm.weight"]),
            ("d", []),
        )
    }
    base["norm.weight"][:100] = 0.0
    for task in "abc":
        masks[task]["norm.weight"][:100] = True
    experts["a"]["norm.weight"][:100] = 1e-10
    experts["a"]["norm.bias"][:20] = base["norm.bias"][:20]
    method = Localize(masks=masks)
    case = Stitchable(tmp_path / "bundle", base, experts, method)
    found = case.open().stitch()
    case.check(found)
    assert (case.packed.values("a", "norm.weight") == 0).any()


def test_stitching_over_several_chunks(tmp_path):
    base = {"w": normal(1050, 1000, seed=1), "w.bias": normal(10, seed=2)}
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab", start=1)}
    experts["b"]["w"] = experts["b"]["w"][:1040].clone()
    case = Stitchable(tmp_path / "bundle", base, experts, Localize(0.3))
    case.check(case.open().stitch())


def test_stitching_keeps_ties(tmp_path, tied):
    base, experts, due = tied
    case = Stitchable(tmp_path / "bundle", base, experts, Localize(0.3))
    found = case.open().stitch()
    assert found["a_head"] is found["embed"]
    plain = Stitchable(tmp_path / "plain", {name: base[name] for name in ("embed", "bias")}, due, Localize(0.3))
    assert same_bits(found["embed"], plain.open().stitch()["embed"])


def test_a_group_that_is_called_sparse_and_is_not(tmp_path):
    root = by_method(tmp_path / "bundle", "localize", {}, signed)
    with pytest.raises(OptionError, match="task 'a' has no values of its own for 'w'"):
        tallstore.open_bundle(root).stitch()


# --- the result as a checkpoint ---------------------------------------------------------------------------------------


def write(directory, state):
    """Write a state dict with the project's own writer."""
    directory.mkdir()
    specs = {name: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in state.items()}
    write_checkpoint(directory, specs, lambda name: [raw_bytes(state[name]).tobytes()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_a_checkpoint_that_loads(tmp_path, dtype):
    base = base_model(dtype)
    pack(base, experts_over(base), tmp_path / "bundle", method=TallMask())
    merged = tallstore.open_bundle(tmp_path / "bundle", base=base).consensus()
    write(tmp_path / "merged", merged)
    loaded = load_file(tmp_path / "merged" / "model.safetensors")
    assert sorted(loaded) == sorted(merged)
    assert all(same_bits(loaded[name], merged[name]) for name in merged)


@pytest.mark.slow
def test_a_merged_model_loads_into_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for seed, task in enumerate("abc"):
        (tmp_path / task).mkdir()
        shutil.copy(tmp_path / "base" / "config.json", tmp_path / task)
        save_file(tuned(base, seed), tmp_path / task / "model.safetensors", {"format": "pt"})
    experts = {task: tmp_path / task for task in "abc"}
    pack(tmp_path / "base", experts, tmp_path / "bundle", method=TallMask())
    merged = tallstore.open_bundle(tmp_path / "bundle", base=tmp_path / "base").consensus()
    write(tmp_path / "merged", merged)
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "bert"
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "merged").state_dict()
    assert set(merged) <= set(loaded)
    assert all(torch.equal(loaded[name], merged[name]) for name in merged)
    assert not torch.equal(merged["encoder.layer.0.output.dense.weight"], base["encoder.layer.0.output.dense.weight"])
