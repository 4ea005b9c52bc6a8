"""Files that no manifest lists are deleted where a bundle's may be, and nowhere else."""

from __future__ import annotations

import os

import pytest

from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.sweeping import delete, sweep
from tests.growing_cases import packed


@pytest.fixture(scope="module", params=[False, True], ids=["by reference", "embedded"])
def bundle(request, tmp_path_factory):
    return packed(tmp_path_factory.mktemp("bundles") / "bundle", "ab", embed_base=request.param)


def put(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("x")


def test_only_what_is_unlisted_at_a_path_of_a_bundle_goes(bundle):
    manifest = BundleFiles(bundle).manifest
    left = [
        f"files/{'0' * 64}",
        "groups/g0002/group.json",
        "groups/g0001/merged-00002-of-00002.safetensors",
        "tasks/a/mask-00003-of-00003.safetensors",
        "tasks/c-g0002/task.json",
    ]
    own = ["README.md", "files/notes.txt", "tasks/a/.hidden", "tasks/a/plot.png", "groups/g0001/deep/group.json"]
    own += ["tasks/c-g0002/mine.txt", "more/tasks/c/task.json", "tallstore.json.bak"]
    base = "base/extra.json"
    put(bundle, *left, *own, base)
    assert sweep(bundle, manifest) == sorted([*left, *([base] if manifest.base.embedded else [])])
    assert all(layout.is_here(bundle, file.path) for file in manifest.files)
    assert all((bundle / path).exists() for path in own)
    assert (bundle / base).exists() != manifest.base.embedded
    assert not (bundle / "groups" / "g0002").exists()
    assert sweep(bundle, manifest) == []


def test_directories_of_listed_tasks_need_not_be_looked_into(bundle):
    manifest = BundleFiles(bundle).manifest
    inside, outside = "tasks/a/mask-00003-of-00003.safetensors", "tasks/d-g0002/task.json"
    put(bundle, inside, outside, f"files/{'0' * 64}")
    assert sweep(bundle, manifest, but_for_listed=True) == [f"files/{'0' * 64}", outside]
    assert sweep(bundle, manifest) == [inside]


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_links_are_left_and_not_followed(bundle, tmp_path):
    manifest = BundleFiles(bundle).manifest
    put(tmp_path / "task", "task.json")
    (bundle / "tasks" / "linked").symlink_to(tmp_path / "task")
    (bundle / "tasks" / "a" / "private-00009-of-00009.safetensors").symlink_to(tmp_path / "task" / "task.json")
    assert sweep(bundle, manifest) == []
    delete(bundle, ["tasks/linked/task.json", "tasks/a/private-00009-of-00009.safetensors"])
    assert (tmp_path / "task" / "task.json").exists()
    (bundle / "tasks" / "linked").unlink()
    (bundle / "tasks" / "a" / "private-00009-of-00009.safetensors").unlink()


def test_what_is_not_there_need_not_be_deleted(bundle):
    delete(bundle, ["tasks/nothing/task.json", "groups/g0009/group.json", "files/" + "1" * 64])
