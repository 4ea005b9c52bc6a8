"""A change of a bundle at its edges: readers that are at it, writers that came first, crashes, places that refuse."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

import tallstore
from tallstore import files
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tests.growing_cases import BASE, assert_same, expert, experts, packed, state, weights
from tests.resealed import write_manifest

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


def snapshot(bundle):
    """Everything in a bundle, the manifest included."""
    return {path: raw for path, (raw, _) in state(bundle).items()} | {"": (bundle / layout.MANIFEST).read_bytes()}


CHANGES = {
    "add": lambda bundle: tallstore.add(bundle, experts("d"), base=BASE),
    "replace": lambda bundle: tallstore.add(bundle, {"b": expert(0)}, base=BASE, replace=True),
    "remove": lambda bundle: tallstore.remove(bundle, ["b"]),
    "repack": lambda bundle: tallstore.repack(bundle, experts("abc"), base=BASE),
}


# --- readers ----------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("change", CHANGES)
def test_a_reader_that_had_read_a_task_reads_it_on(tmp_path, change):
    """Its files are open: that they were deleted takes nothing from it."""
    bundle = packed(tmp_path / "bundle")
    old = weights(bundle)
    with tallstore.open_bundle(bundle, base=BASE) as opened:
        for task in "abc":
            opened.state_dict(task)
        CHANGES[change](bundle)
        for task in "abc":
            assert_same(opened.state_dict(task), old[task])


@pytest.mark.parametrize(("change", "gone"), [("add", ""), ("replace", "b"), ("remove", "b"), ("repack", "abc")])
def test_a_reader_that_comes_to_what_is_gone_is_told_to_open_again(tmp_path, change, gone):
    bundle = packed(tmp_path / "bundle")
    old = weights(bundle)
    with tallstore.open_bundle(bundle, base=BASE) as opened:
        CHANGES[change](bundle)
        for task in "abc":
            if task in gone:
                with pytest.raises(tallstore.BundleChangedError, match="open it again") as caught:
                    opened.state_dict(task)
                assert "\n" not in str(caught.value)
            else:
                assert_same(opened.state_dict(task), old[task])
    weights(bundle)


def test_a_bundle_that_was_packed_anew_is_another_too(tmp_path):
    bundle = packed(tmp_path / "bundle")
    with tallstore.open_bundle(bundle, base=BASE) as opened, tallstore.open_bundle(bundle, base=BASE) as at_shards:
        at_shards.keys("a")  # has its tables
        packed(bundle, "abx", overwrite=True)
        for reader in (opened, at_shards):
            with pytest.raises(tallstore.BundleChangedError):
                reader.state_dict("a")


def test_what_is_missing_from_a_bundle_that_nobody_changed_was_not_fetched(tmp_path):
    bundle = packed(tmp_path / "bundle")
    shutil.rmtree(bundle / "tasks" / "b")
    with tallstore.open_bundle(bundle, base=BASE) as opened:
        with pytest.raises(tallstore.NotFetchedError):
            opened.state_dict("b")
        (bundle / "groups" / "g0001" / "group.json").unlink()
        with pytest.raises(tallstore.FormatError, match="FILE-4"):
            opened.state_dict("a")


@pytest.mark.parametrize("change", ["replace", "remove", "repack"])
def test_who_verifies_meanwhile_is_told_to_do_it_again(tmp_path, change):
    bundle = packed(tmp_path / "bundle")
    changes = iter([CHANGES[change]])

    def progress(_done, _total):
        for each in changes:
            each(bundle)

    with pytest.raises(tallstore.BundleChangedError, match="was changed while it was verified; verify it again"):
        tallstore.verify(bundle, progress=progress)
    assert tallstore.verify(bundle) == []


@posix
def test_threads_that_read_while_a_bundle_changes_get_old_weights_or_a_clear_error(tmp_path):
    bundle = packed(tmp_path / "bundle")
    old = weights(bundle)
    ended, wrong = threading.Event(), []

    def read():
        while not ended.is_set():
            with tallstore.open_bundle(bundle, base=BASE) as opened:
                try:
                    assert_same(opened.state_dict("a"), old["a"])
                    for task in opened.tasks:
                        opened.state_dict(task)
                except tallstore.BundleChangedError:
                    pass
                except BaseException as error:  # noqa: BLE001 - whatever it is, the test has failed
                    wrong.append(error)
                    return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(3):
            tallstore.add(bundle, experts("d"), base=BASE)
            tallstore.add(bundle, experts("bd"), base=BASE, replace=True)
            tallstore.remove(bundle, ["d"])
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert wrong == []
    assert tallstore.verify(bundle) == []


# --- crashes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def before_and_after(tmp_path):
    """The same bundle before a change and after it."""
    old = packed(tmp_path / "old")
    new = shutil.copytree(old, tmp_path / "new")
    tallstore.add(new, {"b": expert(0), "d": expert(1)}, base=BASE, replace=True)
    return old, new


def merged(one: Path, other: Path, manifest: Path, place: Path) -> Path:
    """What a crash leaves in the middle of the change: the files of both, and one of the manifests."""
    shutil.copytree(one, place)
    shutil.copytree(other, place, dirs_exist_ok=True)
    shutil.copy(manifest / layout.MANIFEST, place / layout.MANIFEST)
    return place


@pytest.mark.parametrize("which", [0, 1])
def test_what_a_crash_left_is_whole_and_the_next_change_clears_up(tmp_path, before_and_after, which):
    old, new = before_and_after
    side = before_and_after[which]
    place = merged(old, new, side, tmp_path / "place")
    room = tmp_path / ".place.partial"
    (room / "made" / "tasks").mkdir(parents=True)
    (room / ".holder").write_text("nonsense")
    assert {problem.rule for problem in tallstore.verify(place)} == {"FILE-3"}
    for task, tensors in weights(side).items():
        assert_same(weights(place)[task], tensors)
    tallstore.remove(place, ["c"])
    tallstore.remove(side, ["c"])
    assert tallstore.verify(place) == []
    assert snapshot(place) == snapshot(side)
    assert not room.exists()


def test_directories_that_a_crash_left_empty_go_too(tmp_path):
    bundle = packed(tmp_path / "bundle")
    (bundle / "groups" / "g0002").mkdir()
    (bundle / "tasks" / "d-g0002").mkdir()
    tallstore.remove(bundle, [])
    assert sorted(path.name for path in (bundle / "tasks").iterdir()) == ["a", "b", "c"]
    assert not (bundle / "groups" / "g0002").exists()


def test_the_users_own_files_stay(tmp_path):
    bundle = packed(tmp_path / "bundle")
    own = ["README.md", "LICENSE", "notes/base.json", "base/model.safetensors", "tasks/.DS_Store", ".git/config"]
    for path in own:
        (bundle / path).parent.mkdir(exist_ok=True)
        (bundle / path).write_text("mine")
    tallstore.add(bundle, experts("d"), base=BASE)
    tallstore.remove(bundle, ["a"])
    assert all((bundle / path).read_text() == "mine" for path in own)


def test_a_hidden_file_where_a_group_goes_is_in_nobodys_way(tmp_path):
    bundle = packed(tmp_path / "bundle")
    (bundle / "groups" / "g0002").mkdir()
    (bundle / "groups" / "g0002" / ".DS_Store").write_text("mine")
    tallstore.add(bundle, experts("d"), base=BASE)
    assert tallstore.verify(bundle) == []
    tallstore.remove(bundle, ["d"])
    assert tallstore.verify(bundle) == []


@posix
def test_a_link_in_the_place_of_a_directory_is_not_followed(tmp_path):
    bundle = packed(tmp_path / "bundle")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "task.json").write_text("mine")
    (bundle / "tasks" / "d-g0002").symlink_to(tmp_path / "elsewhere")
    before = snapshot(bundle)
    with pytest.raises(tallstore.OutputError, match="is a link"):
        tallstore.add(bundle, experts("d"), base=BASE)
    assert snapshot(bundle) == before
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["task.json"]


# --- refusals of the system -------------------------------------------------------------------------------------------


class Refusing:
    """A function of the system that refuses its nth call."""

    def __init__(self, function, at, error):
        self.function, self.left, self.error = function, at, error

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*arguments, **options)


@posix
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["fsync", "replace", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, None])
def test_whatever_is_refused_leaves_the_old_bundle(tmp_path, monkeypatch, change, name, code):
    """Every call that writes, refused or interrupted one after the other, until a change gets through."""
    expected = KeyboardInterrupt if code is None else tallstore.OutputError
    error = KeyboardInterrupt() if code is None else OSError(code, os.strerror(code))
    place = packed(tmp_path / "place")
    before = snapshot(place)
    for at in range(1, 200, 2 if name == "mkdir" else 3):
        refusing, stopped = Refusing(getattr(os, name), at, error), True
        with monkeypatch.context() as patched, contextlib.suppress(expected):
            patched.setattr(os, name, refusing)
            CHANGES[change](place)
            stopped = False  # a directory may be there that cannot be made
        if refusing.left > 0:
            break
        if snapshot(place) != before:
            assert code is None or not stopped  # interrupted behind the moment of the change
            assert tallstore.verify(place) == []
            shutil.rmtree(place)
            packed(place)
        assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert refusing.left > 0
    assert tallstore.verify(place) == []


@posix
def test_what_cannot_be_deleted_is_deleted_by_the_next_change(tmp_path, monkeypatch):
    bundle = packed(tmp_path / "bundle")
    refusing = Refusing(os.unlink, 0, None)

    def unlink(path, *arguments, **options):
        if "/bundle/tasks/b/" in str(path):
            raise OSError(errno.EIO, "input/output error", str(path))
        return refusing.function(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        with pytest.warns(UserWarning, match="cannot be deleted"):
            tallstore.remove(bundle, ["b"])
    assert list(weights(bundle)) == ["a", "c"]
    assert (bundle / "tasks" / "b").exists()
    tallstore.remove(bundle, [])
    assert tallstore.verify(bundle) == []


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_to_is_named_before_the_work(tmp_path):
    bundle = packed(tmp_path / "bundle")
    (bundle / "tasks").chmod(0o555)
    with pytest.raises(tallstore.OutputError, match="tasks: cannot be written to"):
        tallstore.add(bundle, experts("d"), base=BASE)
    (bundle / "tasks").chmod(0o755)


# --- writers ----------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("change", CHANGES)
def test_a_writer_that_came_first_is_named(tmp_path, change):
    bundle = packed(tmp_path / "bundle")
    before = snapshot(bundle)
    with (
        files.room_beside(bundle, lambda: None),
        pytest.raises(tallstore.OutputBusyError, match=rf"process {os.getpid()} on .+ \(since .+\) is writing it"),
    ):
        CHANGES[change](bundle)
    assert snapshot(bundle) == before
    CHANGES[change](bundle)
    assert tallstore.verify(bundle) == []


@posix
def test_threads_that_add_at_once_add_one_after_the_other_or_are_refused(tmp_path):
    bundle = packed(tmp_path / "bundle")
    added = []

    def add(name):
        while True:
            try:
                tallstore.add(bundle, experts(name), base=BASE)
            except tallstore.OutputBusyError:
                continue
            added.append(name)
            return

    threads = [threading.Thread(target=add, args=(name,)) for name in "def"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(added) == ["d", "e", "f"]
    assert tallstore.verify(bundle) == []
    assert list(weights(bundle)) == [*"abc", *added]
    assert BundleFiles(bundle).manifest.next_group == 5


def test_a_writer_without_a_lock_is_noticed_at_the_end(tmp_path, monkeypatch):
    """Where the file system has no locks, two may be at it: who comes last changes nothing."""
    bundle = packed(tmp_path / "bundle")

    def evaluate(_task, _weights):
        manifest = bundle / layout.MANIFEST
        shutil.copytree(bundle, tmp_path / "copy")
        tallstore.remove(tmp_path / "copy", ["a"])
        shutil.copy(tmp_path / "copy" / layout.MANIFEST, manifest)
        return 1.0

    with pytest.raises(tallstore.OutputBusyError, match="was changed by another process"):
        tallstore.add(bundle, experts("d"), base=BASE, evaluate=evaluate)
    assert [task.name for task in BundleFiles(bundle).manifest.tasks] == ["b", "c"]


# --- places that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_where_no_bundle_is_nothing_is_left(tmp_path, change):
    for place in (tmp_path / "nothing", tmp_path / "deep" / "nothing"):
        with pytest.raises(tallstore.BundleNotFoundError, match=r"no tallstore\.json"):
            CHANGES[change](place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", CHANGES)
def test_ids_of_the_hub_are_refused(change):
    with pytest.raises(tallstore.OutputError, match=r"org/name@v1: is on the Hub; pull it first"):
        CHANGES[change]("org/name@v1")


@posix
@pytest.mark.parametrize("links", [True, False])
def test_a_snapshot_in_the_hubs_cache_is_refused(tmp_path, links):
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    bundle = packed(repository / "snapshots" / "0123")
    if links:
        (repository / "blobs").mkdir()
        shutil.move(bundle / layout.MANIFEST, repository / "blobs" / "m")
        (bundle / layout.MANIFEST).symlink_to(repository / "blobs" / "m")
    before = snapshot(bundle)
    with pytest.raises(tallstore.OutputError, match="cache of the Hub's client"):
        tallstore.remove(bundle, ["a"])
    assert snapshot(bundle) == before


@posix
def test_behind_a_link_the_bundle_is_changed(tmp_path):
    bundle = packed(tmp_path / "bundle")
    (tmp_path / "link").symlink_to(bundle)
    tallstore.add(tmp_path / "link", experts("d"), base=BASE)
    assert (tmp_path / "link").is_symlink()
    assert list(weights(bundle)) == list("abcd")


def test_a_bundle_that_has_had_all_groups_gets_no_other(tmp_path):
    bundle = packed(tmp_path / "bundle")
    edit(bundle, next_group=10_000_000)
    before = snapshot(bundle)
    for change in (CHANGES["replace"], CHANGES["repack"]):
        with pytest.raises(tallstore.OutputError, match="has had 9,999,999 groups"):
            change(bundle)
    assert snapshot(bundle) == before
    tallstore.remove(bundle, ["a"])
    assert tallstore.verify(bundle) == []
    edit(bundle, next_group=9_999_999)
    tallstore.add(bundle, experts("x"), base=BASE)
    manifest = BundleFiles(bundle).manifest
    assert (manifest.groups[-1].id, manifest.next_group) == ("g9999999", 10_000_000)
    assert tallstore.verify(bundle) == []


@pytest.mark.filterwarnings("ignore::tallstore.NewerFormatWarning")
def test_what_a_newer_version_says_is_not_lost(tmp_path, monkeypatch):
    bundle = packed(tmp_path / "bundle")
    edit(bundle, format_version="1.7")
    monkeypatch.setattr("tallstore.format.versions.FORMAT_VERSION", "1.0")
    tallstore.remove(bundle, ["a"])
    assert BundleFiles(bundle).manifest.format_version == "1.7"
    write_manifest(bundle, json.loads((bundle / layout.MANIFEST).read_bytes()) | {"future": 1})
    before = snapshot(bundle)
    with pytest.raises(tallstore.UnsupportedVersionError, match=r"has the unknown key \$\.future of a newer version"):
        tallstore.remove(bundle, ["b"])
    assert snapshot(bundle) == before


def edit(bundle, **changes):
    """Write the manifest anew."""
    import msgspec  # noqa: PLC0415

    from tallstore.format.parsing import parse_manifest, serialise_manifest  # noqa: PLC0415

    path = bundle / layout.MANIFEST
    manifest = msgspec.structs.replace(parse_manifest(path.read_bytes(), ""), **changes)
    path.write_bytes(serialise_manifest(manifest))
