"""Whatever is packed comes back: properties of pack and open over models of any shapes, dtypes and differences."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tallstore import Emr, LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform
from tallstore.fit.ties import trim_threshold
from tests import fit_reference
from tests.packing_cases import assert_same, contents, normal, pack

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GAINS, SCALES = st.sampled_from(["one", "least-squares", "published"]), st.sampled_from(["tensor", "row"])
METHODS = st.one_of(
    st.builds(SignedMask, st.floats(0, 3), SCALES, GAINS),
    st.builds(TallMask, st.floats(0, 2), st.sampled_from(["sum", "ties", "mean"]), GAINS, st.booleans()),
    st.builds(Emr, GAINS),
    st.builds(LeastSquares, st.sampled_from([1, 2]), SCALES, GAINS),
    st.builds(Sign, SCALES, GAINS),
    st.builds(Sign, SCALES, st.sampled_from(["one", "least-squares"]), st.just(value=True)),
    st.builds(Uniform, st.just(3), SCALES, GAINS, st.none() | st.floats(0, 2)),
    st.builds(Uniform, st.sampled_from([4, 8, 16]), SCALES, GAINS, st.none(), st.booleans()),
    st.builds(Localize, st.floats(0.001, 1), st.none(), GAINS, st.sampled_from(["float16", "bfloat16", "float32"])),
)
CODED = {"mask", "signed", "two-level", "sign", "sparse", "uniform"}
SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from([0, 1, 13, 4095, 4096, 5003])),
    st.tuples(st.sampled_from([1, 2, 63, 70]), st.sampled_from([0, 1, 65, 127])),
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 13), st.integers(1, 17)),
)


@st.composite
def models(draw):
    """A base and two to four experts: tensors moved, equal, lacking, resized, of other dtypes, or of integers."""
    seed = draw(st.integers(0, 10_000))
    base, experts = {"anchor": normal(66, 65, seed=seed)}, {}
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from([*FLOATS, torch.int32]))
        base[f"tensor {number}"] = (normal(*draw(SHAPES), seed=seed + number + 1) * 3).to(dtype)
    for task in range(draw(st.integers(2, 4))):
        expert = {}
        for position, (name, tensor) in enumerate(base.items()):
            changes = ["moved", "same", "other dtype"]
            if name != "anchor":
                changes += ["lacking", "zero"]
                changes += ["longer", "shorter"] if tensor.ndim else []
            change = draw(st.sampled_from(changes))
            if change == "lacking":
                continue
            scale = 0 if change == "same" else draw(st.sampled_from([1e-4, 0.02, 1.0]))
            moved = tensor.double() + normal(*tensor.shape, seed=seed + 100 * task + position + 7, scale=scale).double()
            moved = moved.to(tensor.dtype if change != "other dtype" else draw(st.sampled_from(FLOATS)))
            if change == "longer":
                moved = torch.cat([moved, torch.ones(3, *tensor.shape[1:]).to(moved.dtype)])
            elif change == "shorter":
                moved = moved[: tensor.shape[0] * 9 // 10]
            expert[name] = torch.zeros_like(moved) if change == "zero" else moved
        if draw(st.booleans()):
            expert["head"] = torch.full((3, 5), torch.nan)
        experts[f"task {task}"] = expert
    return base, experts


@settings(max_examples=40)
@given(models(), METHODS)
def test_what_is_not_coded_is_bit_exact_and_what_is_has_its_gain(model, method):
    """Names, dtypes and shapes come back; whole, same and further rows bit for bit; and the gain that is reported."""
    base, experts = model
    with tempfile.TemporaryDirectory() as directory:
        packed = pack(base, experts, Path(directory) / "bundle", method=method)
        for task, expert in experts.items():
            state, kinds, pairs = packed.states[task], packed.kinds(task), []
            assert sorted(state) == sorted(expert)
            assert {name for name, kind in kinds.items() if kind == "dropped"} == base.keys() - expert.keys()
            for name, tensor in expert.items():
                found, kind = state[name], kinds[name]
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                rows = None
                if kind == "extended":
                    rows = min(base[name].shape[0], tensor.shape[0])
                    kind = packed.entry(task, name).leading.__struct_config__.tag
                if kind not in CODED:
                    assert_same({name: found}, {name: tensor})
                    continue
                if rows is not None:
                    assert_same({name: found[rows:]}, {name: tensor[rows:]})
                tau = fit_reference.task_vector(base[name][:rows], tensor[:rows])
                pairs.append((found[:rows].double() - base[name][:rows].double(), tau))
            reported = next(entry for entry in packed.report.tasks if entry.name == task)
            assert (reported.gain is None) == (not pairs)
            if pairs:
                _, gain = fit_reference.cosine_and_gain(pairs)
                assert abs(reported.gain - gain) <= 1e-5 * max(1, abs(gain))


@settings(max_examples=10)
@given(models(), METHODS)
def test_packing_is_a_function_of_its_inputs(model, method):
    """Twice the same inputs, twice the same files."""
    base, experts = model
    with tempfile.TemporaryDirectory() as directory:
        for name in ("one", "two"):
            pack(base, experts, Path(directory) / name, method=method)
        assert contents(Path(directory) / "one") == contents(Path(directory) / "two")


@settings(max_examples=50)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    st.floats(0, 0.999),
    st.integers(1, 50),
)
def test_the_trims_threshold_is_exact(numbers, kept, length):
    """The k-th smallest magnitude, over the whole range of float32, whatever the pieces."""
    vector = torch.tensor(numbers, dtype=torch.float32)
    expected = vector.abs().kthvalue(len(numbers) - int(len(numbers) * kept)).values.item()
    assert trim_threshold(lambda: iter(vector.split(length)), kept) == expected
