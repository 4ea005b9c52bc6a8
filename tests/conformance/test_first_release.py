"""Bundles that the first release wrote are read by every later version, to the last bit."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tallstore
from tallstore.exporting import export
from tallstore.loading import decode_torch
from tallstore.loading.device_expert import DeviceExpert
from tests.command_line import run
from tests.fuzz import second_reader
from tests.fuzz.bundle_targets import as_array

RELEASE = Path(__file__).parents[1] / "data" / "first-release"
WEIGHTS = json.loads((RELEASE / "weights.json").read_text(encoding="utf-8"))
PRETRAINED = WEIGHTS.pop("base")[""]
BASES = {"bundle": None, "referred": RELEASE / "bundle" / "base"}
TASKS = [(name, task) for name, tasks in WEIGHTS.items() for task in tasks]

pytestmark = pytest.mark.filterwarnings("error")


def described(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """dtype, shape, and the sha256 of the bytes of each tensor."""
    found = {}
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[name] = f"{dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
    return found


def expected(name: str, task: str) -> dict[str, str]:
    """What a task is made of."""
    return {key: value for key, value in (PRETRAINED | WEIGHTS[name][task]).items() if value is not None}


def opened(name: str) -> tallstore.Bundle:
    return tallstore.open_bundle(RELEASE / name, base=BASES[name])


def documents(name: str) -> list[dict]:
    return [json.loads(path.read_bytes()) for path in sorted((RELEASE / name).glob("[gt]*/*/*.json"))]


def test_it_has_everything_that_the_format_has():
    manifest = json.loads((RELEASE / "bundle" / "tallstore.json").read_bytes())
    assert len(manifest["groups"]) > 10
    assert manifest["next_group"] > 1 + len(manifest["groups"])
    text = "".join(json.dumps(document) for name in BASES for document in documents(name))
    for key, values in {
        "kind": "mask signed two-level sign sparse uniform private extended same alias dropped",
        "codec": "raw zstd planes-zstd pooled",
        "role": "merged merged_lo centre",
        "dtype": "F16 BF16 F32 F64 I8 LOG4 BOOL I16 I64",
    }.items():
        for value in values.split():
            assert f'"{key}": "{value}"' in text
    for levels in (3, 4, 8, 16):
        assert f'"levels": {levels}' in text
    assert all(name in text for name in ("gains", "config.json", "vocab.txt"))


@pytest.mark.parametrize("name", BASES)
def test_its_tasks_are_listed(name):
    with opened(name) as bundle:
        assert set(bundle.tasks) == WEIGHTS[name].keys()


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_every_tensor_comes_back_bit_for_bit(name, task):
    with opened(name) as bundle:
        assert described(bundle.state_dict(task)) == expected(name, task)


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_every_tensor_comes_back_bit_for_bit_as_on_a_device(name, task):
    with opened(name) as bundle:
        expert = DeviceExpert(
            bundle._expert(task), bundle._files, bundle._pinned(), torch.device("cpu"), decode_torch.decode
        )
        assert described(expert.tensors(bundle.keys(task))) == expected(name, task)


@pytest.mark.parametrize("name", BASES)
def test_the_second_implementation_makes_the_same_of_them(name):
    files = [path for path in (RELEASE / name).rglob("*") if path.is_file()]
    contents = {path.relative_to(RELEASE / name).as_posix(): path.read_bytes() for path in files}
    directory = BASES[name]
    base = second_reader.Base(contents, None if directory is None else directory / "model.safetensors")
    experts = second_reader.experts(contents, base)
    assert experts.keys() == WEIGHTS[name].keys()
    with opened(name) as bundle:
        for task, theirs in experts.items():
            ours = bundle.state_dict(task)
            assert ours.keys() == theirs.keys()
            assert not [key for key in ours if second_reader.differs(as_array(ours[key]), theirs[key])]


def test_models_switch_between_its_tasks():
    model = torch.nn.Module()
    with opened("bundle") as bundle:
        for key, tensor in bundle.state_dict("sign").items():
            model.register_buffer(key, tensor.clone())
        switcher = bundle.attach(model)
        for task in ("three", "sparse", "centred 2", "sign"):
            switcher.set_expert(task)
            assert described(dict(model.named_buffers(remove_duplicate=False))) == expected("bundle", task)


@pytest.mark.parametrize("name", BASES)
def test_no_rule_is_broken(name):
    assert tallstore.verify(RELEASE / name) == []


def test_it_is_looked_into():
    shown = run("inspect", RELEASE / "bundle").stdout
    assert all(task in shown for task in WEIGHTS["bundle"])
    assert "signed 1" in run("inspect", RELEASE / "bundle", "--task", "signed 1").stdout
    with opened("bundle") as bundle:
        found = bundle.statistics()
    assert set(found.to_dict()) >= {"tasks"}


def test_a_task_is_exported_with_its_files(tmp_path):
    with opened("bundle") as bundle, warnings.catch_warnings():
        export(bundle, "signed 1", tmp_path / "expert")
    weights = load_file(tmp_path / "expert" / "model.safetensors")
    assert described(weights).items() <= expected("bundle", "signed 1").items()
    assert json.loads((tmp_path / "expert" / "config.json").read_text())["task"] == "1"
    assert (tmp_path / "expert" / "vocab.txt").read_text() == "one\ntwo\n"


def test_its_experts_are_merged():
    with opened("bundle") as bundle:
        merged = bundle.consensus(k=1, tasks=["tall 1", "tall 2"])
        stitched = bundle.stitch(tasks=["sparse"])
    for found in (merged, stitched):
        assert found["w"].dtype == torch.float32
        assert all(torch.isfinite(tensor).all() for tensor in found.values())
