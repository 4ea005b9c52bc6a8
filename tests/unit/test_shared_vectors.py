"""Statistics of shared vectors against plain float64 on what a reader makes of them."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from tallstore import Emr, LeastSquares, Sign, SignedMask, TallMask
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.inspecting.shared_vectors import LEVELS, measure_vectors, vectors_nbytes
from tests.packing_cases import base_model, experts_of, normal, pack, tuned


def measured(packed, progress=None):
    with contextlib.closing(BundleFiles(packed.root)) as files:
        return measure_vectors(files, ["g0001"], progress)


def expected_levels(packed, vector):
    """How many codes, or exponents, there are of each level, from the codes as they are stored."""
    codes, _ = packed.shared(vector.tensor, vector.role)
    values = codes.flatten().numpy() if codes.dtype != torch.bfloat16 else codes.flatten().float().numpy()
    levels = LEVELS[vector.dtype]
    if vector.dtype == "LOG4":
        return [int((values == code).sum()) for code in range(len(levels))]
    if vector.dtype == "I8":
        return [int((values == level).sum()) for level in levels]
    sizes = np.abs(values.astype(np.float64))
    return [int(((sizes >= level) & (sizes < 2 * level)).sum()) for level in levels]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (SignedMask(), None),
        (SignedMask(scale="row"), "int8"),
        (TallMask(), None),
        (TallMask(), "float32"),
        (Emr(), "bfloat16"),
        (LeastSquares(2), "float16"),
    ],
    ids=str,
)
def test_numbers_are_those_of_the_values_that_experts_take(tmp_path, method, dtype):
    base = base_model()
    base["zero.weight"] = normal(80, 60, seed=9)
    experts = experts_of(base)
    for expert in experts.values():
        expert["zero.weight"][:3] = base["zero.weight"][:3]  # rows that nobody moved
    packed = pack(base, experts, tmp_path / "bundle", method=method, merged_dtype=dtype)
    found = measured(packed)
    assert {(vector.tensor, vector.role) for vector in found} == set(packed.files.group("g0001").vectors)
    for vector in found:
        values = packed.stored(vector.tensor)[vector.role].double()
        assert vector.group == "g0001"
        assert vector.numel == values.numel()
        assert vector.zeros == int((values == 0).sum())
        assert vector.largest == float(values.abs().max())
        assert vector.rms == pytest.approx(float(values.square().mean().sqrt()), rel=1e-9)
        assert list(vector.counts) == expected_levels(packed, vector)
        assert vector.to_dict()["rms"] == vector.rms
    assert any(vector.zeros for vector in found) or found[0].dtype == "LOG4"  # which has no code for it


def test_rows_and_chunks_that_cut_each_other(tmp_path):
    shape = (7, CHUNK_NUMEL // 5)
    base = {"w": normal(*shape), "v": normal(CHUNK_NUMEL + 5, seed=1)}
    packed = pack(base, {task: tuned(base, seed) for seed, task in enumerate("ab")}, tmp_path / "bundle")
    told = []
    for vector in measured(packed, lambda done, total: told.append((done, total))):
        values = packed.stored(vector.tensor)[vector.role].double()
        assert sum(vector.counts) == vector.numel
        assert vector.largest == float(values.abs().max())
        assert vector.rms == pytest.approx(float(values.square().mean().sqrt()), rel=1e-9)
    total = (7 * (CHUNK_NUMEL // 5) + CHUNK_NUMEL + 5) / 2
    assert told[-1] == (pytest.approx(total, abs=1), pytest.approx(total, abs=1))
    assert told == sorted(told)


def test_tasks_that_share_nothing_have_none(tmp_path):
    base = base_model()
    packed = pack(base, experts_of(base), tmp_path / "bundle", method=Sign())
    assert measured(packed) == ()
    assert vectors_nbytes(packed.files, ["g0001"]) == 0
