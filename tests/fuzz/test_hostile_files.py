"""What is no plain file, in the place of every file; and names that lead elsewhere, in every place of a name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tallstore
from tallstore.checkpoints import open_checkpoint
from tallstore.cli.expert_file import read_expert_file
from tallstore.errors import DamagedCheckpointError, FormatError, InputError, TallstoreError
from tallstore.exporting import export
from tallstore.format import layout
from tallstore.format.origin import ORIGIN, read_origin
from tests import command_line
from tests.fuzz import bundles, seeds
from tests.fuzz.outcomes import check_message

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and links as POSIX has them")

SEED = seeds.VECTORS / "valid" / "companions" / "bundle"
LISTED = [row["path"] for row in json.loads((SEED / "tallstore.json").read_bytes())["files"]]
FILES = sorted([*LISTED, "tallstore.json"])
LOOKALIKE = "c\u043enfig.json"  # a Cyrillic letter


@contextmanager
def in_time(seconds=20):
    """What waits for a pipe's other end, or for a device's, never ends by itself."""

    def stop(_signal, _frame):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fifo(place: Path) -> None:
    os.mkfifo(place)


def zeros(place: Path) -> None:
    place.symlink_to("/dev/zero")


def device(place: Path) -> None:
    try:
        os.mknod(place, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero itself
    except PermissionError:
        pytest.skip("only root makes devices")


def listener(place: Path) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # a socket's path has 100 characters at most
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    finally:
        os.chdir(here)


def directory(place: Path) -> None:
    place.mkdir()


def itself(place: Path) -> None:
    place.symlink_to(place.name)


def elsewhere(place: Path) -> None:
    place.symlink_to("/etc/hostname")


KINDS = (fifo, zeros, device, listener, directory, itself, elsewhere)


def put(place: Path, make) -> None:
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    make(place)


def read_all(root: Path) -> list[TallstoreError]:
    """What opening, loading and exporting were refused with."""
    refused = []
    try:
        with tallstore.open_bundle(root) as bundle:
            for task in bundle.tasks:
                for action in (
                    lambda task=task: bundle.state_dict(task),
                    lambda task=task: export(bundle, task, root.parent / f"out-{task}"),
                ):
                    try:
                        action()
                    except TallstoreError as error:  # noqa: PERF203 - each on its own
                        refused.append(error)
    except TallstoreError as error:
        refused.append(error)
    for error in refused:
        check_message(str(error))
    return refused


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("path", FILES)
def test_no_plain_file_in_the_place_of_one_of_a_bundle(tmp_path, path, make):
    root = tmp_path / "bundle"
    shutil.copytree(SEED, root)
    put(root / path, make)
    with in_time():
        assert read_all(root)
        problems = tallstore.verify(root)
    assert {problem.rule for problem in problems} & {"PATH-2", "FILE-4"}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("path", ["base/model.safetensors.index.json", "base/config.json", "base/adapter_config.json"])
def test_no_plain_file_beside_an_embedded_base(tmp_path, path, make):
    """Nobody lists it: `verify` tells of it, and loading may, but does not wait for it, nor read it to its end."""
    root = tmp_path / "bundle"
    shutil.copytree(SEED, root)
    put(root / path, make)
    with in_time():
        read_all(root)
        problems = tallstore.verify(root)
    assert make is directory or "FILE-3" in {problem.rule for problem in problems}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json"]
)
def test_no_plain_file_in_a_checkpoint(tmp_path, name, make):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    put(tmp_path / name, make)
    with in_time():
        try:
            with open_checkpoint(tmp_path) as opened:
                opened.read("w")
        except InputError as error:
            check_message(str(error))


@pytest.mark.parametrize("make", [fifo, zeros, device, listener])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.bin"])
def test_no_plain_file_is_a_checkpoint(tmp_path, name, make):
    make(tmp_path / name)
    with in_time(), pytest.raises(InputError, match="is not a regular file"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("make", KINDS)
def test_no_plain_file_in_the_place_of_what_a_directory_remembers(tmp_path, make):
    put(tmp_path / ORIGIN, make)
    with in_time():
        assert read_origin(tmp_path) is None


@pytest.mark.parametrize("make", [fifo, zeros, device, listener, directory])
def test_no_plain_file_is_a_list_of_experts(tmp_path, make):
    make(tmp_path / "experts.toml")
    with in_time(), pytest.raises(InputError, match="is not a regular file"):
        read_expert_file(tmp_path / "experts.toml")


# --- names ------------------------------------------------------------------------------------------------------------

ELSEWHERE = (
    *("../evil", "a/../../evil", "/evil", "/", "", ".", "..", "a//b", "a/./b", "a\\b", "..\\evil", "C:evil", "C:/evil"),
    *(
        "\\\\host\\share",
        "//host/share",
        "nul",
        "NUL.json",
        "com1.txt",
        "aux",
        "config.json.",
        "config.json ",
        " config.json",
    ),
    *("a\0b", "a\nb", "~/x", "-rf", "*", "?", "a:b", "config.json:stream", ".hidden", "a/.hidden", "a/b/c/d.json"),
    *("x" * 129, "a/" * 3, "\u00e9.json", LOOKALIKE, "\uff0e\uff0e/evil", "\u2025/evil", "\ud800", "con\u200b.json"),
)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_companion_files_lead_nowhere_else(tmp_path, name):
    assert refused_with(tmp_path, lambda task: task["files"][0].update(name=name)) in {"PATH-1", "JSON-1"}


@pytest.mark.parametrize(
    "name", [*ELSEWHERE, "mask-1-of-1.safetensors", "mask-00001-of-00001.SAFETENSORS", "task.json"]
)
def test_names_of_shards_lead_nowhere_else(tmp_path, name):
    assert refused_with(tmp_path, lambda task: task["shards"][0].update(file=name)) in {"PATH-1", "JSON-1"}


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "Config.json"),
        ("config.json", "config.json/x.json"),
        ("a/x.json", "A/y.json"),
        ("a/b.json", "a/B.json"),
        ("a.json/b.json/c.json", "A.json"),
        ("vocab.txt", "VOCAB.TXT"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_names_of_companion_files_do_not_clash(tmp_path, names, turned):
    def rename(task):
        one = task["files"][0]
        task["files"] = [one | {"name": name} for name in (reversed(names) if turned else names)]

    assert refused_with(tmp_path, rename) == "PATH-3"


def test_names_that_do_not_clash_are_none_that_do():
    assert layout.clashes(["a/x.json", "a/y.json", "b.json", "b/x.json", "b.json.txt", "ab/x", "a/x"]) == {}
    assert layout.clashes(["a", "a"]) == {}  # twice is another rule's
    assert layout.clashes(["x/y/z", "X/y/w", "x/y", "q"]) == {"X/y/w": "x/y/z", "x/y": "x/y/z"}


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors/x.json",
        "MODEL.safetensors/x.json",
        "model-00001-of-00002.safetensors/x.json",
        "config.json.partial/x.json",
        "model.safetensors.index.json/x.json",
    ],
)
def test_companion_files_are_not_in_the_way_of_weights(tmp_path, name):
    parts = companions_bundle()
    _task(parts)["files"][0]["name"] = name
    bundles.write(parts.sealed(), tmp_path / "bundle", {})
    with tallstore.open_bundle(tmp_path / "bundle") as bundle:
        task = next(row["name"] for row in (_task(parts),))
        with pytest.warns(UserWarning, match="where the weights are written"):
            exported = export(bundle, task, tmp_path / "out")
    assert name not in exported.companions
    with open_checkpoint(tmp_path / "out") as opened:
        assert opened.names


@pytest.mark.parametrize("twin", ["Model.safetensors", "CONFIG.json"])
def test_paths_of_an_embedded_base_do_not_clash(tmp_path, twin):
    parts = companions_bundle()
    content = b"{}"
    same = "model.safetensors" if twin.endswith("tensors") else "config.json"
    manifest = parts.documents[bundles.MANIFEST]
    listed = {row["path"] for row in manifest["files"]}
    for name in {twin, same} - {path.removeprefix("base/") for path in listed}:
        parts.others[f"base/{name}"] = content
        manifest["files"].append({"path": f"base/{name}", "size": 0, "sha256": "0" * 64, "git_oid": None})
    manifest["files"].sort(key=lambda row: row["path"])
    bundles.write(parts.sealed(), tmp_path / "bundle", {})
    with pytest.raises(FormatError, match="PATH-3"):
        tallstore.open_bundle(tmp_path / "bundle")
    assert "PATH-3" in {problem.rule for problem in tallstore.verify(tmp_path / "bundle")}


@pytest.mark.parametrize("name", [*ELSEWHERE, "*", "mod*", "C:model.safetensors"])
def test_names_in_an_index_lead_nowhere_else(tmp_path, name):
    (tmp_path / "in").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "evil")
    save_file({"w": torch.zeros(2)}, tmp_path / "in" / "model.safetensors")
    index = {"weight_map": {"w": name}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with in_time(), pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "in")
    check_message(str(caught.value))
    assert (
        isinstance(caught.value, DamagedCheckpointError)
        or "cannot be read" in str(caught.value)
        or "regular" in str(caught.value)
    )


@pytest.mark.parametrize("name", ["m\u202enist", "a\u2028b", "\u2066x", "a\x85b"])
def test_a_task_is_not_packed_under_a_name_that_hides_what_it_is(tmp_path, name):
    experts = {name: {"w": torch.randn(4, 4)}, "b": {"w": torch.randn(4, 4)}}
    with pytest.raises(tallstore.OptionError, match="is no task name") as caught:
        tallstore.pack({"w": torch.zeros(4, 4)}, experts, tmp_path / "out")
    check_message(str(caught.value))


@pytest.mark.parametrize(
    "name", ["mnist", "\u043cnist", "MNIST", "mn\u0131st", "e\u0301", "\u00e9", "[/red]", "<b>", "|a|", "a`b", "%s {0}"]
)
def test_tasks_whose_names_look_alike_have_directories_of_their_own(tmp_path, name):
    weights = {"w": torch.randn(4, 4)}
    experts = {name: weights, "mnist 2": {"w": torch.randn(4, 4)}, "\u043cnist 2": {"w": torch.randn(4, 4)}}
    tallstore.pack({"w": torch.zeros(4, 4)}, experts, tmp_path / "b", embed_base=True)
    with tallstore.open_bundle(tmp_path / "b") as bundle:
        slugs = [task.slug for task in bundle.manifest.tasks]
        assert len(set(slugs)) == 3
        assert all(slug.isascii() and slug == slug.lower() for slug in slugs)
        assert torch.equal(bundle.tensor(name, "w"), weights["w"])
    shown = command_line.run("inspect", tmp_path / "b").stdout
    assert name in shown
    assert "\x1b" not in shown


def companions_bundle() -> bundles.Parts:
    return bundles.Parts.of(SEED)


def _task(parts: bundles.Parts):
    """The table of the first task that has companion files and a shard."""
    return next(
        table
        for path, table in sorted(parts.documents.items())
        if path.endswith("task.json") and table["files"] and table["shards"]
    )


def refused_with(tmp_path: Path, change) -> str:
    """The rule under which a bundle is refused whose task was changed; `verify` finds it too."""
    parts = companions_bundle()
    task = _task(parts)
    change(task)
    bundles.write(parts.sealed(), tmp_path / "bundle", {})
    with tallstore.open_bundle(tmp_path / "bundle") as bundle, pytest.raises(FormatError) as caught:
        bundle.state_dict(task["name"])
    check_message(str(caught.value))
    assert caught.value.rule in {problem.rule for problem in tallstore.verify(tmp_path / "bundle")}
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}
    return caught.value.rule
