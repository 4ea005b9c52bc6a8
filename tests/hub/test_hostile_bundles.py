"""Bundles of the Hub that mean harm: nothing leaves the folder, nothing is allocated, nothing is executed."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest

import tallstore
from tallstore.format import layout, parsing
from tallstore.format.manifest import Manifest
from tests.hub import pulls
from tests.hub.loopback.repository import Entry
from tests.hub.pulls import call, contents, digests, shown
from tests.model_directories import pack_models

SHARD = "tasks/task1/mask-00001-of-00001.safetensors"
HUGE = 1 << 45


@pytest.fixture(scope="module")
def bundle(models):
    return pack_models(models, models / "bundle", method=tallstore.Sign())


@pytest.fixture
def repository(request, running, bundle):
    repository = running.add(f"user/{pulls.name_of(request)}")
    repository.push(contents(bundle))
    running.log.clear()
    return repository


def reseal(repository, **edits):
    """Push the repository's manifest with other fields, sealed as the true one is."""
    manifest = msgspec.to_builtins(parsing.parse_manifest(repository.read()[layout.MANIFEST], layout.MANIFEST))
    for name, edit in edits.items():
        manifest[name] = edit(manifest[name])
    sealed = parsing.serialise_manifest(msgspec.convert(manifest, Manifest))
    repository.push({layout.MANIFEST: sealed})


def claim(repository, path, nbytes):
    """Let the Hub say that a file is so large."""
    entry = repository.resolve("main").files[path]
    other = Entry.large(entry.sha256 or "0" * 64, nbytes, None)
    repository.advance("refs/heads/main", lambda files: files.update({path: other}), title="Claim", author="user")


def enlarged(path, nbytes, files):
    """The manifest's files, one of them of another size."""
    return [each | ({"size": nbytes} if each["path"] == path else {}) for each in files]


def names_everywhere(found):
    return {path.name for path in found.rglob("*")}


@pytest.mark.parametrize(
    "path",
    [
        "../evil",
        "tasks/../../evil",
        "/evil",
        "C:/evil",
        "C:evil",
        "tasks\\evil",
        "base/nul.safetensors",
        "base/evil.",
        "base/evil:stream",
        "tasks/task1/../../../evil",
        ".git/hooks/evil",
        "base/.evil",
        "base/evil\x00",
    ],
)
@pytest.mark.parametrize("where", ["cache", "directory"])
def test_names_stay_in_the_folder(running, process, repository, tmp_path, path, where):  # noqa: PLR0917
    def add(files):
        digest = hashlib.sha256(b"evil").hexdigest()
        listed = {"path": path, "size": 4, "sha256": digest, "git_oid": "0" * 40}
        return sorted([*files, listed], key=lambda each: each["path"])

    reseal(repository, files=add)
    options = {"local_dir": tmp_path / "out"} if where == "directory" else {}
    found = call(process, tallstore.pull, repository.id, cache_dir=tmp_path / "cache", **options)
    assert found.error == "FormatError"
    assert "PATH-1" in found.problem
    assert not any(name.startswith(("evil", ".evil", "nul")) for name in names_everywhere(tmp_path))
    assert {each.path.rpartition("/")[2] for each in running.log.select("GET")} == {layout.MANIFEST}


def test_a_manifest_that_is_too_large_is_not_downloaded(running, process, repository, tmp_path):
    claim(repository, layout.MANIFEST, parsing.MAX_JSON_NBYTES + 1)
    found = call(process, shown, repository.id, cache_dir=tmp_path)
    assert (found.error, "JSON-4" in found.problem) == ("FormatError", True)
    assert not running.log.select("GET")


def test_a_file_that_is_larger_than_listed_is_not_downloaded(running, process, repository, tmp_path):
    claim(repository, SHARD, HUGE)
    found = call(process, digests, repository.id, ["task1"], cache_dir=tmp_path)
    assert (found.error, f"{SHARD}: has {HUGE} bytes on the Hub" in found.problem) == ("IntegrityError", True)
    assert not running.log.select("GET", f"*{SHARD}")


@pytest.mark.parametrize("path", ["base.json", "tasks/task1/task.json", "groups/g0001/group.json"])
def test_a_table_that_is_too_large_is_not_downloaded(running, process, repository, tmp_path, path):
    reseal(repository, files=partial(enlarged, path, parsing.MAX_JSON_NBYTES + 1))
    claim(repository, path, parsing.MAX_JSON_NBYTES + 1)
    found = call(process, digests, repository.id, ["task1"], cache_dir=tmp_path)
    assert (found.error, f"{path}: is over the limit" in found.problem) == ("FormatError", True)
    assert {each.path.rpartition("/")[2] for each in running.log.select("GET")} == {layout.MANIFEST}


@pytest.mark.parametrize("where", ["cache", "directory"])
def test_terabytes_are_not_downloaded(running, process, repository, tmp_path, where):
    claim(repository, SHARD, HUGE)
    reseal(repository, files=partial(enlarged, SHARD, HUGE))
    options = {"local_dir": tmp_path / "out"} if where == "directory" else {}
    found = call(process, tallstore.pull, repository.id, tasks=["task1"], cache_dir=tmp_path / "cache", **options)
    assert found.error == "OutputError"
    assert "35.2 TB are to be downloaded" in found.problem
    assert not running.log.select("GET", f"*{SHARD}")
    assert not (tmp_path / "out").exists()


def test_a_million_tasks_are_refused(process, repository, tmp_path):
    def multiply(tasks):
        return [tasks[0] | {"name": f"t{number}", "slug": f"t{number}"} for number in range(100_001)]

    raw = repository.read()[layout.MANIFEST]
    manifest = json.loads(raw)
    manifest["tasks"] = multiply(manifest["tasks"])
    manifest["manifest_sha256"] = "0" * 64
    unsealed = json.dumps(manifest).encode()
    repository.push({layout.MANIFEST: unsealed.replace(b"0" * 64, hashlib.sha256(unsealed).hexdigest().encode(), 1)})
    found = call(process, shown, repository.id, cache_dir=tmp_path)
    assert (found.error, "LIM-1" in found.problem) == ("FormatError", True)


def test_an_expert_larger_than_memory_is_refused_before_it_is_made(bundle, tmp_path):
    """Zeros of terabytes take kilobytes of a shard, and a table of what they are."""
    with tallstore.open_bundle(bundle) as opened:
        task = opened._files.task("task1")
        name, tensor = next((name, each) for name, each in task.tensors.items() if name == "head.weight")
        grown = msgspec.structs.replace(tensor, shape=(1 << 20, 1 << 20))
        opened._files._tasks._items["task1"] = replace(task, tensors={**task.tensors, name: grown})
        with pytest.raises(tallstore.TooLargeError, match=r"4\.4 TB are needed"):
            opened.tensor("task1", name)


def test_nothing_is_executed(running, process, bundle, repository, tmp_path):
    """Code, and pickles that call it, lie beside the bundle, and in the place of its base."""
    trap = b"import pathlib; pathlib.Path('%s').touch()" % bytes(tmp_path / "sprung")
    pickled = pickle.dumps(_Trap(str(tmp_path / "sprung")))
    repository.push({"modeling.py": trap, "pytorch_model.bin": pickled, "setup.py": trap})
    running.add("user/trap").push({"pytorch_model.bin": pickled, "modeling.py": trap})
    sha = running.repositories["user/trap"].refs["refs/heads/main"]
    reseal(repository, base=lambda _: {"repo_id": "user/trap", "revision": sha, "embedded": False})
    found = call(process, digests, repository.id, ["task1"], cache_dir=tmp_path / "cache")
    assert found.error == "BaseMissingError"
    assert not (tmp_path / "sprung").exists()
    assert not names_everywhere(tmp_path) & {"modeling.py", "setup.py"}


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_base_is_of_the_hub_whatever_it_is_called(process, repository, tmp_path):
    """The id is also the path of a directory, from where the process runs."""
    assert Path("tests/hub").is_dir()
    reseal(repository, base=lambda _: {"repo_id": "tests/hub", "revision": None, "embedded": False})
    found = call(process, digests, repository.id, ["task1"], cache_dir=tmp_path)
    assert found.error == "BaseMissingError"
    assert "no such model on the Hub" in found.problem


def test_a_directory_with_a_link_in_it_is_not_written_through(process, repository, tmp_path):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    call(process, tallstore.pull, repository.id, tasks=["task1"], local_dir=out, cache_dir=tmp_path / "cache")
    (out / "tasks" / "task2").symlink_to(outside)
    found = call(process, tallstore.pull, repository.id, tasks=["task2"], local_dir=out, cache_dir=tmp_path / "cache")
    assert (found.error, "is a link" in found.problem) == ("OutputError", True)
    assert not list(outside.iterdir())
