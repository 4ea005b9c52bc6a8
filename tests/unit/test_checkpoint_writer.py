"""Checkpoints as Hugging Face lays them out: any reader opens them, whatever the sizes of shards."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tallstore.checkpoints import open_checkpoint
from tallstore.checkpoints.writer import write_checkpoint
from tallstore.errors import OutputError
from tallstore.files import hash_file
from tests.packing_cases import assert_same, normal

STATE = {
    "wide": normal(30, 7).double(),
    "a.half": normal(11, 3).half(),
    "flags": torch.arange(13) % 2 == 0,
    "ids": torch.arange(9),
    "b.weight": normal(5, 5),
    "nothing": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "größe": normal(3),
}


def write(directory, state, pieces=7, **options):
    """Write a state dict, each tensor in pieces of a few bytes."""
    directory.mkdir(exist_ok=True)
    with open_checkpoint(state) as checkpoint:

        def read(name):
            raw = checkpoint.read_bytes(name).tobytes()
            return (raw[start : start + pieces] for start in range(0, len(raw), pieces))

        specs = {name: checkpoint.spec(name) for name in state}
        return write_checkpoint(directory, specs, read, **options)


def test_one_file_that_safetensors_reads(tmp_path):
    written = write(tmp_path, STATE)
    assert list(written) == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), STATE)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    write(tmp_path, STATE)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert (8 + length) % 8 == 0
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % STATE[name].element_size() == 0, name


@pytest.mark.parametrize("limit", [1, 300, 500, 1900])
def test_shards_under_an_index(tmp_path, limit):
    written = write(tmp_path, STATE, max_shard_nbytes=limit)
    names = sorted(name for name in written if name.endswith(".safetensors"))
    count = len(names)
    assert count > 1
    assert names == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in STATE.values())}
    assert index["weight_map"].keys() == STATE.keys()
    for name in names:
        held = load_file(tmp_path / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == held.keys()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
        assert_same(held, {key: STATE[key] for key in held})


def test_our_own_reader_opens_either(tmp_path):
    for limit in (1 << 30, 300):
        write(tmp_path / str(limit), STATE, max_shard_nbytes=limit)
        with open_checkpoint(tmp_path / str(limit)) as checkpoint:
            assert checkpoint.names == tuple(sorted(STATE))
            for name, tensor in STATE.items():
                assert torch.equal(checkpoint.read(name), tensor.reshape(-1))


@pytest.mark.parametrize("limit", [1 << 30, 300])
def test_what_was_written_is_reported(tmp_path, limit):
    written = write(tmp_path, STATE, max_shard_nbytes=limit)
    assert sorted(written) == sorted(path.name for path in tmp_path.iterdir())
    for name, file in written.items():
        assert file == hash_file(tmp_path / name)


def test_the_pieces_do_not_matter(tmp_path):
    assert write(tmp_path / "one", STATE, pieces=1) == write(tmp_path / "many", STATE, pieces=10_000)


@pytest.mark.parametrize("pieces", [[b"1234"], [b"12345678", b"9"]])
def test_a_tensor_that_comes_in_another_size_leaves_no_file(tmp_path, pieces):
    with open_checkpoint({"w": torch.zeros(2)}) as checkpoint, pytest.raises(OutputError, match="did an input change"):
        write_checkpoint(tmp_path, {"w": checkpoint.spec("w")}, lambda _: pieces)
    assert list(tmp_path.iterdir()) == []
