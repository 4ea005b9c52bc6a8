"""Reading input checkpoints: every source gives the same names, specs and bytes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tallstore.checkpoints import Checkpoint, open_checkpoint
from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from tallstore.errors import CheckpointNotFoundError, DamagedCheckpointError, InputError, UnknownTensorError
from tallstore.format.dtypes import DTYPES, TensorSpec

SHAPES = [(), (0,), (3, 0, 2), (1,), (13,), (7, 5), (2, 3, 4, 5)]


def some_tensor(dtype, shape, seed=0):
    """A tensor of arbitrary bits, NaNs, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state(names=tuple(TORCH_DTYPES)):
    """Every dtype of those *names* in every shape, contiguous or not."""
    tensors = {
        f"{name}.{index}": some_tensor(TORCH_DTYPES[name], shape, seed=index)
        for name in names
        for index, shape in enumerate(SHAPES)
    }
    tensors["transposed"] = some_tensor(torch.bfloat16, (4, 6)).t()
    tensors["strided"] = some_tensor(torch.float64, (5, 8))[1:4, ::3]
    tensors["expanded"] = some_tensor(torch.float16, (1, 3)).expand(4, 3)
    tensors["parameter"] = torch.nn.Parameter(some_tensor(torch.float32, (3, 3)))
    return tensors


def dense(tensors):
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def halves(tensors):
    names = list(tensors)
    return [{name: tensors[name] for name in names[part::2]} for part in (0, 1)]


def write_sharded(directory, tensors, single, write):
    """The layout of Hugging Face: two shards and their index."""
    directory.mkdir()
    stem, suffix = single.split(".")
    weight_map = {}
    for number, part in enumerate(halves(tensors), start=1):
        file_name = f"{stem}-{number:05d}-of-00002.{suffix}"
        write(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (directory / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def in_directory(directory, tensors, name, write):
    directory.mkdir()
    write(tensors, directory / name)
    return directory


def write_legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def write_pt(tensors, path):
    torch.save(tensors, path)
    return path


def write_safetensors(tensors, path):
    save_file(dense(tensors), path)
    return path


SOURCES = {
    "state dict": lambda tensors, _: tensors,
    "nested state dict": lambda tensors, _: {"state_dict": tensors, "epoch": 3},
    ".safetensors": lambda tensors, path: write_safetensors(tensors, path / "any name.safetensors"),
    ".pt": lambda tensors, path: write_pt(tensors, path / "x.pt"),
    ".pth, old format": lambda tensors, path: write_legacy(tensors, path / "x.pth"),
    ".ckpt under state_dict": lambda tensors, path: write_pt({"state_dict": tensors, "lr": 0.1}, path / "x.ckpt"),
    ".bin under model": lambda tensors, path: write_pt({"model": tensors}, path / "x.bin"),
    ".pt under both": lambda tensors, path: write_pt({"model": {"state_dict": tensors}}, path / "x.pt"),
    "model.safetensors": lambda tensors, path: in_directory(
        path / "d", tensors, "model.safetensors", write_safetensors
    ),
    "other.safetensors": lambda tensors, path: in_directory(
        path / "d", tensors, "other.safetensors", write_safetensors
    ),
    "pytorch_model.bin": lambda tensors, path: in_directory(path / "d", tensors, "pytorch_model.bin", write_pt),
    "safetensors index": lambda tensors, path: write_sharded(
        path / "d", tensors, "model.safetensors", write_safetensors
    ),
    "bin index": lambda tensors, path: write_sharded(path / "d", tensors, "pytorch_model.bin", write_pt),
}


# Torch cannot read others back from its old format.
OLD_DTYPES = ["BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "C64"]


@pytest.fixture(params=SOURCES)
def given_as(request, tmp_path):
    """Tensors, and a checkpoint of them."""
    tensors = state(OLD_DTYPES) if "old format" in request.param else state()
    return tensors, SOURCES[request.param](tensors, tmp_path)


def fingerprints(root):
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_mode)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_every_source_gives_the_same_tensors(given_as, tmp_path):
    before = fingerprints(tmp_path)
    expected, source = given_as
    with open_checkpoint(source) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.names == tuple(sorted(expected))
        assert checkpoint.aliases == {}
        assert checkpoint.hub is None
        for name, tensor in expected.items():
            assert checkpoint.spec(name) == TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert read.shape == (tensor.numel(),)
            assert read.device.type == "cpu"
            assert read.is_contiguous()
            assert not read.requires_grad
            assert raw_bytes(read) == raw_bytes(tensor.detach())
            raw = checkpoint.read_bytes(name)
            assert raw.dtype == np.uint8
            assert raw.tobytes() == raw_bytes(tensor.detach())
    assert fingerprints(tmp_path) == before


def test_every_source_gives_any_range(given_as):
    expected, source = given_as
    with open_checkpoint(source) as checkpoint:
        for name, tensor in expected.items():
            flat = raw_bytes(tensor.detach())
            numel, width = tensor.numel(), tensor.element_size()
            for start, stop in {(0, 0), (numel, numel), (numel // 3, numel // 2), (min(1, numel), numel)}:
                assert raw_bytes(checkpoint.read(name, start, stop)) == flat[start * width : stop * width]
                assert checkpoint.read_bytes(name, start, stop).tobytes() == flat[start * width : stop * width]


@given(st.data())
def test_ranges_of_a_mapped_file(tmp_path_factory, data):
    """Any range of a file of many pages is the range of the tensor, whatever page it begins in."""
    tensor = torch.arange(9_000, dtype=torch.int64)
    path = tmp_path_factory.getbasetemp() / "ranges.safetensors"
    if not path.exists():
        save_file({"first": torch.zeros(3, dtype=torch.uint8), "w": tensor}, path)
    start = data.draw(st.integers(0, 9_000))
    stop = data.draw(st.integers(start, 9_000))
    assert open_checkpoint(path).read("w", start, stop).equal(tensor[start:stop])


def test_what_is_recorded_of_a_file(tmp_path):
    path = write_safetensors({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.where, checkpoint.files, checkpoint.directory) == (str(path), (path,), None)


def test_what_is_recorded_of_a_directory(tmp_path):
    directory = write_sharded(
        tmp_path / "d", {"a": torch.zeros(1), "b": torch.zeros(1)}, "model.safetensors", write_safetensors
    )
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.where, checkpoint.directory) == (str(directory), directory)
    assert [path.name for path in checkpoint.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_what_is_recorded_of_a_state_dict():
    checkpoint = open_checkpoint({"w": torch.zeros(1)})
    assert (checkpoint.where, checkpoint.files, checkpoint.directory) == ("a state dict", (), None)


def test_the_order_of_shards_does_not_matter(tmp_path):
    tensors = {name: torch.full((3,), float(index)) for index, name in enumerate("abcdef")}
    backwards = dict(reversed(tensors.items()))
    one = open_checkpoint(write_sharded(tmp_path / "1", tensors, "model.safetensors", write_safetensors))
    other = open_checkpoint(write_sharded(tmp_path / "2", backwards, "model.safetensors", write_safetensors))
    assert one.names == other.names == tuple("abcdef")
    assert all(one.read(name).equal(other.read(name)) for name in one.names)


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"],
        ["model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin", "other.safetensors"],
        ["pytorch_model.bin.index.json", "pytorch_model.bin", "other.safetensors"],
        ["pytorch_model.bin", "other.safetensors", "training_args.bin"],
        ["other.safetensors", "training_args.bin", "other.pt"],
    ],
)
def test_the_preferred_file_of_a_directory_is_read(tmp_path, names):
    for value, name in enumerate(names):
        tensors = {"w": torch.tensor(float(value))}
        if name.endswith(".index.json"):
            shard = f"shard {value}." + name.split(".")[1]
            (tmp_path / name).write_text(json.dumps({"weight_map": {"w": shard}}))
        else:
            shard = name
        (write_safetensors if shard.endswith(".safetensors") else write_pt)(tensors, tmp_path / shard)
    assert open_checkpoint(tmp_path).read("w").item() == 0.0


def test_tensors_that_the_index_leaves_out_are_read_too(tmp_path):
    write_safetensors({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert open_checkpoint(tmp_path).names == ("a", "b")


def test_a_nested_dictionary_is_entered_only_where_it_holds_the_weights():
    tensor = torch.zeros(2)
    assert open_checkpoint({"model": tensor, "state_dict": tensor + 1}).names == ("model", "state_dict")
    assert open_checkpoint({"model": {"model": {"w": tensor}}, "state": 1}).names == ("w",)
    with pytest.raises(InputError, match="entry 'model' is of type dict, not a tensor"):
        open_checkpoint({"model": {"model": {"model": {"w": tensor}}}})


class TestTies:
    @pytest.fixture(params=["state dict", ".pt", ".pth, old format", "pytorch_model.bin"])
    def opened(self, request, tmp_path):
        return lambda tensors: open_checkpoint(SOURCES[request.param](tensors, tmp_path))

    def test_tied_names_are_aliases_of_the_first(self, opened):
        weight = torch.nn.Parameter(torch.ones(4, 3))
        checkpoint = opened({"lm_head": weight, "embed": weight, "middle": weight, "other": torch.ones(4, 3)})
        assert checkpoint.aliases == {"lm_head": "embed", "middle": "embed"}
        assert checkpoint.names == ("embed", "lm_head", "middle", "other")
        assert all(checkpoint.read(name).equal(torch.ones(12)) for name in checkpoint.names)

    def test_equal_views_are_tied(self, opened):
        weight = torch.ones(4, 3)
        assert opened({"a": weight[1:], "b": weight[1:], "c": weight[:3].t(), "d": weight[:3].t()}).aliases == {
            "b": "a",
            "d": "c",
        }

    def test_other_views_of_a_storage_are_not(self, opened):
        weight = torch.arange(9.0).reshape(3, 3)
        views = {"all": weight, "part": weight[:2], "later": weight[1:], "turned": weight.t(), "flat": weight.view(-1)}
        checkpoint = opened(views)
        assert checkpoint.aliases == {}
        assert all(checkpoint.read(name).equal(view.reshape(-1)) for name, view in views.items())

    def test_empty_tensors_are_not(self, opened):
        assert opened({"a": torch.zeros(0), "b": torch.zeros(0)}).aliases == {}


def test_views_of_another_dtype_are_not_tied():
    tensor = torch.zeros(3)
    assert open_checkpoint({"a": tensor, "b": tensor.view(torch.int32)}).aliases == {}


def test_conjugate_views_are_read_as_what_they_are():
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    checkpoint = open_checkpoint({"a": tensor, "b": tensor.conj(), "c": tensor.imag, "d": tensor.conj().imag})
    assert checkpoint.aliases == {}
    assert checkpoint.read("b").equal(torch.tensor([1 - 2j, 3 + 4j], dtype=torch.complex64))
    assert checkpoint.read("d").equal(torch.tensor([-2.0, 4.0]))


def test_contiguous_tensors_are_not_copied(tmp_path):
    tensor = torch.arange(8.0)
    assert open_checkpoint({"w": tensor}).read("w", 2, 5).data_ptr() == tensor[2:].data_ptr()


def test_a_non_contiguous_tensor_is_copied_once_not_at_every_read():
    checkpoint = open_checkpoint({"w": torch.arange(12.0).reshape(3, 4).t()})
    first, second = checkpoint.read("w", 0, 5), checkpoint.read("w", 5, 12)
    assert second.data_ptr() == first.data_ptr() + 5 * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("offset", [1, 2, 7])
def test_misaligned_tensors_are_read_aligned(tmp_path, dtype, offset):
    tensor = some_tensor(dtype, (4, 5))
    places = {
        "bytes": {"dtype": "U8", "shape": [offset], "data_offsets": [0, offset]},
        "w": {
            "dtype": DTYPE_NAMES[dtype],
            "shape": [4, 5],
            "data_offsets": [offset, offset + tensor.nbytes],
        },
    }
    header = json.dumps(places).encode().ljust(256)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(offset) + raw_bytes(tensor))
    checkpoint = open_checkpoint(path)
    read = checkpoint.read("w", 3, 17)
    assert read.data_ptr() % dtype.itemsize == 0
    assert raw_bytes(read) == raw_bytes(tensor)[3 * dtype.itemsize : 17 * dtype.itemsize]
    assert checkpoint.read_bytes("w").tobytes() == raw_bytes(tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
def test_reading_costs_the_bytes_asked_for_however_large_the_file_is(tmp_path):
    """A terabyte, of which the file system keeps the header only: read whole, or mapped whole, it would not fit."""
    numel = 2**38
    header = json.dumps({"w": {"dtype": "F32", "shape": [numel], "data_offsets": [0, 4 * numel]}}).encode().ljust(248)
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(256 + 4 * numel)
        except OSError:
            pytest.skip("the file system has no files of that size")
    assert open_checkpoint(path).read("w", numel - 5).equal(torch.zeros(5))


def test_writing_to_what_was_read_does_not_reach_the_file(tmp_path):
    path = write_safetensors({"w": torch.ones(4)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(path)
    checkpoint.read("w").zero_()
    assert checkpoint.read("w").equal(torch.ones(4))


def test_several_threads_may_read(tmp_path):
    tensors = {str(index): torch.full((1000, 3), float(index)).t() for index in range(8)}
    for opened in (open_checkpoint(tensors), open_checkpoint(write_safetensors(tensors, tmp_path / "x.safetensors"))):
        with ThreadPoolExecutor(4) as pool:
            reads = [(name, pool.submit(opened.read, name, 100, 2000)) for name in opened.names for _ in range(20)]
            assert all(bool((read.result() == float(name)).all()) for name, read in reads)


class TestMisuse:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        return open_checkpoint(write_safetensors({"weight": torch.ones(3)}, tmp_path / "x.safetensors"))

    def test_an_unknown_name(self, checkpoint):
        for ask in (checkpoint.spec, checkpoint.read, checkpoint.read_bytes):
            with pytest.raises(UnknownTensorError, match="did you mean 'weight'"):
                ask("wieght")

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 1), (4, 4)])
    def test_a_range_outside_the_tensor(self, checkpoint, start, stop):
        with pytest.raises(IndexError, match="of tensor 'weight', which has 3"):
            checkpoint.read("weight", start, stop)

    def test_reading_after_close(self, tmp_path):
        path = write_safetensors({"w": torch.ones(3)}, tmp_path / "x.safetensors")
        for source in (path, {"w": torch.ones(3).t()}):
            with open_checkpoint(source) as checkpoint:
                read = checkpoint.read("w")
            with pytest.raises(ValueError, match="is closed"):
                checkpoint.read("w")
            assert read.equal(torch.ones(3))
            checkpoint.close()

    def test_a_file_that_changes_under_the_reader(self, checkpoint):
        os.utime(checkpoint.files[0], ns=(1, 1))
        with pytest.raises(DamagedCheckpointError, match=r"x\.safetensors: was changed while it was read"):
            checkpoint.read("weight")

    def test_a_file_that_another_machine_calls_by_other_numbers(self, checkpoint, tmp_path):
        """What is sent there knows it by its size and time; what stays here, by inode too."""
        sent = pickle.loads(pickle.dumps(checkpoint))  # noqa: S301 - our own
        before = checkpoint.read("weight").clone()
        shutil.copy2(checkpoint.files[0], tmp_path / "copy").replace(checkpoint.files[0])
        assert sent.read("weight").equal(before)
        with pytest.raises(DamagedCheckpointError, match="was changed while it was read"):
            checkpoint.read("weight")
        os.utime(checkpoint.files[0], ns=(1, 1))
        with pytest.raises(DamagedCheckpointError, match="was changed while it was read"):
            sent.read("weight")

    def test_a_file_that_vanishes_under_the_reader(self, checkpoint):
        checkpoint.files[0].unlink()
        with pytest.raises(InputError, match=r"x\.safetensors: cannot be read: No such file"):
            checkpoint.read("weight")


def test_names_of_dtypes_are_complete():
    assert TORCH_DTYPES.keys() == DTYPES.keys()
    assert all(dtype.itemsize == DTYPES[name] for name, dtype in TORCH_DTYPES.items())


def test_safetensors_agrees_on_names_of_dtypes():
    for name, dtype in TORCH_DTYPES.items():
        assert f'"dtype":"{name}"'.encode() in save({"w": torch.zeros(1).to(dtype)})


def test_local_inputs_do_not_import_the_hub_client(tmp_path):
    path = write_safetensors({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    code = (
        "import sys; from tallstore.checkpoints import open_checkpoint; open_checkpoint(sys.argv[1]); "
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 0


def test_a_path_comes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    in_directory(tmp_path / "org" / "name", {"w": torch.ones(1)}, "model.safetensors", write_safetensors)
    assert open_checkpoint("org/name").hub is None


@pytest.mark.parametrize(
    "missing", ["", "nothing", "/no/such/dir", "./org/name", "a/b/c", "org/model.safetensors", "x\0y"]
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="there is no such file or directory"):
        open_checkpoint(missing)
