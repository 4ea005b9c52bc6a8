"""Exports: a directory that others load, whole or not at all, with nothing in it that the bundle should not bring."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tallstore
from tallstore import files
from tallstore.errors import (
    BaseMismatchError,
    BaseMissingError,
    IntegrityError,
    NotFetchedError,
    OutputExistsError,
    OutputInsideInputError,
    UnknownTaskError,
)
from tallstore.exporting import export
from tallstore.format import layout, parsing
from tallstore.format import manifest as tables
from tests.model_directories import COMPANIONS, base_tensors, expert_tensors, pack_models, save_model, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    pack_models(root, root / "bundle")
    return root


@pytest.fixture
def bundle(models):
    with tallstore.open_bundle(models / "bundle", base=models / "base") as opened:
        yield opened


@pytest.fixture
def own_bundle(models, tmp_path):
    """The path of a copy, to be changed."""
    return shutil.copytree(models / "bundle", tmp_path / "own bundle")


def assert_holds(directory: Path, expected):
    """The weights in *directory*, bit for bit."""
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_weights_and_companions_come_back(bundle, tmp_path):
    done = export(bundle, "task2", tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert_holds(out, bundle.state_dict("task2"))
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it, transformers refuses the file
    for name, content in COMPANIONS.items():
        assert json.loads((out / name).read_text()) == content
    assert (done.task, done.path, done.tensors) == ("task2", out, 5)
    assert done.weights == ("model.safetensors",)
    assert set(done.companions) == set(COMPANIONS)
    assert done.nbytes == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert {path.name for path in tmp_path.rglob("*")} == {
        "deep",
        "out",
        "model.safetensors",
        "config.json",
        "modules.json",
        "1_Pooling",
    }


def test_large_weights_are_sharded_under_an_index(bundle, tmp_path):
    done = export(bundle, "task1", tmp_path / "out", max_shard_nbytes=30_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    expected = bundle.state_dict("task1")
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert len(set(index["weight_map"].values())) == len(done.weights) - 1 > 1
    assert_holds(tmp_path / "out", expected)


def test_an_export_can_be_packed_again(bundle, models, tmp_path):
    for task in bundle.tasks:
        export(bundle, task, tmp_path / task)
    again = pack_models_from(models / "base", tmp_path)
    with tallstore.open_bundle(again, base=models / "base") as opened:
        assert opened.tasks == bundle.tasks
        assert opened.keys("task1") == bundle.keys("task1")


def pack_models_from(base: Path, experts: Path) -> Path:
    tallstore.pack(base, {path.name: path for path in sorted(experts.glob("task*"))}, experts / "again")
    return experts / "again"


def test_tied_tensors_are_written_under_each_name(tmp_path):
    base = base_tensors()
    experts = {}
    for seed in (1, 2):
        tensors = expert_tensors(seed)
        experts[f"task{seed}"] = tensors | {"tied.weight": tensors["block.weight"]}
    tallstore.pack(base, experts, tmp_path / "bundle")
    with tallstore.open_bundle(tmp_path / "bundle", base=base) as bundle:
        export(bundle, "task1", tmp_path / "out")
        assert_holds(tmp_path / "out", bundle.state_dict("task1"))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["tied.weight"], weights["block.weight"])


def test_an_embedded_base_needs_no_other(models, tmp_path):
    path = pack_models(models, tmp_path / "bundle", embed_base=True)
    with tallstore.open_bundle(path) as bundle:
        export(bundle, "task1", tmp_path / "out")
        assert_holds(tmp_path / "out", bundle.state_dict("task1"))


def test_progress_ends_at_all_bytes(bundle, tmp_path):
    calls = []
    export(bundle, "task1", tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in bundle.state_dict("task1").values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_what_is_there_is_kept(bundle, tmp_path):
    out = tmp_path / "out"
    export(bundle, "task1", out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="is there already"):
        export(bundle, "task2", out)
    assert (out / "model.safetensors").read_bytes() == before
    export(bundle, "task2", out, overwrite=True)
    assert_holds(out, bundle.state_dict("task2"))


@pytest.mark.parametrize("foreign", ["optimizer.pt", "notes.md", "checkpoint-500/model.safetensors", ".git/HEAD"])
def test_overwrite_replaces_exports_only(bundle, tmp_path, foreign):
    out = tmp_path / "out"
    export(bundle, "task1", out)
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("precious")
    with pytest.raises(OutputExistsError, match=r"holds what no export wrote \("):
        export(bundle, "task1", out, overwrite=True)
    assert (out / foreign).read_text() == "precious"


def test_overwrite_takes_no_directory_without_weights(bundle, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.json").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"data.json"):
        export(bundle, "task1", tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputExistsError, match="is a file"):
        export(bundle, "task1", tmp_path / "file", overwrite=True)


def test_an_empty_directory_is_filled(bundle, tmp_path):
    export(bundle, "task1", tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_inputs_are_never_replaced(bundle, models, tmp_path):
    base = save_model(tmp_path / "base", base_tensors())
    with tallstore.open_bundle(models / "bundle", base=base) as opened:
        for out in (base, base / "inside", tmp_path, models / "bundle", models / "bundle" / "out", models):
            with pytest.raises(OutputInsideInputError):
                export(opened, "task1", out, overwrite=True, inputs=[base, "org/name"])
    assert load_file(base / "model.safetensors").keys() == base_tensors().keys()


def test_an_error_leaves_nothing_behind(models, tmp_path):
    wrong = base_tensors()
    wrong["frozen.weight"] = wrong["frozen.weight"] + 1
    with (
        tallstore.open_bundle(models / "bundle", base=wrong) as bundle,
        pytest.raises(BaseMismatchError, match=r"frozen.weight"),
    ):
        export(bundle, "task1", tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_what_was_there(bundle, tmp_path):
    out = tmp_path / "out"
    export(bundle, "task1", out)
    before = sorted((path.name, path.stat().st_size) for path in out.iterdir())

    def interrupt(done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(bundle, "task2", out, overwrite=True, progress=interrupt)
    assert sorted((path.name, path.stat().st_size) for path in out.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_base_and_no_task_are_said_at_once(models, tmp_path):
    with tallstore.open_bundle(models / "bundle") as bundle:
        with pytest.raises(BaseMissingError):
            export(bundle, "task1", tmp_path / "out")
        with pytest.raises(UnknownTaskError, match="did you mean 'task1'"):
            export(bundle, "task_1", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_companion_is_refused(own_bundle, models, tmp_path):
    digest = hashlib.sha256((models / "task1" / "config.json").read_bytes()).hexdigest()
    companion = own_bundle / "files" / digest
    companion.write_bytes(companion.read_bytes().replace(b"tiny", b"TINY"))
    with tallstore.open_bundle(own_bundle, base=models / "base") as bundle:
        with pytest.raises(IntegrityError, match=r"files/.*: changed .*FILE-2"):
            export(bundle, "task1", tmp_path / "out")
        companion.unlink()
        with pytest.raises(NotFetchedError, match=r"'config.json' of task 'task1'"):
            export(bundle, "task1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["modeling.py", "model.safetensors", "model.safetensors.index.json", "x/evil.bin"])
def test_a_bundle_brings_no_code_and_no_other_weights(own_bundle, models, tmp_path, name):
    path = layout.task_table("task1")
    table = parsing.parse((own_bundle / path).read_bytes(), tables.TaskTable, path)
    renamed = tuple(
        msgspec.structs.replace(file, name=name) if file.name == "config.json" else file for file in table.files
    )
    written = files.write_file(own_bundle / path, parsing.serialise(msgspec.structs.replace(table, files=renamed)))
    manifest = parsing.parse_manifest((own_bundle / layout.MANIFEST).read_bytes(), layout.MANIFEST)
    entry = tables.FileEntry(path=path, size=written.size, sha256=written.sha256, git_oid=written.git_oid)
    listed = tuple(entry if file.path == path else file for file in manifest.files)
    sealed = parsing.serialise_manifest(msgspec.structs.replace(manifest, files=listed))
    files.write_file(own_bundle / layout.MANIFEST, sealed)

    with tallstore.open_bundle(own_bundle, base=models / "base") as bundle:
        with pytest.warns(UserWarning, match="left out the companion file"):
            export(bundle, "task1", tmp_path / "out")
        assert_holds(tmp_path / "out", bundle.state_dict("task1"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"1_Pooling", "model.safetensors", "modules.json"}
