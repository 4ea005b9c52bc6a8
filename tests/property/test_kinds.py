"""Any coded tensor: every kind, every dtype, with a centre and without, whole and in ranges, is the reference's."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tallstore
from tallstore.format.payloads import row_count
from tallstore.loading import decode
from tests import reference
from tests.bundle_builder import Bundle, Group, Task
from tests.number_cases import base_patterns, numbers_for

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHARED = ["LOG4", "I8", "BF16", "F16", "F32"]
SHAPES = [(), (1,), (13,), (7, 5), (40, 1), (2, 3, 2, 2)]
KINDS = ["mask", "signed", "two-level", "sign", "sparse", "uniform"]
GAINS = [1.0, -0.75, 0.0, 2.0**-60, 1 + 2.0**-12, -(2.0**9), 2.0**-9]
STEPS = [1.5, 0.0, 2.0**-60, 2.0**-8, 1 + 4095 * 2.0**-12, 2.0**20]
CODES = {"mask": 2, "signed": 3, "two-level": 2, "sign": 2, "sparse": 2}


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same bits, but for the payloads of NaNs: what a sum or a cast makes of one is not specified."""
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and reference.same_bits(one[~nan], other[~nan])


@st.composite
def tensors(draw):
    """How one tensor is coded, over what: options of the builder, and what they need of the group."""
    shape = draw(st.sampled_from(SHAPES))
    axes = st.integers(0, max(1, len(shape)))
    row_axes, by_row = draw(axes), draw(st.booleans())
    kind = draw(st.sampled_from(KINDS))
    return {
        "shape": shape,
        "kind": kind,
        "levels": draw(st.sampled_from([3, 4, 8, 16])) if kind == "uniform" else None,
        "base_dtype": draw(st.sampled_from(FLOATS)),
        "dtype": draw(st.sampled_from(FLOATS)),
        "vectors": [draw(st.sampled_from(SHARED)) for _ in range(3)],
        "values_dtype": draw(st.sampled_from(["BF16", "F16", "F32"])),
        "row_axes": row_axes,
        "by_row": by_row,
        "centre_axes": draw(axes) if draw(st.booleans()) else None,
        "rows": draw(st.integers(1, shape[0])) if shape and draw(st.booleans()) else None,
        "codec": draw(st.sampled_from([None, "raw", "zstd"])),
        "seed": draw(st.integers(0, 999)),
    }


def build(root: Path, case: dict) -> Bundle:
    """A bundle of that one tensor."""
    random = np.random.default_rng(case["seed"])
    shape, row_axes = case["shape"], case["row_axes"]
    base = reference.from_patterns(
        base_patterns(random, case["base_dtype"], math.prod(shape)), case["base_dtype"], shape
    )
    group = Group(root, {"w": base}, codec=case["codec"])
    roles = {"mask": 1, "signed": 1, "two-level": 2}.get(case["kind"], 0)
    axes = {"merged": row_axes, "merged_lo": row_axes, "centre": case["centre_axes"]}
    wanted = [*list(axes)[:roles], *(["centre"] if case["centre_axes"] is not None else [])]
    for role, shared in zip(wanted, case["vectors"], strict=False):
        steps = random.choice(STEPS, row_count(shape, axes[role])) if shared in {"LOG4", "I8"} else None
        group.vector("w", shared, numbers_for(shared, random, base), steps=steps, row_axes=axes[role], role=role)
    part = base if case["rows"] is None else base[: case["rows"]]
    codes = random.integers(0, CODES.get(case["kind"], case["levels"]), part.numel())
    options = {"dtype": case["dtype"], "row_axes": row_axes, "gain": float(random.choice(GAINS))}
    if case["by_row"]:
        options["gains"] = random.choice(GAINS, row_count(tuple(part.shape), row_axes)).tolist()
    if case["kind"] == "sparse":
        own = numbers_for(case["values_dtype"], random, base)[: np.count_nonzero(codes)]
        options |= {"own": own, "values_dtype": case["values_dtype"]}
    if case["kind"] == "uniform":
        options["levels"] = case["levels"]
    task = Task(group, "t", case["codec"])
    if case["rows"] is None:
        task.coded(case["kind"], "w", codes, **options)
    else:
        further = torch.ones((2, *shape[1:]), dtype=case["dtype"]) if case["rows"] == shape[0] else None
        task.extended("w", case["kind"], further, case["rows"], codes, **options)
    return Bundle(root, {"w": base}, [group], [task])


@settings(max_examples=150)
@given(
    case=tensors(), tile=st.sampled_from([1, 8, 24, 1 << 18]), ends=st.tuples(st.integers(0, 60), st.integers(0, 60))
)
def test_a_coded_tensor_is_the_references(case, tile, ends):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        patched.setattr(decode, "_TILE_NUMEL", tile)
        built = build(Path(directory), case)
        expected = built.tasks[0].expected["w"]
        with tallstore.open_bundle(built.seal()) as bundle:
            found = bundle.tensor("t", "w")
            assert found.shape == expected.shape
            assert same_numbers(found, expected)
            start, stop = sorted(min(end, expected.numel()) for end in ends)
            assert same_numbers(bundle._range("t", "w", start, stop), expected.view(-1)[start:stop])
        assert tallstore.verify(Path(directory)) == []
