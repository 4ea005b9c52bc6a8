"""Bundles that grew and shrank, pushed again: what is new is sent, what is gone goes, all else stays where it is."""

from __future__ import annotations

import shutil

import pytest

import tallstore
from tallstore.format import layout
from tests.hub.pulls import call
from tests.hub.pushes import REPO, Pusher, contents, pushed, titles
from tests.model_directories import pack_models, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three fine-tunes, and a bundle of the first two, which share a vector."""
    root = save_models(tmp_path_factory.mktemp("models"), 2)
    pack_models(root, root / "bundle")
    save_models(root / "more", 3)
    return root


@pytest.fixture
def bundle(models, tmp_path):
    return shutil.copytree(models / "bundle", tmp_path / "bundle")


@pytest.fixture
def push(hub, plain_process):
    return Pusher(plain_process, hub.url, hub.token, plots=False)


def large(paths):
    return [path for path in paths if path.endswith(".safetensors")]


def add(bundle, models, task="task3", **options):
    tallstore.add(bundle, {task: models / "more/task3"}, base=models / "base", **options)


def test_after_an_add_the_new_group_and_the_manifest_are_sent(hub, push, bundle, models):
    push(bundle, REPO)
    before = pushed(hub)
    add(bundle, models)
    hub.log.clear()
    push(bundle, REPO)
    after = pushed(hub)
    assert after == contents(bundle)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert changed - {layout.MANIFEST} == {
        path for path in after if path.startswith(("groups/g0002/", "tasks/task3-g0002/"))
    }
    assert layout.MANIFEST in changed
    assert len(hub.log.select("PUT", "/lfs/*")) == len(large(changed)) > 0
    assert titles(hub)[0] == "Bundle of 3 tasks: 1 added"


def test_after_a_remove_nothing_large_is_sent(hub, push, bundle, models):
    add(bundle, models)
    push(bundle, REPO)
    before = pushed(hub)
    tallstore.remove(bundle, ["task2"])
    hub.log.clear()
    push(bundle, REPO)
    after = pushed(hub)
    assert after == contents(bundle)
    assert {path for path in before if path not in after} == {
        path for path in before if path.startswith("tasks/task2/")
    }
    assert not hub.log.select("PUT", "/lfs/*")
    assert titles(hub)[0] == "Bundle of 2 tasks: 1 removed"


def test_a_replaced_task_is_sent_under_other_paths(hub, push, bundle, models):
    push(bundle, REPO)
    before = pushed(hub)
    add(bundle, models, "task2", replace=True)
    push(bundle, REPO)
    after = pushed(hub)
    assert after == contents(bundle)
    both = before.keys() & after.keys() - {layout.MANIFEST}
    assert all(before[path] == after[path] for path in both)
    assert not any(path.startswith("tasks/task2/") for path in after)
    assert any(path.startswith("tasks/task2-g0002/") for path in after)


@pytest.fixture
def pull(hub, plain_process, tmp_path):
    """Pulls into a directory; the directory, and the paths that were downloaded."""

    def pull():
        hub.log.clear()
        options = {"local_dir": tmp_path / "pulled", "cache_dir": tmp_path / "cache", "token": hub.token}
        assert call(plain_process, tallstore.pull, REPO, **options).error is None
        sent = hub.log.select("GET", "*/resolve/*")
        return tmp_path / "pulled", {each.path.partition("/resolve/")[2].partition("/")[2] for each in sent}

    return pull


def test_a_second_pull_brings_the_new_group_alone(push, pull, bundle, models):
    push(bundle, REPO)
    pull()
    add(bundle, models)
    push(bundle, REPO)
    out, brought = pull()
    assert brought == {layout.MANIFEST, *(path for path in contents(bundle) if "g0002" in path)}
    assert tallstore.open_bundle(out).tasks == ("task1", "task2", "task3")
    assert tallstore.verify(out) == []
