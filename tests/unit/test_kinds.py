"""The kinds of coded tensors and the centre, where they are easy to get wrong."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch

import tallstore
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.shard_reader import LocalFile, ShardReader
from tests import reference
from tests.bundle_builder import Bundle, Group, Task
from tests.number_cases import specials
from tests.reference import same_bits

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHARED = ["LOG4", "I8", "BF16", "F16", "F32"]
LEVELS = {
    3: [-1.0, 0.0, 1.0],
    4: [-1.5, -0.5, 0.5, 1.5],
    8: [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5],
    16: [-7.5, -6.5, -5.5, -4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5],
}


def loaded(root, base, vectors, kind, codes, **options):
    """The tensor ``w`` of a bundle that has it alone; checked against the reference and by `verify`.

    *vectors* are dtype, numbers and the options of `Group.vector` by role.
    """
    group = Group(root, {"w": base})
    for role, (dtype, numbers, more) in vectors.items():
        group.vector("w", dtype, np.asarray(numbers), role=role, **more)
    task = Task(group, "t")
    task.coded(kind, "w", np.asarray(codes), **options)
    built = Bundle(root, {"w": base}, [group], [task])
    with tallstore.open_bundle(built.seal()) as bundle:
        found = bundle.tensor("t", "w")
    assert tallstore.verify(root) == []
    assert torch.equal(found.isnan(), task.expected["w"].isnan())
    assert same_bits(found[~found.isnan()], task.expected["w"][~found.isnan()])
    return found


# --- what is absent, or adds nothing ---


@pytest.mark.parametrize("centre", [False, True], ids=["alone", "centre"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "coded",
    [
        ("mask", 0, {}),
        ("signed", 0, {}),
        ("sparse", 0, {}),
        ("mask", 1, {}),  # from here on nothing but zeros is added
        ("signed", 2, {}),
        ("two-level", 0, {}),
        ("two-level", 1, {"gain": -1.0}),
        ("sign", 0, {"gain": 0.0}),
        ("sign", 1, {"gain": 0.0}),
        ("sparse", 1, {"own": [0.0] * 16, "values_dtype": "F16"}),
        ("sparse", 1, {"own": [2.0] * 16, "gain": 0.0}),
        ("uniform", 1, {"levels": 3}),
        ("uniform", 15, {"levels": 16, "gain": 0.0}),
    ],
)
def test_the_base_keeps_every_bit(tmp_path, coded, dtype, centre):
    """-0.0, subnormals, infinities and the payloads of NaNs; a centre is not added either."""
    kind, code, options = coded
    patterns = specials(dtype)
    base = reference.from_patterns(patterns, dtype, [len(patterns)])
    zeros = ("I8", [0] * len(patterns), {"steps": [1.0]})
    vectors = {"merged": zeros, "merged_lo": ("F32", [0.0] * len(patterns), {})}
    if centre:
        vectors["centre"] = ("I8", [3] * len(patterns), {"steps": [0.5]})
    found = loaded(tmp_path, base, vectors, kind, [code] * len(patterns), **options)
    assert same_bits(found, base)


def test_a_sparse_tensor_without_a_set_bit_has_no_values(tmp_path):
    base = torch.arange(13.0)
    assert same_bits(loaded(tmp_path, base, {}, "sparse", [0] * 13), base)
    with tallstore.open_bundle(tmp_path) as bundle:
        (tensor,) = bundle._files.task("t").table.tensors
    assert (tensor.count, tensor.values) == (0, None)


# --- values and scales ---


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_of_every_number_of_levels(tmp_path, levels):
    codes = np.resize(np.arange(levels), 37)
    found = loaded(tmp_path, torch.zeros(37), {}, "uniform", codes, levels=levels, gain=0.25)
    assert found.tolist() == [0.25 * LEVELS[levels][code] for code in codes]


def test_signs_by_row(tmp_path):
    found = loaded(tmp_path, torch.zeros(3, 2), {}, "sign", [1, 0, 1, 0, 1, 0], gains=[0.5, 0.0, -2.0], row_axes=1)
    assert found.tolist() == [[0.5, -0.5], [0.0, 0.0], [-2.0, 2.0]]


def test_values_of_a_sparse_tensor_go_to_its_bits_in_order(tmp_path):
    codes = [0, 1, 1, 0, 0, 1, 0, 0, 1]
    found = loaded(tmp_path, torch.ones(3, 3), {}, "sparse", codes, own=[1, -2, 3, 0.5], gains=[1.0, 2.0, -1.0])
    assert found.tolist() == [[1.0, 2.0, -1.0], [1.0, 1.0, 7.0], [1.0, 1.0, 0.5]]


def test_each_level_has_the_steps_of_its_own_vector(tmp_path):
    """Rows of merged_lo have a step of 0: there the base stays, -0.0 and all."""
    base = torch.tensor([[0.0, -0.0], [1.0, -0.0]])
    vectors = {
        "merged": ("I8", [1, 2, 3, 4], {"steps": [0.5, 2.0]}),
        "merged_lo": ("I8", [5, 6, 7, 8], {"steps": [4.0, 0.0]}),
    }
    found = loaded(tmp_path, base, vectors, "two-level", [1, 0, 1, 0], gain=-1.0)
    assert same_bits(found, torch.tensor([[-0.5, -24.0], [-5.0, -0.0]]))


def test_one_level_may_have_steps_and_the_other_none(tmp_path):
    vectors = {"merged": ("F16", [1, 2, 3, 4], {}), "merged_lo": ("LOG4", [0, 2, 4, 6], {"steps": [4.0, 8.0]})}
    found = loaded(tmp_path, torch.zeros(2, 2), vectors, "two-level", [1, 0, 1, 0], gains=[2.0, 3.0])
    assert found.tolist() == [[2.0, 4.0], [9.0, 3.0]]


# --- the centre ---


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_centre_of_any_dtype_is_added_by_rows_of_its_own_and_without_a_gain(tmp_path, dtype, shared):
    codes = [8, 2, 0, 4, 6, 10]
    values = [reference.log4(code) for code in codes] if shared == "LOG4" else codes
    stepped = shared in {"LOG4", "I8"}
    steps = [0.5, 4.0, 1.0, 2.0, 0.25, 0.0] if stepped else [1.0] * 6
    more = {"steps": steps, "row_axes": 2} if stepped else {}
    base = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=dtype)
    found = loaded(tmp_path, base, {"centre": (shared, codes, more)}, "sign", [1, 1, 0, 1, 1, 0], gains=[16.0, 32.0])
    deltas = [16.0, 16.0, -16.0, 32.0, 32.0, -32.0]
    sums = [
        number + step * value + delta
        for number, step, value, delta in zip(base.view(-1).tolist(), steps, values, deltas, strict=True)
    ]
    assert same_bits(found, torch.tensor(sums).to(dtype).view(2, 3))


@pytest.mark.parametrize(
    ("dtype", "terms", "expected"),
    [
        (torch.float32, (1.0, 2.0**-24, 2.0**-24), 1.0),  # centre and delta together would show
        (torch.float32, (2.0**-24, 1.0, -1.0), 0.0),  # lost with the centre; delta first would keep it
        (torch.float32, (2.0**127, 2.0**127, -(2.0**127)), math.inf),  # the inner sum overflows
        (torch.float64, (1.0, 2.0**-24, 2.0**-24), 1 + 2.0**-23),
        (torch.float64, (2.0**-52, 1.0, -1.0), 2.0**-52),
        (torch.float64, (2.0**-53, 1.0, -1.0), 0.0),
        (torch.bfloat16, (1.0, 2.0**-8, 2.0**-8), 1 + 2.0**-7),  # the inner sum is a float32
    ],
)
def test_the_centre_is_added_first_and_the_sum_rounded(tmp_path, dtype, terms, expected):
    base, centre, delta = terms
    vectors = {"centre": ("F32", [centre] * 2, {}), "merged": ("F32", [delta] * 2, {})}
    found = loaded(tmp_path, torch.tensor([base] * 2, dtype=dtype), vectors, "mask", [1, 0])
    assert found.tolist() == [expected, base]


def test_a_centre_belongs_to_every_coded_tensor_over_its_base_tensor_and_to_no_other(tmp_path):
    base = {"w": torch.zeros(3, 2), "v": torch.zeros(3, 2)}
    group = Group(tmp_path, base)
    group.vector("w", "F32", np.full(6, 8.0), role="centre")
    task = Task(group, "t")
    task.coded("sign", "one", np.ones(6), base="w")
    task.coded("sign", "v", np.ones(6))
    task.extended("w", "sign", None, 2, np.ones(4))
    task.same("kept", base="w")
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [group], [task]).seal())
    state = bundle.state_dict("t")
    assert {name: set(tensor.view(-1).tolist()) for name, tensor in state.items()} == {
        "one": {9.0},
        "v": {1.0},
        "w": {9.0},
        "kept": {0.0},
    }


# --- sparse tensors of several chunks ---

LARGE = 2 * CHUNK_NUMEL + 5000


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """More values than a chunk holds, in three chunks of bits; the bundle, and the expert's tensor."""
    root = tmp_path_factory.mktemp("large") / "bundle"
    codes = np.zeros(LARGE, np.uint8)
    codes[::3] = codes[1::3] = 1
    codes[CHUNK_NUMEL : CHUNK_NUMEL + 10_000] = 0
    own = torch.from_numpy(np.resize(np.arange(1.0, 1001.0), int(codes.sum())))
    assert CHUNK_NUMEL < own.numel() < 2 * CHUNK_NUMEL
    base = {"w": torch.ones(LARGE, dtype=torch.bfloat16)}
    group = Group(root, base)
    task = Task(group, "t")
    task.coded("sparse", "w", codes, own=own, values_dtype="F16", gain=0.5, expect=False)
    bundle = Bundle(root, base, [group], [task], embed=False)
    bundle.seal()
    expected = np.ones(LARGE, np.float32)
    expected[codes == 1] += own.numpy() / 2
    return bundle, codes, torch.from_numpy(expected).to(torch.bfloat16)


def test_values_of_several_chunks(large):
    built, codes, expected = large
    with tallstore.open_bundle(built.root, base=built.base) as bundle:
        assert torch.equal(bundle.tensor("t", "w"), expected)
        border = int(np.flatnonzero(np.cumsum(codes) == CHUNK_NUMEL)[0])  # the last element of the values' first chunk
        for start, stop in (
            (border - 5, border + 6),
            (CHUNK_NUMEL - 7, CHUNK_NUMEL + 3),
            (CHUNK_NUMEL, CHUNK_NUMEL + 9000),
            (2 * CHUNK_NUMEL - 1, 2 * CHUNK_NUMEL + 1),
            (LARGE - 9, LARGE),
        ):
            assert torch.equal(bundle._range("t", "w", start, stop), expected[start:stop])
    assert tallstore.verify(built.root) == []


@pytest.mark.parametrize(
    ("element", "bit_chunks", "value_chunks"),
    [(6, [0], [0]), (CHUNK_NUMEL + 5, [1], []), (2 * CHUNK_NUMEL - 2, [1], [1]), (LARGE - 1, [2], [1])],
)
def test_only_the_chunks_that_a_range_needs_are_read(large, element, bit_chunks, value_chunks):
    """The rank says where in the values a chunk of bits begins: no other one is read."""
    built, codes, _ = large
    assert codes[element] == bool(value_chunks)
    bundle = tallstore.open_bundle(built.root, base=built.base)
    task = bundle._files.task("t")
    (tensor,) = task.table.tensors
    (shard,) = task.shards
    with contextlib.closing(LocalFile(built.root / task.directory / shard.file, "shard")) as file:
        reader = ShardReader(file, shard)
        opened = file.nbytes_read
        ends = reader._ends.tolist()
    before = bundle.bytes_read
    bundle._range("t", "w", element, element + 1)
    due = opened
    for payload, chunks in ((tensor.bits, bit_chunks), (tensor.values, value_chunks)):
        for chunk in chunks:
            due += ends[payload.at + chunk] - (ends[payload.at + chunk - 1] if chunk else 0)
    index = element // CHUNK_NUMEL
    due += 2 * (min(LARGE, (index + 1) * CHUNK_NUMEL) - index * CHUNK_NUMEL)  # the base's
    assert bundle.bytes_read - before == due
