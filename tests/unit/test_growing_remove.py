"""`remove`: tasks go with what only they had; all else stays, byte for byte."""

from __future__ import annotations

import json

import msgspec
import pytest
from safetensors.torch import save_file

import tallstore
from tallstore.files import hash_bytes
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import FileEntry
from tallstore.format.parsing import serialise_manifest
from tests.growing_cases import BASE, assert_same, expert, experts, packed, state, weights


def test_a_task_goes_and_no_other_file_is_touched(tmp_path):
    bundle = packed(tmp_path / "bundle")
    before, old = state(bundle), weights(bundle)
    report = tallstore.remove(bundle, ["b"])
    after = state(bundle)
    gone = {path for path in before if path.startswith("tasks/b/")}
    assert after == {path: what for path, what in before.items() if path not in gone}
    assert tallstore.verify(bundle) == []
    assert list(weights(bundle)) == ["a", "c"]
    for task, tensors in weights(bundle).items():
        assert_same(tensors, old[task])
    assert (report.tasks, report.groups) == (("b",), ())
    assert report.nbytes == sum(len(before[path][0]) for path in gone)
    assert str(report).startswith("removed 1 task: ")


def test_a_group_goes_with_its_last_task(tmp_path):
    bundle = packed(tmp_path / "bundle", "ab")
    tallstore.add(bundle, experts("def"), base=BASE)
    assert tallstore.remove(bundle, ["d", "f"]).groups == ()
    assert (bundle / "groups" / "g0002").exists()
    report = tallstore.remove(bundle, ["e", "e"])
    assert (report.tasks, report.groups) == (("e",), ("g0002",))
    assert "and what only they shared (g0002)" in str(report)
    assert not (bundle / "groups" / "g0002").exists()
    assert tallstore.verify(bundle) == []


def test_a_groups_number_is_not_given_again(tmp_path):
    bundle = packed(tmp_path / "bundle", "a", method=tallstore.Sign())
    for _ in range(2):
        tallstore.add(bundle, experts("b"), base=BASE)
        tallstore.remove(bundle, ["b"])
    assert BundleFiles(bundle).manifest.next_group == 4
    tallstore.add(bundle, experts("b"), base=BASE)
    assert [task.slug for task in BundleFiles(bundle).manifest.tasks] == ["a", "b-g0004"]


def test_a_companion_file_goes_with_the_last_task_that_names_it(tmp_path):
    for name, own in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        save_file(expert(own), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"shared": True}))
        (tmp_path / name / "labels.json").write_text(json.dumps({"own": own}))
    bundle = tmp_path / "bundle"
    tallstore.pack(BASE, {"one": tmp_path / "one", "two": tmp_path / "two", "three": expert(3)}, bundle)
    assert len(list((bundle / "files").iterdir())) == 3
    tallstore.remove(bundle, ["one"])
    assert tallstore.verify(bundle) == []
    assert len(list((bundle / "files").iterdir())) == 2
    tallstore.remove(bundle, ["two"])
    assert tallstore.verify(bundle) == []
    assert not (bundle / "files").exists()


def test_companion_files_stay_that_an_unfetched_task_may_name(tmp_path):
    (tmp_path / "one").mkdir()
    save_file(expert(1), tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text("{}")
    bundle = tmp_path / "bundle"
    tallstore.pack(BASE, {"one": tmp_path / "one", "two": expert(2), "three": expert(3)}, bundle)
    for path in (bundle / "tasks" / "two").iterdir():
        path.unlink()
    tallstore.remove(bundle, ["one"])
    assert len(list((bundle / "files").iterdir())) == 1
    assert tallstore.verify(bundle) == []
    report = tallstore.remove(bundle, ["two"])
    assert not (bundle / "files").exists()
    assert report.nbytes == 2  # of an unfetched task nothing was here: it is the companion's
    assert tallstore.verify(bundle) == []


def test_companion_files_stay_that_a_task_of_a_later_version_may_name(tmp_path):
    """It needs a feature that this version lacks: nobody here knows what else it needs."""
    (tmp_path / "one").mkdir()
    save_file(expert(1), tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text("{}")
    bundle = tmp_path / "bundle"
    tallstore.pack(BASE, {"one": tmp_path / "one", "two": expert(2), "three": expert(3)}, bundle)
    rewrite(bundle, "tasks/two/task.json", lambda raw: raw.replace(b'features":[]', b'features":["holograms"]'))
    tallstore.remove(bundle, ["one"])
    assert len(list((bundle / "files").iterdir())) == 1
    tallstore.remove(bundle, ["two"])
    assert not (bundle / "files").exists()
    assert tallstore.verify(bundle) == []


def test_a_broken_table_of_a_task_that_stays_is_refused(tmp_path):
    (tmp_path / "one").mkdir()
    save_file(expert(1), tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text("{}")
    bundle = tmp_path / "bundle"
    tallstore.pack(BASE, {"one": tmp_path / "one", "two": expert(2)}, bundle)
    for edit in (lambda raw: raw[:-5], lambda raw: raw.replace(b'"files"', b'"fleas"'), lambda _: b"\xff[]"):
        rewrite(bundle, "tasks/two/task.json", edit)
        before = state(bundle)
        with pytest.raises(tallstore.FormatError, match="JSON-3"):
            tallstore.remove(bundle, ["one"])
        assert state(bundle) == before


def rewrite(bundle, path, edit):
    """Change a table, and let the manifest list it as it is then."""
    raw = edit((bundle / path).read_bytes())
    (bundle / path).write_bytes(raw)
    written = hash_bytes(raw)
    entry = FileEntry(path=path, size=written.size, sha256=written.sha256, git_oid=written.git_oid)
    manifest = BundleFiles(bundle).manifest
    listed = tuple(entry if file.path == path else file for file in manifest.files)
    (bundle / "tallstore.json").write_bytes(serialise_manifest(msgspec.structs.replace(manifest, files=listed)))


def test_what_is_not_there_is_refused_and_nothing_goes(tmp_path):
    bundle = packed(tmp_path / "bundle")
    before = state(bundle)
    with pytest.raises(tallstore.UnknownTaskError, match="no task named 'B'"):
        tallstore.remove(bundle, ["a", "B"])
    with pytest.raises(tallstore.OptionError, match="no task would be left; delete the directory"):
        tallstore.remove(bundle, ["a", "b", "c"])
    with pytest.raises(tallstore.OptionError, match="give a list of names"):
        tallstore.remove(bundle, "abc")
    assert tallstore.remove(bundle, []).tasks == ()
    assert state(bundle) == before


def with_config(folder, seed, config):
    folder.mkdir()
    save_file(expert(seed), folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return folder


def test_a_changed_table_of_a_task_that_stays_is_found_before_anything_goes(tmp_path):
    experts = {name: with_config(tmp_path / name, seed, "{}") for seed, name in enumerate(("one", "two"), start=1)}
    bundle = tmp_path / "bundle"
    tallstore.pack(BASE, experts, bundle)
    table = bundle / "tasks" / "one" / "task.json"
    table.write_bytes(table.read_bytes().replace(b"config", b"confIg"))
    before = state(bundle)
    with pytest.raises(tallstore.IntegrityError, match="FILE-2"):
        tallstore.remove(bundle, ["two"])
    assert state(bundle) == before


def test_tables_are_read_until_each_file_was_found_with_a_task_that_stays(tmp_path, monkeypatch):
    configs = {"one": "{}", "two": '{"own": 2}', "three": "{}", "four": "{}"}
    experts = {
        name: with_config(tmp_path / name, seed, config) for seed, (name, config) in enumerate(configs.items(), start=1)
    }
    bundle = tmp_path / "bundle"
    tallstore.pack(BASE, experts, bundle)
    read = []
    real = layout.read_bounded
    monkeypatch.setattr(layout, "read_bounded", lambda root, path, *rest: read.append(path) or real(root, path, *rest))
    tallstore.remove(bundle, ["four"])  # the first task has its file
    assert [path.split("/")[1] for path in read if path.startswith("tasks/")] == ["four", "one"]
    read.clear()
    tallstore.remove(bundle, ["two"])  # no other task has it: all were asked
    assert [path.split("/")[1] for path in read if path.startswith("tasks/")] == ["two", "one", "three"]
    assert len(list((bundle / "files").iterdir())) == 1
    assert tallstore.verify(bundle) == []


def test_a_task_whose_table_is_damaged_can_be_removed(tmp_path):
    experts = {name: with_config(tmp_path / name, seed, "{}") for seed, name in enumerate(("one", "two"), start=1)}
    bundle = tmp_path / "bundle"
    tallstore.pack(BASE, experts, bundle)
    (bundle / "tasks/two/task.json").write_bytes(b"{}")
    tallstore.remove(bundle, ["two"])
    assert len(list((bundle / "files").iterdir())) == 1
    assert tallstore.verify(bundle) == []
