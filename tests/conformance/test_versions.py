"""Bundles of other versions of the format, through everything that reads one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tallstore
from tallstore.exporting import export
from tallstore.format import layout, manifest, versions
from tests.command_line import refused, run
from tests.resealed import VECTORS, objects, resealed, tables, with_feature, with_key, with_keys_everywhere

SOURCES = ["two-groups", "companions", "extended-kinds", "same-alias-dropped", "centre", "sparse", "uniform"]
TWO = VECTORS / "two-groups" / "bundle"
TASK, OTHER, GROUP = "tasks/one/task.json", "tasks/other/task.json", "groups/g0001/group.json"
FEATURE = "org.example.telepathy"


def become(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Read and write as another version does."""
    for module in (manifest, versions):
        monkeypatch.setattr(module, "FORMAT_VERSION", version)


@pytest.fixture(autouse=True)
def released(monkeypatch):
    """A reader of version 1.0."""
    become(monkeypatch, "1.0")


def weights(path: Path, tasks: list[str] | None = None) -> dict[tuple[str, str], bytes]:
    """Every tensor of some tasks, or of all, by its bytes."""
    with tallstore.open_bundle(path) as bundle:
        return {
            (task, name): tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for task in tasks or bundle.tasks
            for name, tensor in bundle.state_dict(task).items()
        }


def as_released(tmp_path: Path, source: str) -> Path:
    return resealed(VECTORS / source / "bundle", tmp_path / "released", version="1.0")


# --- newer minor versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_unknown_keys_at_every_depth_change_nothing(source, tmp_path):
    original = as_released(tmp_path, source)
    edits = dict.fromkeys(tables(original), with_keys_everywhere)
    newer = resealed(original, tmp_path / "newer", edits, version="1.1")
    expected = weights(original)
    with pytest.warns(tallstore.NewerFormatWarning) as caught:
        found = weights(newer)
    assert found == expected
    assert sorted(str(warning.message).partition(":")[0] for warning in caught) == sorted(edits)
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(tallstore.NewerFormatWarning) as caught:
        assert tallstore.verify(newer) == []
    assert sorted(str(warning.message).partition(":")[0] for warning in caught) == sorted(edits)


@pytest.mark.parametrize("source", SOURCES)
def test_each_unknown_key_is_refused_in_a_bundle_of_the_readers_own_version(source, tmp_path):
    original = as_released(tmp_path, source)
    places = [
        (path, place) for path in tables(original) for place in objects(json.loads((original / path).read_bytes()))
    ]
    assert len(places) > 20
    for number, (path, place) in enumerate(places):
        edited = resealed(original, tmp_path / str(number), {path: with_key(place)})
        with pytest.raises(tallstore.FormatError, match=r"has the unknown key .*from-the-future \[VER-3\]$") as caught:
            weights(edited)
        assert caught.value.where == path
        assert {problem.rule for problem in tallstore.verify(edited)} == {"VER-3"}


@pytest.mark.filterwarnings("default::tallstore.NewerFormatWarning")
def test_the_command_line_says_once_a_file_what_it_ignores(tmp_path):
    edits = dict.fromkeys(tables(TWO), with_keys_everywhere)
    newer = resealed(TWO, tmp_path / "newer", edits, version="1.1")
    for command in (["verify"], ["inspect"], ["statistics"], ["export", "one", "--out", tmp_path / "expert"]):
        result = run(command[0], newer, *command[1:])
        lines = result.stderr.splitlines()
        assert lines[0].startswith("warning: tallstore.json: ignores 18 unknown keys (")
        assert len(lines) == len(set(lines)) <= len(edits)
        assert all(line.startswith("warning: ") and line.endswith(" of a newer version") for line in lines)


def test_warnings_can_be_made_errors(tmp_path):
    newer = resealed(TWO, tmp_path / "newer", {layout.MANIFEST: with_key(())}, version="1.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", tallstore.NewerFormatWarning)
        with pytest.raises(tallstore.NewerFormatWarning):
            tallstore.open_bundle(newer)


# --- versions that are not read ---------------------------------------------------------------------------------------

REFUSED = [
    ("2.0", "VER-1", "format_version is 2.0, this reader reads 1.x; update tallstore"),
    ("0.3", "VER-1", "format_version is 0.3, this reader reads 1.x; pack the bundle again"),
    ("1.0-draft", "VER-2", "format_version is 1.0-draft, a draft; this reader reads 1.0; pack the bundle again"),
    ("1.1-draft", "VER-2", "format_version is 1.1-draft, a draft; this reader reads 1.0; pack the bundle again"),
    ("2.0-draft", "VER-1", "format_version is 2.0-draft, this reader reads 1.x; update tallstore"),
    ("one", "VER-1", "format_version is 'one', which is no version"),
]


@pytest.mark.parametrize(("version", "rule", "problem"), REFUSED)
def test_what_is_not_read_is_refused_by_its_version_first(version, rule, problem, tmp_path):
    edits = {layout.MANIFEST: with_key((), "files", {"of another": "type"})}  # another major may have other fields
    other = resealed(TWO, tmp_path / "other", edits, version=version)
    line = f"tallstore.json: {problem} [{rule}]"
    with pytest.raises(tallstore.UnsupportedVersionError) as caught:
        tallstore.open_bundle(other)
    assert str(caught.value) == line
    assert [str(found) for found in tallstore.verify(other)] == [line]
    for command in (["inspect"], ["statistics"], ["export", "one", "--out", tmp_path / "expert"]):
        assert refused(command[0], other, *command[1:]) == line
    result = run("verify", other, code=1)
    assert result.stdout == f"{line}\n"
    assert result.stderr == f"error: {other}: 1 problem; a newer tallstore can judge it\n" or version != "2.0"


# --- features ---------------------------------------------------------------------------------------------------------


def test_a_feature_of_the_bundle_refuses_it(tmp_path):
    newer = resealed(TWO, tmp_path / "newer", {layout.MANIFEST: with_feature(FEATURE)}, version="1.1")
    line = (
        f"tallstore.json: requires the feature '{FEATURE}', which this reader does not have; update tallstore [VER-4]"
    )
    with pytest.raises(tallstore.UnsupportedFeatureError) as caught:
        tallstore.open_bundle(newer)
    assert str(caught.value) == line
    assert [str(problem) for problem in tallstore.verify(newer)] == [line]
    assert refused("inspect", newer) == line


@pytest.mark.parametrize("path", [TASK, GROUP])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_feature_of_a_task_or_group_leaves_the_others_alone(path, version, tmp_path):
    def edit(document):
        with_feature(FEATURE)(document)
        with_key((), "engrams", {})(document)
        (document.get("tensors") or document["vectors"])[0]["kind"] = "engram"

    newer = resealed(TWO, tmp_path / "newer", {path: edit}, version=version)
    line = f"{path}: requires the feature '{FEATURE}', which this reader does not have; update tallstore [VER-4]"
    assert weights(newer, ["other"]) == {
        key: value for key, value in weights(as_released(tmp_path, "two-groups")).items() if key[0] == "other"
    }
    with tallstore.open_bundle(newer) as bundle:
        for read in (bundle.state_dict, bundle.keys, lambda task: export(bundle, task, tmp_path / "expert")):
            with pytest.raises(tallstore.UnsupportedFeatureError) as caught:
                read("one")
            assert str(caught.value) == line
    assert [str(problem) for problem in tallstore.verify(newer)] == [line]
    assert not (tmp_path / "expert").exists()


@pytest.mark.parametrize("path", [TASK, GROUP])
def test_what_cannot_be_judged_is_named_and_hides_no_other(path, tmp_path):
    newer = resealed(TWO, tmp_path / "newer", {path: with_feature(FEATURE)}, version="1.1")
    result = run("verify", newer, code=1)
    assert result.stderr == f"error: {newer}: 1 problem; a newer tallstore can judge it\n"
    shown = run("inspect", newer).stdout
    assert "other" in shown
    assert "too new" in shown
    assert f"{path}: requires the feature '{FEATURE}'" in shown
    pytest.importorskip("matplotlib")
    page = tallstore.write_report(newer, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "other" in page
    assert "that only a newer tallstore reads" in page


def test_bytes_that_cannot_be_judged_are_still_checked(tmp_path):
    newer = resealed(TWO, tmp_path / "newer", {TASK: with_feature(FEATURE)}, version="1.1")
    shard = newer / "tasks" / "one" / "mask-00001-of-00001.safetensors"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert {problem.rule for problem in tallstore.verify(newer)} == {"VER-4", "FILE-2"}


# --- values that only a newer version knows, without their feature ----------------------------------------------------

UNKNOWN = {
    "kind": (TASK, ("tensors", 0), {"kind": "engram"}),
    "codec": (TASK, ("tensors", 0, "fields"), {"codec": "telegraph"}),
    "dtype of a result": (TASK, ("tensors", 0), {"dtype": "F9_E4M4"}),
    "dtype of a vector": (GROUP, ("vectors", 0), {"dtype": "LOG3"}),
    "role": (GROUP, ("vectors", 0), {"role": "memory"}),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_value_is_refused_where_it_stands(what, tmp_path):
    path, place, values = UNKNOWN[what]
    ((key, value),) = values.items()
    newer = resealed(TWO, tmp_path / "newer", {path: with_key(place, key, value)}, version="1.1")
    with pytest.raises(tallstore.FormatError, match=r"\[JSON-3\]$") as caught:
        weights(newer, ["one"])
    assert caught.value.where == path
    assert weights(newer, ["other"])
    assert {problem.rule for problem in tallstore.verify(newer)} == {"JSON-3"}


def test_an_unknown_dtype_of_the_base_refuses_every_task(tmp_path):
    edit = with_key(("tensors", 0), "dtype", "F9_E4M4")
    newer = resealed(TWO, tmp_path / "newer", {layout.BASE_TABLE: edit}, version="1.1")
    for task in ("one", "other"):
        with pytest.raises(tallstore.FormatError, match=r"^base\.json: .*\[JSON-3\]$"):
            weights(newer, [task])


# --- writers ----------------------------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def expert() -> dict[str, torch.Tensor]:
    return load_file(TWO / "base" / "model.safetensors")


CHANGES = {
    "add": lambda path: tallstore.add(path, {"new": expert()}),
    "remove": lambda path: tallstore.remove(path, ["other"]),
    "repack": lambda path: tallstore.repack(path, {"one": expert(), "other": expert()}),
}


@pytest.mark.filterwarnings("ignore::tallstore.NewerFormatWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_is_not_changed_by_who_would_lose_a_key(change, tmp_path):
    newer = resealed(TWO, tmp_path / "newer", {layout.MANIFEST: with_key(("tasks", 1))}, version="1.1")
    before = contents(newer)
    with pytest.raises(tallstore.UnsupportedVersionError) as caught:
        CHANGES[change](newer)
    assert caught.value.rule == "WRITE-5"
    assert str(caught.value).endswith("of a newer version, lost if this version changed it; update tallstore [WRITE-5]")
    assert contents(newer) == before


@pytest.mark.filterwarnings("ignore::tallstore.NewerFormatWarning")
@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_newer_bundle_keeps_its_version_and_the_keys_of_its_tables(change, tmp_path):
    newer = resealed(TWO, tmp_path / "newer", {TASK: with_key(("tensors", 0))}, version="1.1")
    table = (newer / TASK).read_bytes()
    CHANGES[change](newer)
    assert json.loads((newer / layout.MANIFEST).read_bytes())["format_version"] == "1.1"
    assert (newer / TASK).read_bytes() == table
    assert tallstore.verify(newer) == []


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_change_keeps_what_it_cannot_judge(change, tmp_path):
    tables = {"tasks/cafe/task.json": with_feature(FEATURE)}
    source = resealed(VECTORS / "companions" / "bundle", tmp_path / "source", version="1.0")
    bundle = resealed(source, tmp_path / "bundle", tables)
    before = contents(bundle)
    if change == "add":
        tallstore.add(bundle, {"new": load_file(bundle / "base" / "model.safetensors")})
    else:
        tallstore.remove(bundle, ["mnist"])
    after = contents(bundle)
    kept = {path for path in before if path.startswith(("tasks/cafe/", "files/", "groups/g0001/"))}
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert json.loads(after[layout.MANIFEST])["format_version"] == "1.0"
    assert {problem.rule for problem in tallstore.verify(bundle)} <= {"VER-4"}


def test_metadata_of_the_users_stay_when_a_bundle_grows(tmp_path):
    def describe(document):
        document["metadata"] = {"licence": "CC-BY-4.0"}
        document["tasks"][0]["metadata"] = {"org.example.owner": "somebody"}

    bundle = resealed(TWO, tmp_path / "bundle", {layout.MANIFEST: describe}, version="1.0")
    tallstore.remove(bundle, ["other"])
    with tallstore.open_bundle(bundle) as opened:
        assert opened.manifest.metadata == {"licence": "CC-BY-4.0"}
        assert [task.metadata for task in opened.manifest.tasks] == [{"org.example.owner": "somebody"}]
    assert tallstore.verify(bundle) == []


def test_an_older_bundle_keeps_its_version_when_it_grows(monkeypatch, tmp_path):
    bundle = resealed(TWO, tmp_path / "bundle", version="1.0")
    become(monkeypatch, "1.4")
    tallstore.add(bundle, {"new": expert()})
    assert json.loads((bundle / layout.MANIFEST).read_bytes())["format_version"] == "1.0"
    assert tallstore.verify(bundle) == []
