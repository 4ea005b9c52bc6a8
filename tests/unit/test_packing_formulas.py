"""Packed and read back, every method gives what its formula gives in float64, for every gain it has."""

from __future__ import annotations

import pytest
import torch

from tallstore import Emr, LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform
from tests import fit_reference
from tests.packing_cases import experts_of, normal, pack
from tests.reference import r13, same_bits

BASE = {
    "rows": normal(13, 8, 3, 17, seed=1),
    "short": normal(300, 20, seed=3),
    "vector": normal(5003, seed=4),
    "small": normal(7, seed=5),
}
EXPERTS = experts_of(BASE, 4)
EXPERTS["d"]["short"] = BASE["short"].clone()
EXPERTS["a"]["rows"][::3] = BASE["rows"][::3] + 1e3 * (EXPERTS["a"]["rows"] - BASE["rows"])[::3] ** 3  # heavy tails
MERGED = {
    name: BASE[name] + factor * sum(expert[name] - BASE[name] for expert in EXPERTS.values())
    for name, factor in (("rows", 0.3), ("short", 1.0), ("vector", 2.0))
}
MASKS = {
    task: {
        name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(position)) < 0.2
        for position, (name, tensor) in enumerate(BASE.items())
        if name != "vector" or task == "a"
    }
    for task in EXPERTS
}
GAINS = ("one", "least-squares", "published")
METHODS = [
    *(SignedMask(threshold, scale, gain) for threshold, scale in ((1.2, "tensor"), (0.8, "row")) for gain in GAINS),
    SignedMask(0),
    SignedMask(1e9),  # nothing exceeds it: every sign instead
    *(TallMask(0.8, merge, gain) for merge in ("sum", "mean", "ties") for gain in GAINS),
    *(TallMask(0.6, merge, normalise=True) for merge in ("sum", "mean", "ties")),
    *(TallMask(0.5, MERGED, gain) for gain in GAINS),
    *(Emr(gain) for gain in GAINS),
    *(LeastSquares(levels, "row", gain) for levels in (1, 2) for gain in GAINS),
    LeastSquares(1, "tensor"),
    LeastSquares(2, "tensor"),
    *(Sign(scale, gain) for scale in ("tensor", "row") for gain in GAINS),
    *(Sign(scale, gain, centre=True) for scale in ("tensor", "row") for gain in GAINS[:2]),
    *(Uniform(levels, "row", gain) for levels in (3, 8) for gain in GAINS),
    *(Uniform(levels, "tensor", gain) for levels in (3, 8) for gain in GAINS[1:]),
    *(Uniform(levels, scale, "published") for levels in (4, 16) for scale in ("tensor", "row")),
    *(Uniform(3, scale, threshold=threshold) for scale in ("tensor", "row") for threshold in (0.0, 1.0)),
    *(Uniform(levels, "row", gain, centre=True) for levels in (4, 16) for gain in GAINS),
    *(Localize(0.1, gain=gain) for gain in GAINS),
    *(Localize(0.1, MASKS, gain) for gain in GAINS),
    Localize(1.0, values_dtype="bfloat16"),
    Localize(1.0, values_dtype="float32"),
]


def label(method):
    """A short name: not the tensors."""
    return f"{method.name}-{'-'.join(str(value) for value in method.parameters.values())}"


def shares(method):
    """Whether it merges anything."""
    return not isinstance(method, Localize)


def expected_of(method):
    """The formulas by tensor and task. Uniform's scale of a tensor is of least squares, which a gain of one undoes."""
    return fit_reference.formulas(method, BASE, EXPERTS)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_experts_are_the_formulas(tmp_path, method):
    """To 2^-12 of what is added: gains and scales have 13 bits; and two units in the last place of the sum."""
    options = {"merged_dtype": "float32"} if shares(method) else {}
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=method, **options)
    formulas = expected_of(method)
    assert formulas.keys() == {"rows", "short", "vector"}
    for name, by_task in formulas.items():
        for task, formula in by_task.items():
            assert packed.kinds(task)[name] not in {"private", "same"}, packed.whole(task)
            gains = packed.gains(task, name).tolist()
            assert gains == [r13(gain) for gain in gains]
            assert len(gains) == (13 if getattr(method, "scale", "tensor") == "row" and name == "rows" else 1)
            tau = fit_reference.task_vector(BASE[name], EXPERTS[task][name])
            step = formula.step(tau, method.parameters["gain"])
            found = packed.states[task][name].double() - BASE[name].double()
            bound = 2.0**-12 * step.abs() + 2.0**-22 * (BASE[name].double().abs() + step.abs())
            if formula.centre is not None:
                bound += 2.0**-12 * (step - formula.fixed).abs()
            wrong = ((found - step).abs() > bound) & formula.decided
            assert not wrong.any(), (name, task, (found - step)[wrong][:3], step[wrong][:3])
            assert formula.decided.float().mean() > 0.99, (name, task)


@pytest.mark.parametrize("method", [method for method in METHODS if method.parameters["gain"] == "one"], ids=label)
def test_gain_one_goes_the_whole_way_along_every_task_vector(tmp_path, method):
    """To the 13 bits of a gain, in the shared dtype that the method takes by itself."""
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=method)
    for name in ("rows", "short", "vector"):
        for task, expert in EXPERTS.items():
            if packed.kinds(task)[name] == "same" or not packed.codes(task, name).any():
                continue
            tau = fit_reference.task_vector(BASE[name], expert[name])
            _, gain = fit_reference.cosine_and_gain([(packed.states[task][name].double() - BASE[name].double(), tau)])
            # A centre of 8 bits, and with gains by row a row, are rounded themselves: 2^-12 each at most.
            assert gain == pytest.approx(1, abs=2.0**-12), (name, task)


def test_the_published_gain_of_a_merge_is_one(tmp_path):
    for method in (TallMask.published(), TallMask(merge="mean", gain="published"), TallMask(0.5, MERGED, "published")):
        packed = pack(BASE, EXPERTS, tmp_path / label(method), method=method)
        assert {packed.gains(task, "rows").item() for task in EXPERTS} == {1.0}


def test_the_published_gain_of_emr_is_one_number_a_task(tmp_path):
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=Emr("published"))
    for task in EXPERTS:
        names = ["rows", "vector", *(["short"] if task != "d" else [])]
        assert len({packed.gains(task, name).item() for name in names}) == 1
    assert len({packed.gains(task, "rows").item() for task in EXPERTS}) == 4


# --- codes ------------------------------------------------------------------------------------------------------------

SELECTING = [
    SignedMask(),
    SignedMask(0.8, "row"),
    TallMask(0.8),
    TallMask(0.8, "mean"),
    TallMask(0.8, "ties"),
    TallMask(0.6, normalise=True),
    TallMask(0.5, MERGED),
    Emr(),
    LeastSquares(1),
    LeastSquares(2),
    LeastSquares(1, "tensor"),
    LeastSquares(2, "tensor"),
    Sign(),
    Sign(centre=True),
    Sign("row", centre=True),
]


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("method", SELECTING, ids=label)
def test_codes_are_chosen_by_the_shared_vectors_as_stored(tmp_path, method, dtype):
    """Bit for bit."""
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=method, merged_dtype=dtype)
    for name, vectors in fit_reference.moved_tensors(BASE, EXPERTS).items():
        stored = packed.stored(name)
        for task, tau in vectors.items():
            due = fit_reference.codes_due(method, tau, stored, alone=len(vectors) == 1)
            assert same_bits(packed.codes(task, name), due), (name, task)


@pytest.mark.parametrize("levels", [3, 4, 8, 16])
def test_codes_of_uniform_levels_are_those_of_the_truest_width(tmp_path, levels):
    """Of every row on its own; short rows are one."""
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=Uniform(levels))
    factors = set()
    for name, vectors in fit_reference.moved_tensors(BASE, EXPERTS).items():
        for task, tau in vectors.items():
            rows, offset = fit_reference.rows(tau).double(), 1 if levels == 3 else (levels - 1) / 2
            level = packed.codes(task, name).double().view_as(rows) - offset
            width = fit_reference.NORMAL_WIDTH[levels] * fit_reference.row_rms(tau)
            tried = [fit_reference.level_of(rows, factor * width, levels)[0] for factor in fit_reference.WIDTH_FACTORS]
            cosines = torch.stack([fit_reference.cosine(one, rows) for one in tried])
            torch.testing.assert_close(fit_reference.cosine(level, rows), cosines.amax(0), rtol=1e-6, atol=0)
            factors |= set(cosines.argmax(0).tolist())
    assert len(factors) > 1


@pytest.mark.parametrize("values_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("method", [Localize(0.1), Localize(0.1, MASKS)], ids=label)
def test_sparse_values_are_those_of_the_set_bits(tmp_path, method, values_dtype):
    method = Localize(method.density, method.masks, values_dtype=values_dtype)
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=method)
    for name, by_task in expected_of(method).items():
        for task, formula in by_task.items():
            kept = packed.codes(task, name) != 0
            assert torch.equal(kept, formula.sides != 0)
            entry = packed.entry(task, name)
            assert entry.count == kept.sum().item()
            assert (entry.values is None) == (entry.count == 0)
            values = packed.values(task, name).double() * packed.unit(task, name)
            torch.testing.assert_close(values, formula.sides[kept], rtol=2.0**-12, atol=0)


def test_float32_values_bring_the_expert_back_but_for_the_rounding_of_its_difference(tmp_path):
    packed = pack(BASE, EXPERTS, tmp_path / "bundle", method=Localize(1.0, values_dtype="float32"))
    for task, expert in EXPERTS.items():
        for name in ("rows", "short", "vector"):
            tau = fit_reference.task_vector(BASE[name], expert[name])
            assert same_bits(packed.states[task][name], BASE[name] + tau)


def test_the_share_of_localize_is_over_all_parameters_but_the_private_ones(tmp_path):
    """Small tensors and tensors that did not move count; what moved most is kept wherever it is."""
    experts = {task: dict(expert) for task, expert in EXPERTS.items()}
    experts["b"]["vector"] = BASE["vector"] + 10 * (experts["b"]["vector"] - BASE["vector"])
    packed = pack(BASE, experts, tmp_path / "bundle", method=Localize(0.05), private="short")
    total = sum(tensor.numel() for name, tensor in BASE.items() if name != "short")
    for task in experts:
        counts = {name: packed.entry(task, name).count for name in ("rows", "vector")}
        moved = [fit_reference.task_vector(BASE[name], experts[task][name]) for name in ("rows", "vector", "small")]
        threshold = fit_reference.threshold_of(moved, 0.05)
        assert counts == {name: (tau.abs() >= threshold).sum().item() for name, tau in zip(counts, moved, strict=False)}
        assert int(total * 0.05) - 7 < sum(counts.values()) <= int(total * 0.05) + 1
    assert packed.entry("b", "rows").count == 0
    assert same_bits(packed.states["b"]["rows"], BASE["rows"])
