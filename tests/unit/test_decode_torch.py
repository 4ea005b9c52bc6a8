"""decode_torch: packed elements become what the reference makes of them, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import tallstore
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.loading import decode_torch
from tallstore.loading.packed import Rows
from tests.device_cases import (
    LARGE,
    NARROW,
    decoded,
    differing,
    on_device,
    write_bundle,
    write_copies,
    write_large,
    write_unmoved,
)
from tests.reference import same_bits

PAIRS = list(itertools.product(NARROW.values(), repeat=2))


@pytest.mark.parametrize(("base", "result"), PAIRS, ids=str)
def test_every_form_is_the_reference(tmp_path, base, result):
    built = write_bundle(tmp_path / "bundle", base, result, PAIRS.index((base, result)))
    found = decoded(built.seal(), decode_torch.decode)
    assert differing(found, built.tasks[0].expected) == []


@pytest.mark.parametrize("result", NARROW.values(), ids=str)
def test_a_cast_comes_after_the_experts_own_rounding(tmp_path, result):
    built = write_bundle(tmp_path / "bundle", torch.float32, result)
    built.seal()
    for wanted in ("float16", "bfloat16", "float32"):
        found = decoded(built.root, decode_torch.decode, wanted)
        expected = {name: tensor.to(getattr(torch, wanted)) for name, tensor in built.tasks[0].expected.items()}
        assert differing(found, expected) == []


def test_copies_keep_every_bit(tmp_path):
    built = write_copies(tmp_path / "bundle")
    found = decoded(built.seal(), decode_torch.decode)
    expected = built.tasks[0].expected
    moved = {"F16", "F32", "cast", "wide"}  # what is added to a NaN, or cast, is a NaN of any payload
    assert [name for name in found if name not in moved and not same_bits(found[name], expected[name])] == []
    assert differing(found, expected) == []


@pytest.mark.parametrize("dtype", NARROW.values(), ids=str)
def test_where_nothing_is_added_the_base_keeps_every_bit(tmp_path, dtype):
    """-0.0, subnormal numbers, infinities and the payloads of NaNs; under codes, scales and values of nothing."""
    built = write_unmoved(tmp_path / "bundle", dtype)
    found = decoded(built.seal(), decode_torch.decode)
    assert [name for name, tensor in found.items() if not same_bits(tensor, built.base[name])] == []


def test_tensors_of_several_chunks_are_those_of_the_cpu(tmp_path):
    """Rows, values and codes go on behind a chunk's border; small tensors lie before and behind."""
    kinds = ("mask", "signed", "two-level", "sign", "sparse", "uniform")
    root = write_large(tmp_path / "bundle", kinds).seal()
    with tallstore.open_bundle(root) as bundle:
        expected = bundle.state_dict("t")
        found = on_device(bundle, decode_torch.decode).tensors(bundle.keys("t"))
    assert {name: tensor.numel() for name, tensor in found.items()} == {
        **dict.fromkeys(kinds, LARGE),
        "first": 3,
        "last": 3,
    }
    assert [name for name, tensor in found.items() if not same_bits(tensor, expected[name])] == []


@pytest.mark.parametrize(
    ("start", "count", "expected"),
    [
        (0, 30, ([0, 1, 2], 10, 10)),
        (7, 5, ([0, 1], 3, 10)),
        (10, 10, ([1], 10, 10)),
        (19, 1, ([1], 1, 10)),
        (15, 15, ([1, 2], 5, 10)),
    ],
)
def test_rows_of_a_range(start, count, expected):
    rows = Rows.of(np.arange(3, dtype=np.float32), 10, start, count)
    assert (rows.scales.tolist(), rows.first, rows.length) == expected


def test_rows_longer_than_a_chunk_are_counted_in_int32():
    rows = Rows.of(np.arange(2, dtype=np.float32), 1 << 40, (1 << 40) - 8, CHUNK_NUMEL)
    assert (rows.scales.tolist(), rows.first, rows.length) == ([0, 1], 8, CHUNK_NUMEL)
