"""Checkpoints that are refused: each by a typed error of one line, which names the file, the tensor and what to do."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tallstore.checkpoints import open_checkpoint
from tallstore.errors import (
    AdapterCheckpointError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    InputError,
    QuantizedCheckpointError,
    UnsafeCheckpointError,
)

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(5, dtype=torch.bool)}


def refusal(source, kind=InputError):
    """The message of the error, which must be of exactly that *kind*."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(source)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message == f"{caught.value.where}: {caught.value.problem}"
    assert "\n" not in message
    return message


def torch_bytes(loaded, **options):
    file = io.BytesIO()
    torch.save(loaded, file, **options)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    """Writes a file under the test's directory, from its bytes or from what to make JSON or safetensors of."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            content = json.dumps(content).encode()
        elif isinstance(content, dict):
            content = save(content)
        path.write_bytes(content)
        return path

    return write_file


class TestPaths:
    def test_not_found(self, tmp_path):
        message = refusal(tmp_path / "model.safetensors", CheckpointNotFoundError)
        assert message == f"{tmp_path / 'model.safetensors'}: there is no such file or directory"

    def test_a_file_of_another_kind(self, write):
        assert "give a directory or a file that ends in .bin, .ckpt, .pt, .pth, .safetensors" in refusal(
            write("model.gguf", b"GGUF")
        )

    def test_an_index(self, write):
        assert "give the directory" in refusal(write("model.safetensors.index.json", {"weight_map": {}}))

    def test_a_path_through_a_file(self, write):
        refusal(write("x.txt", b"") / "model.safetensors", CheckpointNotFoundError)

    def test_a_name_that_is_too_long(self, tmp_path):
        assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 5000))

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    @pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "d/model.safetensors"])
    def test_a_pipe_is_not_waited_for(self, tmp_path, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path)
        assert f"{path}: is not a regular file" in refusal(path if path.parent == tmp_path else path.parent)

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_a_directory_in_the_place_of_a_file(self, tmp_path, name):
        (tmp_path / name).mkdir()
        assert "is not a regular file" in refusal(tmp_path)

    @pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
    def test_a_directory_in_the_place_of_an_index(self, tmp_path, write, name):
        write("model.safetensors", WEIGHTS)
        (tmp_path / name).mkdir()
        if name == "config.json":
            assert open_checkpoint(tmp_path).names == ("a", "b")
        else:
            assert "index.json: is not a regular file" in refusal(tmp_path)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs permissions that bind")
    def test_a_file_without_permission(self, write):
        path = write("x.safetensors", WEIGHTS)
        path.chmod(0)
        assert "cannot be read: Permission denied" in refusal(path)

    def test_a_directory_that_cannot_be_read(self, tmp_path, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "iterdir", refuse)
        assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Permission denied"

    @pytest.mark.parametrize("source", [3, None, b"model.safetensors", ["a"]])
    def test_something_else(self, source):
        assert "give a path or a state dict" in refusal(source)

    def test_a_module(self):
        assert refusal(torch.nn.Linear(2, 2)) == "an object of type Linear: is no checkpoint; give model.state_dict()"


class TestSafetensors:
    @pytest.mark.parametrize(
        ("nbytes", "problem"),
        [
            (0, "is truncated: 0 bytes"),
            (7, "is truncated: 7 bytes"),
            (20, "is truncated: the header takes"),
            (-1, "is truncated: tensor 'b' ends at byte"),
            (-7, "is truncated: tensor 'a' ends at byte"),
        ],
    )
    def test_a_truncated_file(self, write, nbytes, problem):
        path = write("x.safetensors", save(WEIGHTS)[:nbytes])
        message = refusal(path, DamagedCheckpointError)
        assert message.startswith(f"{path}: {problem}")
        assert message.endswith("; copy or download the file again")

    def test_a_malformed_header(self, write):
        path = write("x.safetensors", b"\x02" + bytes(7) + b"[]")
        assert "not a JSON object" in refusal(path, DamagedCheckpointError)

    def test_a_git_lfs_pointer(self, write):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        for name in ("x.safetensors", "x.bin"):
            assert "run `git lfs pull`" in refusal(write(name, pointer), DamagedCheckpointError)

    def test_a_dtype_that_cannot_be_stored(self, write):
        header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
        path = write("x.safetensors", len(header).to_bytes(8, "little") + header + b"\0")
        message = refusal(path)
        assert "has tensor 'w' in 'F8_E8M0', not one of BOOL" in message
        assert "convert that tensor first" in message

    def test_a_bool_of_another_value(self, write):
        raw = save({"w": torch.zeros(3, dtype=torch.bool)})
        checkpoint = open_checkpoint(write("x.safetensors", raw[:-1] + b"\x02"))
        assert checkpoint.read("w", 0, 2).tolist() == [False, False]
        for read in (checkpoint.read, checkpoint.read_bytes):
            with pytest.raises(DamagedCheckpointError, match="tensor 'w' is BOOL and has bytes other than 0 and 1"):
                read("w")

    @pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors"])
    def test_no_tensors(self, write, name):
        assert "holds no tensors" in refusal(write(name, save({})), DamagedCheckpointError)


class TestDirectories:
    def test_nothing_that_is_known(self, write, tmp_path):
        for name in ("config.json", "tf_model.h5", "x.gguf"):
            write(name, b"{}" if name != "config.json" else {})
        message = refusal(tmp_path)
        assert "has no model.safetensors or pytorch_model.bin" in message
        assert "it holds config.json, tf_model.h5, x.gguf" in message

    def test_nothing(self, tmp_path):
        assert "it holds nothing" in refusal(tmp_path)

    def test_many_files_are_not_all_listed(self, write, tmp_path):
        for number in range(20):
            write(f"{number:02}.txt", b"")
        assert "07.txt and 12 more" in refusal(tmp_path)

    def test_shards_without_their_index(self, write, tmp_path):
        for number in (1, 2):
            write(f"model-0000{number}-of-00002.safetensors", WEIGHTS)
        message = refusal(tmp_path)
        assert "has 2 .safetensors files and no model.safetensors.index.json (model-00001-of" in message
        assert "give the index, or one of the files" in message

    @pytest.mark.parametrize("index", [{}, [], {"weight_map": {}}, {"weight_map": ["a"]}])
    def test_an_index_without_a_map(self, write, tmp_path, index):
        write("model.safetensors.index.json", index)
        message = refusal(tmp_path, DamagedCheckpointError)
        assert message.startswith(str(tmp_path / "model.safetensors.index.json"))

    def test_an_index_that_is_not_json(self, write, tmp_path):
        write("model.safetensors.index.json", {}).write_bytes(b"\xff{")
        assert "is not JSON" in refusal(tmp_path, DamagedCheckpointError)

    @pytest.mark.parametrize("name", ["/etc/passwd", "../x.safetensors", "a/../../x", "..\\x", "", 3, None])
    def test_an_index_that_leads_elsewhere(self, write, tmp_path, name):
        write("model.safetensors.index.json", {"weight_map": {"w": name}})
        message = refusal(tmp_path, DamagedCheckpointError)
        assert f"places tensor 'w' in {name!r}, which is no file beside it" in message

    @pytest.mark.parametrize(
        ("single", "content"),
        [
            ("model.safetensors", save({"a": torch.zeros(1)})),
            ("pytorch_model.bin", torch_bytes({"a": torch.zeros(1)})),
        ],
    )
    class TestShards:
        def shards(self, write, single, content, weight_map):
            stem, suffix = single.split(".")
            write(f"{single}.index.json", {"weight_map": {k: f"{v}.{suffix}" for k, v in weight_map.items()}})
            return write(f"{stem}1.{suffix}", content), stem, suffix

        def test_a_missing_shard(self, write, tmp_path, single, content):
            _, _, suffix = self.shards(write, single, content, {"a": single.split(".")[0] + "1", "b": "gone"})
            message = refusal(tmp_path, DamagedCheckpointError)
            assert f"{single}.index.json: places tensor 'b' in 'gone.{suffix}', which is not there" in message

        def test_a_missing_tensor(self, write, tmp_path, single, content):
            stem = single.split(".")[0]
            self.shards(write, single, content, {"a": stem + "1", "b": stem + "1"})
            message = refusal(tmp_path, DamagedCheckpointError)
            assert f"places tensor 'b' in '{stem}1." in message
            assert "which does not hold it" in message

        def test_a_tensor_in_another_shard_than_the_index_says(self, write, tmp_path, single, content):
            stem, suffix = single.split(".")
            other = content.replace(b"a", b"b") if suffix == "safetensors" else torch_bytes({"b": torch.zeros(1)})
            write(f"{stem}2.{suffix}", save({"b": torch.zeros(1)}) if suffix == "safetensors" else other)
            self.shards(write, single, content, {"a": stem + "2", "b": stem + "1"})
            assert f"places tensor 'a' in '{stem}2.{suffix}'" in refusal(tmp_path, DamagedCheckpointError)

        def test_a_tensor_in_two_shards(self, write, tmp_path, single, content):
            stem, suffix = single.split(".")
            write(f"{stem}2.{suffix}", content)
            self.shards(write, single, content, {"a": stem + "1", "b": stem + "2"})
            message = refusal(tmp_path, DamagedCheckpointError)
            assert f"{stem}2.{suffix}: holds tensor 'a', which {stem}1.{suffix} holds too" in message

        def test_a_truncated_shard(self, write, tmp_path, single, content):
            stem = single.split(".")[0]
            path, *_ = self.shards(write, single, content[:-2], {"a": stem + "1"})
            assert refusal(tmp_path, DamagedCheckpointError).startswith(f"{path}: is ")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestPickles:
    @pytest.mark.parametrize("old", [False, True])
    def test_code_is_not_executed(self, write, tmp_path, old):
        made = tmp_path / "made"
        path = write("x.pt", torch_bytes({"w": Hostile(made)}, _use_new_zipfile_serialization=not old))
        message = refusal(path, UnsafeCheckpointError)
        assert f"is a pickle that refers to {os.mkdir.__module__}.mkdir" in message
        assert "it was not executed; save the model's state_dict() with safetensors" in message
        assert not made.exists()

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_a_plain_pickle_is_not_executed(self, write, tmp_path, protocol):
        made = tmp_path / "made"
        refusal(write("x.pt", pickle.dumps({"w": Hostile(made)}, protocol)), UnsafeCheckpointError)
        assert not made.exists()

    def test_a_whole_model(self, write):
        message = refusal(write("x.pt", torch_bytes(torch.nn.Linear(2, 2))), UnsafeCheckpointError)
        assert "refers to torch.nn.modules.linear.Linear, more than plain weights" in message

    @pytest.mark.parametrize("content", [b"", b"no pickle, but text", bytes(99), b"PK\x03\x04" + bytes(99)])
    def test_no_checkpoint_at_all(self, write, content):
        message = refusal(write("x.bin", content), DamagedCheckpointError)
        assert "written by torch.save" in message or "is not a file that torch.save wrote" in message

    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.999])
    def test_a_truncated_file(self, write, old, kept):
        raw = torch_bytes(WEIGHTS, _use_new_zipfile_serialization=not old)
        path = write("x.bin", raw[: int(len(raw) * kept)])
        assert refusal(path, DamagedCheckpointError).startswith(f"{path}: is ")

    @pytest.mark.parametrize("old", [False, True])
    @given(data=st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)
    def test_damage_is_an_error_of_ours_or_harmless(self, write, old, data):
        """A file with some bytes changed is read, or refused by an InputError; it never crashes."""
        raw = bytearray(torch_bytes(WEIGHTS, _use_new_zipfile_serialization=not old))
        for place, byte in data.draw(
            st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=4)
        ):
            raw[place] = byte
        path = write("x.bin", bytes(raw))
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.names:
                checkpoint.read(name)
        except InputError as error:
            message = str(error)
        else:
            message = ""
        assert "\n" not in message

    @pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], 3])
    def test_no_state_dict(self, write, content):
        assert f"holds an object of type {type(content).__name__}, not a state dict" in refusal(
            write("x.pt", torch_bytes(content))
        )


def quantized_tensor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to move them to another library
        return torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)


class Wrapped(torch.Tensor):
    """A tensor that computes in its own way."""


class TestEntries:
    @pytest.mark.parametrize(
        ("value", "problem", "kind"),
        [
            (3, "entry 'w' is of type int, not a tensor", InputError),
            (None, "entry 'w' is of type NoneType, not a tensor", InputError),
            ([torch.zeros(1)], "entry 'w' is of type list, not a tensor", InputError),
            ({"v": torch.zeros(1)}, "entry 'w' is of type dict, not a tensor", InputError),
            (torch.zeros(1, device="meta"), "tensor 'w' is on the meta device, without values", InputError),
            (torch.eye(2).to_sparse(), "tensor 'w' is sparse or nested; make it dense", InputError),
            (
                torch.zeros(1, dtype=torch.complex128),
                "tensor 'w' is torch.complex128, which cannot be stored",
                InputError,
            ),
            (torch.zeros(1, dtype=torch.float8_e4m3fnuz), "convert it to one of bool, uint8, int8", InputError),
            (torch.zeros(1).as_subclass(Wrapped), "tensor 'w' is of type Wrapped; give ordinary tensors", InputError),
            (torch.nn.UninitializedParameter(), "tensor 'w' is not initialised", InputError),
            (quantized_tensor(), "tensor 'w' is quantised", QuantizedCheckpointError),
        ],
    )
    def test_a_value_that_is_no_plain_tensor(self, value, problem, kind):
        message = refusal({"fine": torch.zeros(1), "w": value}, kind)
        assert message.startswith("a state dict: ")
        assert problem in message

    def test_the_file_is_named(self, write):
        path = write("x.pt", torch_bytes({"state_dict": {"w": torch.zeros(1), "step": 3}}))
        assert refusal(path).startswith(f"{path}: entry 'step' is of type int, not a tensor; remove it")

    def test_a_name_that_is_no_text(self):
        assert "has an entry under 3, which is no name" in refusal({3: torch.zeros(1)})

    @pytest.mark.parametrize("empty", [{}, {"model": {}}])
    def test_no_tensors(self, empty, write):
        assert refusal(empty, DamagedCheckpointError).startswith("a state dict: holds no tensors")
        path = write("x.pt", torch_bytes(empty))
        assert refusal(path, DamagedCheckpointError).startswith(f"{path}: holds no tensors")


class TestQuantized:
    @pytest.mark.parametrize(
        "name",
        [
            "layers.0.q_proj.qweight",
            "layers.0.q_proj.qzeros",
            "layers.0.q_proj.weight.absmax",
            "layers.0.q_proj.weight.quant_map",
            "layers.0.q_proj.weight.nested_absmax",
            "layers.0.q_proj.weight.quant_state.bitsandbytes__nf4",
            "layers.0.q_proj.SCB",
            "layers.0.q_proj.weight_packed",
            "qweight",
        ],
    )
    def test_by_the_names_of_tensors(self, write, name):
        tensors = {"embed": torch.zeros(1), name: torch.zeros(1)}
        path = write("x.safetensors", tensors)
        other = write("x.bin", torch_bytes(tensors))
        for source, where in ((path, path), (other, other), (tensors, "a state dict")):
            message = refusal(source, QuantizedCheckpointError)
            assert message.startswith(
                f"{where}: tensor {name!r} belongs to quantised weights; give the weights from before"
            )

    @pytest.mark.parametrize("name", ["qweights", "my_qweight", "absmax.weight", "quant_state_head.weight", "SCBs"])
    def test_names_that_only_look_like_it(self, name):
        assert open_checkpoint({name: torch.zeros(1)}).names == (name,)

    @pytest.mark.parametrize(("config", "by"), [({"quant_method": "gptq"}, " by gptq"), ({}, ""), (True, "")])
    def test_by_the_configuration(self, write, tmp_path, config, by):
        write("model.safetensors", WEIGHTS)
        write("config.json", {"quantization_config": config})
        message = refusal(tmp_path, QuantizedCheckpointError)
        assert f"{tmp_path}: is quantised{by} (config.json has a quantization_config)" in message

    def test_a_configuration_without_quantisation(self, write, tmp_path):
        write("model.safetensors", WEIGHTS)
        write("config.json", {"model_type": "bert", "quantization_config": None})
        assert open_checkpoint(tmp_path).names == ("a", "b")

    @pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\xff", b"[" * 100_000])
    def test_a_damaged_configuration(self, write, tmp_path, content):
        write("model.safetensors", WEIGHTS)
        (tmp_path / "config.json").write_bytes(content)
        assert refusal(tmp_path, DamagedCheckpointError).startswith(f"{tmp_path / 'config.json'}: is not ")


class TestAdapters:
    LORA: ClassVar = {"base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(1)}

    def test_by_the_directory(self, write, tmp_path):
        write("adapter_config.json", {"peft_type": "LORA"})
        write("adapter_model.safetensors", self.LORA)
        message = refusal(tmp_path, AdapterCheckpointError)
        assert f"{tmp_path}: is a PEFT adapter (it has adapter_config.json), not a model" in message
        assert "PEFT's merge_and_unload(), save that model" in message

    def test_beside_weights_too(self, write, tmp_path):
        """What transformers would load there is the base with the adapter, not the weights alone."""
        write("adapter_config.json", {})
        write("model.safetensors", WEIGHTS)
        assert "if it is merged, remove that file" in refusal(tmp_path, AdapterCheckpointError)

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
    def test_by_the_name_of_the_file(self, write, name):
        path = write(name, {"prompt_embeddings": torch.zeros(1)})
        assert f"{path}: is a PEFT adapter" in refusal(path, AdapterCheckpointError)

    def test_by_the_only_file_of_a_directory(self, write, tmp_path):
        write("adapter_model.safetensors", {"prompt_embeddings": torch.zeros(1)})
        refusal(tmp_path, AdapterCheckpointError)

    def test_by_the_names_of_tensors(self, tmp_path):
        save_file(self.LORA, tmp_path / "x.safetensors")
        for source in (self.LORA, tmp_path / "x.safetensors"):
            message = refusal(source, AdapterCheckpointError)
            assert "q_proj.lora_A.weight' belongs to a LoRA adapter; merge it into its base" in message
