"""Paths that a bundle can have, and files that are opened without leaving it."""

from __future__ import annotations

import os
import re
import socket

import pytest

from tallstore.errors import FormatError
from tallstore.format import layout

DIGEST = "0123456789abcdef" * 4
ACCEPTED = [
    "base.json",
    "base/model.safetensors",
    "base/model.safetensors.index.json",
    "base/model-00001-of-00002.safetensors",
    "base/_x",
    "base/a..b",
    "base/" + "x" * 128,
    "base/console.txt",
    "base/com",
    "base/com10",
    "groups/g0001/group.json",
    "groups/g9999/merged-00001-of-00002.safetensors",
    "groups/g10000/group.json",
    "groups/g9999999/group.json",
    "tasks/mnist/task.json",
    "tasks/0-a_b/mask-00001-of-00001.safetensors",
    "tasks/com10/private-99999-of-99999.safetensors",
    "tasks/" + "x" * 64 + "/task.json",
    f"files/{DIGEST}",
]
REFUSED = [
    "",
    ".",
    "..",
    "/",
    "tallstore.json",
    "README.md",
    ".gitattributes",
    "base",
    "base/",
    "base/.hidden",
    "base/..",
    "base/.",
    "base/a.",
    "base/-a",
    "base/a b",
    "base/a/b",
    "base/é",
    "base/" + "x" * 129,
    "base/nul",
    "base/NUL.txt",
    "base/Con.tar.gz",
    "base/lpt9.bin",
    "base/com0",
    "base/a:b",
    "base/a\\b",
    "base/a\0b",
    "base/a\n",
    "base.json\n",
    "Base.json",
    "BASE/model.safetensors",
    "./base.json",
    "/base.json",
    "//host/base.json",
    "\\base.json",
    "C:base.json",
    "C:/base.json",
    "C:\\base.json",
    "base.json/",
    "groups/../base.json",
    "groups/g0001/../../../etc/passwd",
    "groups/g001/group.json",
    "groups/G0001/group.json",
    "groups/g0001/group.JSON",
    "groups/g0001/mask-00001-of-00001.safetensors",
    "groups/g0001/merged-1-of-1.safetensors",
    "groups/g\u0661\u0661\u0661\u0661/group.json",  # digits, but not ASCII
    "groups/g0001/group.json.partial",
    "tasks/task.json",
    "tasks//task.json",
    "tasks/../task.json",
    "tasks/Mnist/task.json",
    "tasks/-mnist/task.json",
    "tasks/_mnist/task.json",
    "tasks/mnist\n/task.json",
    "tasks/con/task.json",
    "tasks/com1/mask-00001-of-00001.safetensors",
    "tasks/" + "x" * 65 + "/task.json",
    "tasks/mnist/merged-00001-of-00001.safetensors",
    "tasks/mnist/mask-00001-of-00001.safetensors\0",
    "tasks\\mnist\\task.json",
    f"files/{DIGEST[:-1]}",
    f"files/{DIGEST.upper()}",
    f"files/{DIGEST}/x",
]


@pytest.mark.parametrize("path", ACCEPTED)
def test_paths_of_the_grammar_are_accepted(path):
    assert layout.is_bundle_path(path)


@pytest.mark.parametrize("path", REFUSED)
def test_other_paths_are_refused(path):
    assert not layout.is_bundle_path(path)


def test_the_paths_that_layout_makes_are_in_the_grammar():
    for path in [
        layout.BASE_TABLE,
        layout.group_table("g0001"),
        layout.task_table("mnist"),
        layout.companion_path(DIGEST),
        f"{layout.group_directory('g0001')}/{layout.shard_name('merged', 1, 3)}",
        f"{layout.task_directory('mnist')}/{layout.shard_name('mask', 99_999, 99_999)}",
        f"{layout.task_directory('mnist')}/{layout.shard_name('private', 1, 1)}",
        f"{layout.BASE_DIRECTORY}/model.safetensors",
    ]:
        assert layout.is_bundle_path(path)


@pytest.mark.parametrize("slug", ["a", "0", "mnist", "a-b_c", "com10", "console", "x" * 64])
def test_slugs_are_accepted(slug):
    assert layout.is_slug(slug)


@pytest.mark.parametrize(
    "slug", ["", "-a", "_a", "A", "a.b", "é", "a/b", "..", "con", "nul", "com0", "lpt1", "x" * 65, "a\n"]
)
def test_what_is_no_slug_is_refused(slug):
    assert not layout.is_slug(slug)


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json", "a/b/c", "_x", "x" * 128])
def test_companion_names_are_accepted(name):
    assert layout.is_companion_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", "../a", "a/..", "a/b/c/d", "a\\b", "C:a", ".env", "a.", "a/aux.h", "a\n", "x" * 129],
)
def test_what_is_no_companion_name_is_refused(name):
    assert not layout.is_companion_name(name)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("mnist", "mnist"),
        ("MNIST", "mnist"),
        ("Stanford Cars (2013)", "stanford-cars-2013"),
        ("Übersetzung – Français", "ubersetzung-francais"),
        ("a/b\\c:d", "a-b-c-d"),
        ("snake_case", "snake_case"),
        ("...", "ab5df625"),
    ],
)
def test_slugs_of_names(name, slug):
    assert layout.slugify(name, ()) == slug


@pytest.mark.parametrize("name", ["con", "NUL", "日本語", "", " ", "\N{GRINNING FACE}", "-", "___", "\ud800"])
def test_names_that_give_no_slug_are_told_apart_by_their_digest(name):
    slug = layout.slugify(name, ())
    assert layout.is_slug(slug)
    assert slug != layout.slugify(name + "x", ())


def test_a_taken_slug_gets_digits_and_stays_readable():
    first = layout.slugify("mnist", ())
    second = layout.slugify("MNIST", {first})
    third = layout.slugify("MNIST", {first, second})
    assert second.startswith("mnist-")
    assert third.startswith("mnist-")
    assert len({first, second, third}) == 3


def test_a_long_name_keeps_its_beginning():
    slug = layout.slugify("x" * 200, ())
    assert slug == "x" * 64
    assert layout.slugify("x" * 201, {slug}).startswith("x" * 55 + "-")


@pytest.mark.parametrize(
    ("name", "group", "slug"),
    [
        ("mnist", 2, "mnist-g0002"),
        ("mnist", 9999, "mnist-g9999"),
        ("con", 2, "con-g0002"),
        ("...", 3, "ab5df625-g0003"),
        ("run g0002", 1, "run-g0002-g0001"),
        ("run g0002", 3, "run-g0002-g0003"),
        ("rung0002", 1, "rung0002"),
        ("g0002", 1, "g0002"),
        ("run-g00021", 1, "run-g00021"),
        ("x" * 64, 2, "x" * 58 + "-g0002"),
        ("x" * 57 + "-y", 2, "x" * 57 + "-g0002"),
        ("x" * 58 + "-g0002", 1, "x" * 58 + "-g0001"),
    ],
)
def test_slugs_of_groups_end_with_the_groups_id(name, group, slug):
    assert layout.slugify(name, (), group) == slug
    assert layout.is_slug(slug)


def test_a_taken_slug_of_a_group_gets_digits_before_the_groups_id():
    second = layout.slugify("MNIST", {"mnist-g0002"}, 2)
    assert re.fullmatch("mnist-[0-9a-f]{8}-g0002", second)
    third = layout.slugify("MNIST", {"mnist-g0002", second}, 2)
    assert re.fullmatch("mnist-[0-9a-f]{9}-g0002", third)


def test_no_slug_left():
    class Everything:
        def __contains__(self, slug):
            return True

    with pytest.raises(FormatError, match="MAN-2"):
        layout.slugify("mnist", Everything())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "bundle"
    (root / "tasks" / "mnist").mkdir(parents=True)
    (root / "tasks" / "mnist" / "task.json").write_bytes(b"{}")
    (root / "tallstore.json").write_bytes(b"{}")
    return root


def refused(root, path):
    with pytest.raises(FormatError) as caught:
        layout.resolve(root, path)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_file_is_resolved(root):
    assert layout.resolve(root, "tasks/mnist/task.json") == root / "tasks" / "mnist" / "task.json"
    assert layout.resolve(root, "tallstore.json") == root / "tallstore.json"


def test_a_bundle_may_be_reached_through_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert layout.resolve(tmp_path / "link", "tallstore.json").read_bytes() == b"{}"


@pytest.mark.parametrize("path", ["../bundle/tallstore.json", "/etc/passwd", "base/\0", "README.md"])
def test_a_path_outside_the_grammar_is_refused(root, path):
    assert refused(root, path).rule == "PATH-1"


def test_a_missing_file_is_missing(root):
    with pytest.raises(FileNotFoundError):
        layout.resolve(root, "base.json")
    with pytest.raises(FileNotFoundError):
        layout.resolve(root, "tasks/cars/task.json")


def test_a_link_is_refused_wherever_it_stands(root, tmp_path):
    (root / "base.json").symlink_to("tallstore.json")
    assert refused(root, "base.json").rule == "PATH-2"
    assert "symbolic link" in refused(root, "base.json").problem
    (root / "tasks" / "cars").symlink_to(root / "tasks" / "mnist")
    assert refused(root, "tasks/cars/task.json").rule == "PATH-2"
    (root / "files").symlink_to(tmp_path / "nowhere")
    assert refused(root, f"files/{DIGEST}").rule == "PATH-2"


def test_a_directory_in_place_of_a_file_is_refused(root):
    (root / "base.json").mkdir()
    error = refused(root, "base.json")
    assert error.rule == "PATH-2"
    assert "'base.json' is a directory" in error.problem


def test_a_file_in_place_of_a_directory_is_refused(root):
    (root / "groups").write_bytes(b"")
    assert refused(root, "groups/g0001/group.json").rule == "PATH-2"


@pytest.mark.skipif(os.name != "posix", reason="has no FIFOs")
def test_what_would_block_is_refused(root):
    os.mkfifo(root / "base.json")
    assert "FIFO" in refused(root, "base.json").problem


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="has no Unix sockets")
def test_a_socket_is_refused(root, monkeypatch):
    monkeypatch.chdir(root)  # a socket's path has about a hundred characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("base.json")
        assert "socket" in refused(root, "base.json").problem


def test_reading_is_bounded(root):
    (root / "base.json").write_bytes(b"12345")
    assert layout.read_bounded(root, "base.json", 5) == b"12345"
    with pytest.raises(FormatError, match="over the limit of 4 bytes") as caught:
        layout.read_bounded(root, "base.json", 4)
    assert (caught.value.rule, caught.value.where) == ("JSON-4", "base.json")
    with pytest.raises(FormatError, match="LIM-1"):
        layout.read_bounded(root, "base.json", 4, rule="LIM-1")
