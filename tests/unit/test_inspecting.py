"""Summaries of bundles: what they say is what the files and the packer say, and they cost no torch and no numpy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open

import tallstore
from tallstore import files
from tallstore.errors import BundleNotFoundError, IntegrityError, NotFetchedError, UnknownTaskError
from tallstore.format import layout, parsing
from tallstore.format import manifest as tables
from tallstore.format.bundle_files import BundleFiles
from tallstore.inspecting.summary import presence, summarise
from tallstore.inspecting.task_details import describe_task
from tests.bundle_builder import Bundle, Group, Task
from tests.model_directories import COMPANIONS, expert_tensors, pack_models, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def packed(models):
    out = models / "bundle"
    report = tallstore.pack(models / "base", {f"task{seed}": models / f"task{seed}" for seed in (1, 2, 3)}, out)
    return out, report


@pytest.fixture
def bundle(packed, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(packed[0], tmp_path / "bundle")


def test_sizes_are_those_of_the_files(packed):
    bundle, _ = packed
    summary = summarise(bundle)

    def on_disk(directory):
        return sum(path.stat().st_size for path in (bundle / directory).rglob("*") if path.is_file())

    assert summary.nbytes == on_disk(".")
    assert summary.shared_nbytes == on_disk("groups")
    assert summary.tasks_nbytes == on_disk("tasks")
    assert summary.companions_nbytes == on_disk("files")
    assert summary.base_nbytes == (bundle / "base.json").stat().st_size
    for task in summary.tasks:
        assert task.nbytes == on_disk(f"tasks/{task.slug}")


def test_a_summary_agrees_with_the_report_of_packing(packed):
    bundle, report = packed
    summary = summarise(bundle)
    assert summary.checkpoints_nbytes == report.checkpoints_nbytes
    assert summary.nbytes == report.bundle_nbytes
    assert summary.base.checkpoint_nbytes == report.base_nbytes
    assert summary.ratio == pytest.approx(report.checkpoints_nbytes / report.bundle_nbytes)
    for task, expected in zip(summary.tasks, report.tasks, strict=True):
        assert (task.name, task.slug, task.nbytes) == (expected.name, expected.slug, expected.nbytes)
        assert (task.cosine, task.gain, task.score) == (expected.cosine, expected.gain, expected.score)
        assert task.bits == expected.bits


def test_tensors_are_counted_by_kind(packed):
    summary = summarise(packed[0])
    for seed, task in enumerate(summary.tasks, start=1):
        assert task.kinds == {"dropped": 1, "extended": 1, "private": 1, "same": 2, "signed": 1}
        assert (task.coded, task.same, task.whole, task.other) == (1, 2, 1, 2)
        assert task.parameters == sum(tensor.numel() for tensor in expert_tensors(seed).values())
        assert task.checkpoint_nbytes == sum(tensor.nbytes for tensor in expert_tensors(seed).values())
        assert task.fetched
        assert task.unreadable is None


def test_base_and_group_are_described(packed):
    summary = summarise(packed[0])
    assert (summary.base.repo_id, summary.base.revision, summary.base.embedded) == (None, None, False)
    assert (summary.base.tensors, summary.base.parameters) == (5, 80 * 64 + 70 * 60 + 90 * 50 + 64 + 4)
    (group,) = summary.groups
    assert (group.id, group.method, group.tasks) == ("g0001", "signed-mask", 3)
    assert group.parameters == {"threshold": 1.2, "scale": "tensor", "gain": "one"}
    assert group.merged_dtypes == ("LOG4",)
    assert summary.format_version == "1.0"


def test_every_coded_kind_is_counted_and_weighed(tmp_path):
    """The values of a sparse tensor are the task's own bytes, as its bits are."""
    names = ("mask", "signed", "two-level", "sign", "sparse", "uniform")
    base = {name: torch.zeros(100, 50) for name in names}
    group = Group(tmp_path, base)
    for name in names[:3]:
        group.vector(name, "I8", np.ones(5000), steps=[1.0] * 100)
    group.vector("two-level", "F16", np.ones(5000), role="merged_lo")
    task = Task(group, "t", codec="raw")
    for name in names:
        options = {"sparse": {"own": np.ones(5000), "values_dtype": "F16"}, "uniform": {"levels": 16}}.get(name, {})
        task.coded(name, name, np.ones(5000), expect=False, **options)
    root = Bundle(tmp_path, base, [group], [task]).seal()
    (summary,) = summarise(root).tasks
    assert summary.kinds == dict.fromkeys(sorted(names), 1)
    assert (summary.coded, summary.same, summary.whole, summary.other) == (6, 0, 0, 0)
    (shared,) = summarise(root).groups
    assert shared.merged_dtypes == ("F16", "I8")
    directory = root / "tasks" / "t"
    (shard,) = directory.glob("mask-*.safetensors")
    assert summary.bits == 8 * (shard.stat().st_size + shared.nbytes) / 30_000
    sizes = {tensor.name: tensor.nbytes for tensor in describe_task(BundleFiles(root), "t").tensors}
    bits, two_bits, four_bits = (-(-5000 * width // 8 // 64) * 64 for width in (1, 2, 4))
    assert sizes == {
        "mask": bits,
        "signed": two_bits,
        "two-level": bits,
        "sign": bits,
        "sparse": bits + 10_048,
        "uniform": four_bits,
    }


def test_an_embedded_base_counts_on_both_sides(models, tmp_path):
    bundle = pack_models(models, tmp_path / "bundle", embed_base=True, base_ref="org/name@" + "a" * 40)
    summary = summarise(bundle)
    assert summary.base.embedded
    assert (summary.base.repo_id, summary.base.revision) == ("org/name", "a" * 40)
    experts = sum(task.checkpoint_nbytes for task in summary.tasks)
    assert summary.checkpoints_nbytes == experts + summary.base.checkpoint_nbytes
    assert summary.base_nbytes > summary.base.checkpoint_nbytes


def test_a_summary_is_plain_json(packed):
    summary = summarise(packed[0])
    plain = json.loads(json.dumps(summary.to_dict()))
    assert plain["path"] == str(packed[0])
    assert plain["base"]["parameters"] == summary.base.parameters
    assert plain["groups"][0]["merged_dtypes"] == ["LOG4"]
    assert [task["kinds"] for task in plain["tasks"]] == [task.kinds for task in summary.tasks]
    for name in ("nbytes", "shared_nbytes", "tasks_nbytes", "base_nbytes", "companions_nbytes", "ratio"):
        assert plain[name] == getattr(summary, name)


def test_a_task_that_is_not_here_hides_no_other(bundle):
    shutil.rmtree(bundle / "tasks" / "task2")
    summary = summarise(bundle)
    first, absent, last = summary.tasks
    assert first.fetched
    assert last.fetched
    assert not absent.fetched
    assert (absent.checkpoint_nbytes, absent.bits, absent.kinds) == (None, None, None)
    assert absent.nbytes > 0
    assert absent.cosine is not None
    assert summary.weighed == (first, last)
    here = summary.nbytes - absent.nbytes
    assert summary.ratio == pytest.approx((first.checkpoint_nbytes + last.checkpoint_nbytes) / here)
    assert presence(bundle).not_fetched == ("task2",)


def test_a_bundle_without_any_task_here_has_no_ratio(bundle):
    shutil.rmtree(bundle / "tasks")
    shutil.rmtree(bundle / "groups")
    summary = summarise(bundle)
    assert summary.ratio is None
    assert summary.groups[0].merged_dtypes is None


def replace_table(bundle: Path, slug: str, **changes):
    """Rewrite a task's table, and the manifest with it."""
    path = layout.task_table(slug)
    table = parsing.parse((bundle / path).read_bytes(), tables.TaskTable, path)
    written = files.write_file(bundle / path, parsing.serialise(msgspec.structs.replace(table, **changes)))
    manifest = parsing.parse_manifest((bundle / layout.MANIFEST).read_bytes(), layout.MANIFEST)
    entry = tables.FileEntry(path=path, size=written.size, sha256=written.sha256, git_oid=written.git_oid)
    listed = tuple(entry if file.path == path else file for file in manifest.files)
    sealed = parsing.serialise_manifest(msgspec.structs.replace(manifest, files=listed))
    files.write_file(bundle / layout.MANIFEST, sealed)


def test_a_task_of_a_newer_version_hides_no_other(bundle):
    replace_table(bundle, "task1", required_features=("telepathy",))
    first, *others = summarise(bundle).tasks
    assert "telepathy" in first.unreadable
    assert first.fetched
    assert first.kinds is None
    assert all(task.unreadable is None for task in others)


def test_a_damaged_table_is_refused(bundle):
    table = bundle / "tasks" / "task1" / "task.json"
    table.write_bytes(table.read_bytes().replace(b"signed", b"masked"))
    with pytest.raises(IntegrityError, match=r"tasks/task1/task.json: changed .* \[FILE-2\]"):
        summarise(bundle)


@pytest.mark.parametrize("look", [summarise, presence, lambda path: describe_task(BundleFiles(path), "task1")])
def test_no_bundle_is_an_error(look, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(BundleNotFoundError, match="there is no bundle"):
            look(path)


def test_presence_counts_files(packed):
    bundle, _ = packed
    everything = [path for path in bundle.rglob("*") if path.is_file()]
    found = presence(bundle)
    assert (found.files, found.not_fetched) == (len(everything), ())
    assert found.nbytes == sum(path.stat().st_size for path in everything)


def test_details_list_every_tensor(packed):
    bundle, report = packed
    details = describe_task(BundleFiles(bundle), "task2")
    assert (details.task.name, details.method) == ("task2", "signed-mask")
    assert details.task == summarise(bundle).tasks[1]
    found = {tensor.name: tensor for tensor in details.tensors}
    assert {name: tensor.kind for name, tensor in found.items()} == {
        "block.weight": "signed",
        "embed.weight": "extended",
        "frozen.weight": "same",
        "head.weight": "private",
        "norm.bias": "dropped",
        "steps": "same",
    }
    assert (found["block.weight"].dtype, found["block.weight"].shape) == ("F32", (80, 64))
    assert found["block.weight"].gain > 0
    assert (found["embed.weight"].rows, found["embed.weight"].base) == (90, "embed.weight")
    assert (found["norm.bias"].dtype, found["norm.bias"].shape, found["norm.bias"].nbytes) == (None, None, 0)
    assert (found["head.weight"].nbytes, found["head.weight"].gain) == (4 * 64 * 4, None)
    assert {file.name for file in details.files} == set(COMPANIONS)
    assert details.estimates == report.tasks[1].estimates
    assert json.loads(json.dumps(details.to_dict()))["tensors"][0]["name"] == "block.weight"


def test_details_give_the_bytes_in_the_shards(packed):
    bundle, _ = packed
    found = {tensor.name: tensor for tensor in describe_task(BundleFiles(bundle), "task1").tensors}
    with safe_open(bundle / "tasks/task1/mask-00001-of-00001.safetensors", "np") as shard:
        (nbytes,) = shard.get_slice("fields/block.weight").get_shape()
    assert found["block.weight"].nbytes == nbytes
    with safe_open(bundle / "tasks/task1/mask-00001-of-00001.safetensors", "np") as shard:
        (leading,) = shard.get_slice("fields/embed.weight").get_shape()
    assert found["embed.weight"].nbytes == leading + 2 * 50 * 4


def test_details_of_a_task_whose_shards_are_not_here(bundle):
    for shard in (bundle / "tasks" / "task1").glob("*.safetensors"):
        shard.unlink()
    details = describe_task(BundleFiles(bundle), "task1")
    assert not details.task.fetched
    sizes = {tensor.name: tensor.nbytes for tensor in details.tensors}
    assert sizes["block.weight"] is None
    assert sizes["frozen.weight"] == 0
    (bundle / "tasks" / "task1" / "task.json").unlink()
    with pytest.raises(NotFetchedError):
        describe_task(BundleFiles(bundle), "task1")


def test_an_unknown_task_suggests_the_nearest(packed):
    with pytest.raises(UnknownTaskError, match="did you mean 'task2'"):
        describe_task(BundleFiles(packed[0]), "task_2")


def test_a_summary_needs_neither_torch_nor_numpy(packed):
    code = (
        "import sys; from tallstore.cli import main; main(['inspect', sys.argv[1]]);"
        "print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(packed[0])], capture_output=True, text=True, check=True)
    assert "task1" in run.stdout
    loaded = set(run.stderr.split())
    assert "tallstore.inspecting" in loaded
    assert not loaded & {"torch", "numpy", "zstandard", "safetensors", "huggingface_hub", "rich.progress"}


def test_details_need_no_torch(packed):
    code = "import sys; from tallstore.inspecting.task_details import describe_task; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in run.stdout.split()
