"""Experts as torch.distributed.checkpoint loads them, in one process."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import tallstore
from tallstore.distributed import BundleStorageReader, _Request
from tallstore.errors import NotFetchedError, OptionError, UnknownTaskError
from tallstore.loading.boxes import Box
from tests.bundle_builder import Bundle, Group, Task
from tests.device_cases import write_bundle, write_large
from tests.distributed_bundles import KINDS, write_kinds
from tests.packing_cases import assert_same
from tests.reference import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def kinds(tmp_path):
    with tallstore.open_bundle(write_kinds(tmp_path / "kinds").seal()) as bundle:
        yield bundle


def load(bundle, weights, **options):
    checkpoint.load(weights, storage_reader=BundleStorageReader(bundle, "t"), **options)
    return weights


def empty_like(expected, dtype=None):
    return {
        name: torch.zeros(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in expected.items()
    }


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_form_is_what_a_state_dict_has(tmp_path, dtype):
    with tallstore.open_bundle(write_bundle(tmp_path / "forms", dtype, dtype).seal()) as bundle:
        expected = bundle.state_dict("t")
        assert_same(load(bundle, empty_like(expected), no_dist=True), expected)


def test_every_way_to_store_a_tensor_is_what_a_state_dict_has(kinds):
    expected = kinds.state_dict("t")
    assert_same(load(kinds, empty_like(expected), no_dist=True), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_finished_expert_is_cast_once(kinds, dtype):
    """Integers stay what they are."""
    found = load(kinds, empty_like(kinds.state_dict("t"), dtype), no_dist=True)
    assert_same(found, kinds.state_dict("t", dtype=dtype))


def test_without_no_dist_where_there_is_no_group(kinds):
    assert_same(load(kinds, empty_like(kinds.state_dict("t"))), kinds.state_dict("t"))


def test_memory_is_filled_in_place_whatever_its_strides(kinds):
    expected = kinds.state_dict("t")
    room = {name: torch.zeros((*tensor.shape, 2), dtype=tensor.dtype) for name, tensor in expected.items()}
    found = {name: tensor[..., 1] for name, tensor in room.items()}
    load(kinds, dict(found), no_dist=True)
    assert_same({name: tensor.contiguous() for name, tensor in found.items()}, expected)
    assert all(not tensor[..., 0].any() for tensor in room.values())


def test_torch_counts_the_writes(kinds):
    """A graph that holds the old values is to notice."""
    weights = empty_like(kinds.state_dict("t"))
    before = {name: tensor._version for name, tensor in weights.items()}
    load(kinds, weights, no_dist=True)
    assert all(tensor._version > before[name] for name, tensor in weights.items() if tensor.numel())


def test_what_is_on_no_cpu_comes_by_way_of_it(kinds, monkeypatch):
    """As if this memory were a device's; `integration/test_gpu.py` has a real one."""
    monkeypatch.setattr(_Request, "is_local", False)
    expected = kinds.state_dict("t", dtype="bfloat16")
    assert_same(load(kinds, empty_like(expected), no_dist=True), expected)


def test_a_part_of_the_names_will_do(kinds):
    """As with any checkpoint; only their bytes are read."""
    found = load(kinds, {"scalar": torch.zeros((), dtype=torch.float64)}, no_dist=True)
    assert found["scalar"].item() == 3.5


def test_a_model_takes_its_state_dict(tmp_path):
    base = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    group = Group(tmp_path / "bundle", base)
    task = Task(group, "t")
    task.private("weight", torch.full((2, 3), 2.0))
    task.private("bias", torch.full((2,), 3.0))
    model = nn.Linear(3, 2)
    with tallstore.open_bundle(Bundle(tmp_path / "bundle", base, [group], [task]).seal()) as bundle:
        set_model_state_dict(model, load(bundle, get_model_state_dict(model)))
    assert_same(dict(model.state_dict()), task.expected)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float64])
def test_slices_of_several_chunks(tmp_path, wanted):
    """Rows and columns across the border of chunks, in destinations of any strides; each chunk is read once."""
    random = np.random.default_rng(0)
    with tallstore.open_bundle(write_large(tmp_path / "large", KINDS).seal(), verify="always") as bundle:
        expert, expected = bundle._expert("t"), bundle.state_dict("t", dtype=wanted)
        for name in KINDS:
            rows = expected[name].shape[0]
            before = bundle.bytes_read
            bundle.tensor("t", name)
            whole = bundle.bytes_read - before
            for axis_lengths in ((rows, 1), (rows, 5), (9, 5), (9, 2), (rows - 1000, 3)):
                offsets = tuple(
                    int(random.integers(0, size - length + 1))
                    for size, length in zip(expected[name].shape, axis_lengths, strict=True)
                )
                box = Box((rows, 5), offsets, axis_lengths)
                destination = torch.zeros(axis_lengths[::-1], dtype=wanted).T
                before = bundle.bytes_read
                expert.write_boxes([(name, box, destination)])
                assert bundle.bytes_read - before <= whole
                due = expected[name][offsets[0] :, offsets[1] :][: axis_lengths[0], : axis_lengths[1]]
                assert same_bits(destination.contiguous(), due.contiguous()), (name, box)


# --- ties -------------------------------------------------------------------------------------------------------------


def test_memory_that_is_tied_is_written_once(kinds):
    shared, read = torch.zeros(9, 14), []
    with tallstore.open_bundle(kinds.path, verify="always") as bundle:
        for names in (["mask"], ["mask"], ["mask", "tied to mask"]):  # once more, for what only the first one opens
            shared.zero_()
            before = bundle.bytes_read
            load(bundle, dict.fromkeys(names, shared), no_dist=True)
            read.append(bundle.bytes_read - before)
            assert same_bits(shared, kinds.tensor("t", "mask"))
    assert read[0] > read[1] == read[2] > 0


def test_ties_that_the_expert_does_not_have_are_refused(kinds):
    shared = torch.zeros(5, 6)
    with pytest.raises(CheckpointException, match=r"ties 'kept' and 'kept in bfloat16', which differ in task 't'"):
        load(kinds, {"kept": shared, "kept in bfloat16": shared}, no_dist=True)
    assert not shared.any()


def test_ties_of_tensors_that_are_equal_in_the_expert(tmp_path):
    base = {"one": torch.ones(3, 4), "two": torch.ones(3, 4)}
    group = Group(tmp_path / "bundle", base)
    task = Task(group, "t")
    for name in base:
        task.private(name, torch.full((3, 4), 2.0))
    shared = torch.zeros(3, 4)
    with tallstore.open_bundle(Bundle(tmp_path / "bundle", base, [group], [task]).seal()) as bundle:
        load(bundle, {"one": shared, "two": shared}, no_dist=True)
    assert (shared == 2).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"msak": torch.zeros(9, 14)}, "Missing key in checkpoint state_dict: msak"),
        ({"gone": torch.zeros(3)}, "Missing key in checkpoint state_dict: gone"),
        ({"mask": torch.zeros(9, 15)}, r"Size mismatch .*\[9, 14\].*\[9, 15\].* for mask"),
        ({"mask": 3}, "Invalid checkpoint metadata for mask"),
    ],
)
def test_what_the_expert_does_not_have_is_named(kinds, weights, said):
    with pytest.raises(CheckpointException, match=said):
        load(kinds, weights, no_dist=True)


def test_a_planner_may_leave_names_as_they_are(kinds):
    weights = {"msak": torch.full((2,), 7.0), "scalar": torch.zeros((), dtype=torch.float64)}
    load(kinds, weights, no_dist=True, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert weights["msak"].tolist() == [7.0, 7.0]
    assert weights["scalar"].item() == 3.5


def test_a_planner_may_make_the_state_dict(kinds):
    """Of the names, shapes and dtypes in the metadata, as torch's own converters do."""
    planner = checkpoint.default_planner._EmptyStateDictLoadPlanner(keys={"mask", "integers"})
    found = {}
    checkpoint.state_dict_loader._load_state_dict(found, BundleStorageReader(kinds, "t"), planner=planner, no_dist=True)
    assert_same(found, {name: kinds.tensor("t", name) for name in ("mask", "integers")})


def test_a_task_is_asked_for_by_its_name(kinds):
    with pytest.raises(UnknownTaskError, match="did you mean 't'"):
        BundleStorageReader(kinds, "tt")


def test_a_task_whose_files_are_elsewhere(kinds):
    shutil.rmtree(kinds.path / "tasks" / "t")
    with pytest.raises(NotFetchedError, match="task 't' was not fetched"):
        BundleStorageReader(kinds, "t")


def test_an_id_beside_the_reader_is_refused(kinds, tmp_path):
    with pytest.raises(OptionError, match=r"\Acheckpoint_id is .*'t'.*leave it out\Z"):
        checkpoint.load({}, checkpoint_id=tmp_path, storage_reader=BundleStorageReader(kinds, "t"), no_dist=True)
    assert not BundleStorageReader.validate_checkpoint_id(kinds.path)
