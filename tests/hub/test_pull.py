"""Bundles pulled into the cache and into directories: whole and in part, again, after faults, at the same time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

import tallstore
from tallstore import files
from tallstore.format import layout
from tallstore.format.manifest import FileEntry
from tallstore.format.parsing import parse_manifest, serialise_manifest
from tests.hub import pulls
from tests.hub.client_process import client_environment
from tests.hub.loopback import LoopbackHub
from tests.hub.loopback.faults import Delay, Drop, Hold, Status, Tamper, Truncate
from tests.hub.pulls import call, contents, digests, start
from tests.model_directories import expert_tensors, pack_models, save_model, save_models


@pytest.fixture(scope="module")
def bundle(models):
    """Three tasks with companion files, and their base."""
    return pack_models(models, models / "bundle", embed_base=True, method=tallstore.Sign())


@dataclass
class Case:
    """A repository with the bundle, and a card, that no other test has; a cache, and a directory to write.

    Attributes:
        out: the directory, which is not there.
    """

    hub: LoopbackHub
    process: ProcessPoolExecutor
    bundle: Path
    repo_id: str
    cache: Path
    out: Path

    def pull(self, where: str = "cache", **options: object) -> pulls.Outcome:
        """Pull into the cache, or into the directory."""
        return self.start(where, **options).result(timeout=120)

    def start(self, where: str = "cache", **options: object) -> Future[pulls.Outcome]:
        if where == "directory":
            options.setdefault("local_dir", self.out)
        options.setdefault("cache_dir", self.cache)
        return start(self.process, tallstore.pull, self.repo_id, **options)

    def digests(self, *tasks: str) -> pulls.Outcome:
        """Of the bundle as it is opened by its id."""
        return call(self.process, digests, self.repo_id, tasks, cache_dir=self.cache)


@pytest.fixture
def case(request, running, process, bundle, tmp_path):
    """With an empty log, and nothing that goes wrong."""
    repo_id = f"user/{pulls.name_of(request)}"
    running.add(repo_id).push({**contents(bundle), "README.md": b"# Card"})
    running.log.clear()
    yield Case(running, process, bundle, repo_id, tmp_path / "cache", tmp_path / "out")
    running.faults.clear()


def downloaded(hub) -> list[str]:
    """The files whose bodies were sent, the manifest aside."""
    paths = [each.path.rpartition("/resolve/")[2].partition("/")[2] for each in hub.log.select("GET", "*/resolve/*")]
    return sorted(path for path in paths if path != layout.MANIFEST)


def without_origin(path: Path) -> dict[str, bytes]:
    """The files of a bundle that was pulled into a directory, and where it came from."""
    found = contents(path)
    assert json.loads(found.pop(".cache/tallstore/origin.json"))["repo_id"].startswith("user/")
    return found


# --- what is pulled ---


def test_a_whole_bundle_in_the_cache(case):
    path = case.pull().value
    assert contents(path) == contents(case.bundle)
    assert tallstore.verify(path) == []
    case.hub.log.clear()
    assert case.pull().value == path
    assert [each.method for each in case.hub.log] == ["HEAD"]


def test_a_whole_bundle_in_a_directory(case, tmp_path):
    assert case.pull("directory").value == case.out
    assert tallstore.verify(case.out) == []
    assert without_origin(case.out) == contents(case.bundle)
    assert not any(path.is_symlink() for path in case.out.rglob("*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


@pytest.mark.parametrize("where", ["cache", "directory"])
def test_some_tasks_are_a_bundle(case, where):
    path = case.pull(where, tasks=["task1", "task3"]).value
    assert tallstore.verify(path) == []
    assert not (path / "tasks" / "task2").exists()
    with tallstore.open_bundle(path) as opened:
        assert [opened.is_fetched(task) for task in opened.tasks] == [True, False, True]
    assert digests(path, ["task1", "task3"]) == digests(case.bundle, ["task1", "task3"])


def test_a_second_pull_adds_to_a_directory(case):
    case.pull("directory", tasks=["task1"])
    (case.out / "README.md").write_text("mine")
    case.hub.log.clear()
    case.pull("directory", tasks=["task2"])
    assert all(path.startswith(("tasks/task2/", "groups/", "files/")) for path in downloaded(case.hub))
    assert tallstore.verify(case.out) == []
    assert digests(case.out, ["task1", "task2"]) == digests(case.bundle, ["task1", "task2"])
    assert (case.out / "README.md").read_text() == "mine"


def test_what_is_there_and_wrong_is_put_right(case):
    case.pull("directory")
    shards = sorted(case.out.glob("tasks/*/mask-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    changed = bytearray(shards[2].read_bytes())
    changed[-1] ^= 1
    shards[2].write_bytes(changed)
    case.hub.log.clear()
    case.pull("directory")
    assert downloaded(case.hub) == [shard.relative_to(case.out).as_posix() for shard in shards]
    assert without_origin(case.out) == contents(case.bundle)


def test_what_the_cache_has_is_not_downloaded(case, tmp_path):
    case.pull()
    case.hub.log.clear()
    case.pull("directory")
    assert downloaded(case.hub) == []
    case.pull(local_dir=tmp_path / "offline", local_files_only=True)
    assert without_origin(case.out) == without_origin(tmp_path / "offline") == contents(case.bundle)


def test_what_a_killed_download_left_in_the_cache_is_removed(case):
    path = case.pull(tasks=["task1"]).value
    repository = path.parents[1]
    etag = path.joinpath("base.json").readlink().name
    pieces = [repository / "blobs" / f"{etag}.{number}.incomplete" for number in ("1a2b3c4d", "5e6f7a8b")]
    for piece in pieces:
        piece.write_bytes(b"half")
    for name, age in (("tmp_old", 100), ("tmp_new", 0)):
        (repository / "blobs" / name).touch()
        os.utime(repository / "blobs" / name, (time.time() - age,) * 2)
    with FileLock(repository.parent / ".locks" / repository.name / f"{etag}.lock"):
        case.pull(tasks=["task1"])
        assert all(piece.exists() for piece in pieces)  # they may be coming now
    case.pull(tasks=["task1"])
    assert not list(repository.rglob("*.incomplete"))
    assert [path.name for path in repository.rglob("tmp_*")] == ["tmp_new"]


def test_a_wrong_file_in_the_cache_is_found_by_a_pull(case):
    path = case.pull().value
    shard = next(path.glob("tasks/*/mask-*"))
    changed = bytearray(shard.read_bytes())
    changed[-1] ^= 1
    shard.resolve().write_bytes(changed)
    case.hub.log.clear()
    case.pull()
    assert downloaded(case.hub) == [shard.relative_to(path).as_posix()]
    assert contents(path) == contents(case.bundle)


def test_force_download(case):
    for where in ("cache", "directory"):
        case.pull(where, tasks=["task1"])
        case.hub.log.clear()
        case.pull(where, tasks=["task1"], force_download=True)
        assert {path for path in contents(case.bundle) if path.startswith(("tasks/task1", "base"))} <= {
            *downloaded(case.hub)
        }


def test_a_bundle_that_changed_is_brought_up_to_date(case, models, tmp_path):
    """One task goes, one comes, one is trained again; those that were not there stay away."""
    case.pull("directory", tasks=["task1", "task2"])
    save_model(tmp_path / "again", expert_tensors(9))
    experts = {"task2": tmp_path / "again", "task3": models / "task3", "task4": models / "task1"}
    tallstore.pack(models / "base", experts, tmp_path / "new", embed_base=True, method=tallstore.Sign())
    new = contents(tmp_path / "new")
    case.hub.repositories[case.repo_id].push(new, delete=set(contents(case.bundle)) - set(new))
    (case.out / "notes").mkdir()
    (case.out / "notes" / "mine.ipynb").write_text("mine")
    (case.out / "latest").symlink_to("notes")
    inode = (case.out / "notes" / "mine.ipynb").stat().st_ino
    found = case.pull("directory", tasks=["task4"])
    assert found.error is None, found.problem
    assert tallstore.verify(case.out) == []
    assert (case.out / "latest" / "mine.ipynb").stat().st_ino == inode  # one's own files stay, and are not copied
    assert (case.out / "latest").is_symlink()
    assert {path.name for path in (case.out / "tasks").iterdir()} == {"task2", "task4"}
    assert digests(case.out, ["task2", "task4"]) == digests(tmp_path / "new", ["task2", "task4"])


def test_tasks_that_were_added_here_are_not_lost(case):
    """A pull would put the Hub's manifest in the place of the one that lists them."""
    case.pull("directory", tasks=["task1"])
    tallstore.add(case.out, {"mine": expert_tensors(7)})
    grown = contents(case.out)
    for where in ("as it was", "when the Hub has grown too"):
        found = case.pull("directory", tasks=["task2"])
        assert found.error == "OutputExistsError", where
        assert "has a task 'mine' that" in found.problem
        assert "push the directory first" in found.problem
        assert contents(case.out) == grown
        theirs = shutil.copytree(case.bundle, case.out.with_name("theirs"), dirs_exist_ok=True)
        tallstore.add(theirs, {"mine": expert_tensors(8)})  # under the same paths
        case.hub.repositories[case.repo_id].push(contents(theirs))
    case.hub.repositories[case.repo_id].push({**contents(case.bundle), **grown})
    found = case.pull("directory", tasks=["task2"])
    assert found.error is None, found.problem
    assert tallstore.verify(case.out) == []
    assert digests(case.out, ["mine", "task1", "task2"])


def test_tasks_that_were_removed_here_can_be_pulled_again(case):
    case.pull("directory", tasks=["task1", "task2"])
    tallstore.remove(case.out, ["task2"])
    case.pull("directory", tasks=["task2"])
    assert tallstore.verify(case.out) == []
    assert digests(case.out, ["task1", "task2"]) == digests(case.bundle, ["task1", "task2"])


def test_a_bundle_that_was_pushed_from_here_and_grew_is_not_written_over(case):
    shutil.copytree(case.bundle, case.out)
    tallstore.add(case.out, {"mine": expert_tensors(7)})
    grown = contents(case.out)
    assert case.pull("directory").error == "OutputExistsError"
    assert contents(case.out) == grown


def test_what_a_change_that_was_broken_off_has_left_goes(case):
    case.pull("directory", tasks=["task1"])
    left = [case.out / "groups" / "g0002" / "group.json", case.out / "tasks" / "x-g0002" / "task.json"]
    for path in left:
        path.parent.mkdir()
        path.write_text("{}")
    case.pull("directory", tasks=["task1"])
    assert not any(path.parent.exists() for path in left)
    assert tallstore.verify(case.out) == []


def test_what_a_killed_pull_left_beside_a_new_tasks_files_is_not_moved_in(case):
    case.pull("directory", tasks=["task1"])
    left = files._staging(case.out) / "tasks" / "task2" / "task.json.partial"
    left.parent.mkdir(parents=True)
    left.write_text("{")
    (case.out / "tasks" / "task3").mkdir()  # and what is empty is in nobody's way
    case.pull("directory", tasks=["task2", "task3"])
    assert without_origin(case.out) == contents(case.bundle)
    assert tallstore.verify(case.out) == []


def test_a_file_that_a_task_no_longer_has_goes(case):
    more = "tasks/task1/mask-00002-of-00002.safetensors"
    theirs = shutil.copytree(case.bundle, case.out.with_name("theirs"))
    (theirs / more).write_bytes(b"x")
    manifest = parse_manifest((theirs / layout.MANIFEST).read_bytes(), layout.MANIFEST)
    entry = FileEntry(path=more, size=1, sha256=hashlib.sha256(b"x").hexdigest(), git_oid=None)
    listed = tuple(sorted((*manifest.files, entry), key=lambda file: file.path))
    changed = msgspec.structs.replace(manifest, files=listed)
    (theirs / layout.MANIFEST).write_bytes(serialise_manifest(changed))
    repository = case.hub.repositories[case.repo_id]
    repository.push(contents(theirs))
    assert case.pull("directory").error is None
    assert (case.out / more).exists()
    repository.push(contents(case.bundle), delete={more})
    assert case.pull("directory").error is None
    assert tallstore.verify(case.out) == []
    assert not (case.out / more).exists()


def test_another_bundle_is_not_written_over(case, tmp_path):
    save_models(tmp_path / "models", count=2)
    other = {name: tensor + 1 for name, tensor in expert_tensors(5).items()}
    save_model(tmp_path / "models" / "other", other)
    tallstore.pack(
        tmp_path / "models" / "other", {"x": tmp_path / "models" / "task1"}, case.out, method=tallstore.Sign()
    )
    before = contents(case.out)
    found = case.pull("directory")
    assert found.error == "OutputExistsError"
    assert "is another bundle than" in found.problem
    assert contents(case.out) == before


@pytest.mark.parametrize("what", ["a file", "a folder of others"])
def test_what_no_pull_wrote_is_left_alone(case, tmp_path, what):
    if what == "a file":
        case.out.write_text("mine")
    else:
        case.out.mkdir()
        (case.out / "mine").write_text("mine")
    found = case.pull("directory")
    assert found.error == "OutputExistsError"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"tasks": "task1"}, "OptionError", "give a list of names"),
        ({"tasks": ["task9"]}, "UnknownTaskError", "no task named 'task9'"),
        ({"max_workers": 0}, "OptionError", "max_workers is 0"),
    ],
)
@pytest.mark.parametrize("where", ["cache", "directory"])
def test_refusals(case, where, options, error, problem):
    found = case.pull(where, **options)
    assert (found.error, problem in found.problem) == (error, True), found.problem


def test_what_is_no_id_is_told():
    with pytest.raises(tallstore.BundleNotFoundError, match="'no-id': is no id of a repository on the Hub"):
        tallstore.pull("no-id")


def test_progress_is_told(case):
    told = call(case.process, pulls.pull_with_progress, case.repo_id, cache_dir=case.cache).value
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# --- faults ---

FAULTS = {
    "503": Status(503),
    "500": Status(500),
    "429": Status(429, retry_after=0),
    "dropped": Drop(),
    "cut off": Truncate(100),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "request_of",
    ["HEAD */tallstore.json", "GET */tallstore.json", "POST /paths-info/*", "HEAD *mask-*", "GET *mask-*"],
)
def test_a_fault_that_passes_is_got_over(case, fault, request_of):
    method, path = request_of.split()
    if (method, fault) == ("HEAD", "cut off"):
        pytest.skip("there is no body")
    case.hub.inject(FAULTS[fault], method, f"*{case.repo_id}{path}", times=2)
    found = case.pull(tasks=["task1"])
    assert found.error is None, found.problem
    hit = case.hub.log.select(method, f"*{case.repo_id}{path}")
    assert sum(each.status != 200 or each.sent_nbytes == 100 for each in hit) == 2
    assert tallstore.verify(found.value) == []


def test_slow_answers_are_waited_for(case):
    case.hub.inject(Delay(0.1), times=None)
    assert tallstore.verify(case.pull(tasks=["task1"]).value) == []


@pytest.mark.parametrize("where", ["cache", "directory"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_leaves_no_bundle(case, tmp_path, fault, where):
    case.hub.inject(FAULTS[fault], "GET", f"/{case.repo_id}/resolve/*/tasks/task1/mask-*", times=None)
    found = case.pull(where, tasks=["task1"])
    assert found.error == "HubError"
    assert "tasks/task1/mask-00001-of-00001.safetensors" in found.problem
    assert "\n" not in found.problem
    assert not case.out.exists()
    assert not list(tmp_path.rglob("*.incomplete"))
    case.hub.faults.clear()
    case.hub.log.clear()
    path = case.pull(where, tasks=["task1"]).value
    assert tallstore.verify(path) == []
    assert "base.json" not in downloaded(case.hub)  # what came whole was kept
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["cache", "directory"])
@pytest.mark.parametrize(
    "path",
    [
        "tasks/task1/mask-00001-of-00001.safetensors",
        "tasks/task1/task.json",
        "base/model.safetensors",
        "tallstore.json",
    ],
)
def test_what_was_tampered_with_is_refused_and_removed(case, tmp_path, path, where):
    case.hub.inject(Tamper(5), "GET", f"/{case.repo_id}/resolve/*/{path}")
    found = case.pull(where, tasks=["task1"])
    assert found.error == "IntegrityError"
    assert path in found.problem
    assert not list(tmp_path.rglob(Path(path).name))
    assert tallstore.verify(case.pull(where, tasks=["task1"]).value) == []


def test_a_repository_of_two_minds_is_refused_before_anything_is_sent(case):
    repository = case.hub.repositories[case.repo_id]
    repository.push({"tasks/task1/mask-00001-of-00001.safetensors": b"other"})
    found = case.pull(tasks=["task1"])
    assert found.error == "IntegrityError"
    assert "tasks/task1/mask-00001-of-00001.safetensors: has 5 bytes on the Hub" in found.problem
    assert not case.hub.log.select("GET", "*mask-*")
    repository.push({}, delete=["tasks/task1/mask-00001-of-00001.safetensors"])
    found = case.pull(tasks=["task1"])
    assert (found.error, "is not in the repository" in found.problem) == ("FormatError", True)


def test_an_unreachable_hub_gives_what_the_cache_has(case):
    case.pull(tasks=["task1"])
    for fault in (Status(503), Drop()):
        case.hub.inject(fault, "HEAD", f"/{case.repo_id}/resolve/main/*")
        found = case.digests("task1")
        assert found.value == digests(case.bundle, ["task1"])
        assert "the Hub cannot be reached; takes the commit" in found.warnings[0]


# --- at the same time ---


def test_pulls_into_one_cache(case):
    running = [case.start(tasks=[task]) for task in ("task1", "task2", "task3", "task1")]
    paths = {each.result().value for each in running}
    (path,) = paths
    assert contents(path) == contents(case.bundle)


def test_a_pull_into_a_directory_that_another_fills_is_told(case, tmp_path):
    hold = Hold()
    case.hub.inject(hold, "GET", f"/{case.repo_id}/resolve/*/base.json")
    first = case.start("directory", cache_dir=tmp_path / "one")
    assert hold.reached.wait(30)
    second = case.pull("directory", cache_dir=tmp_path / "two")
    hold.released.set()
    assert first.result().error is None
    assert second.error == "OutputBusyError"


# --- stopped ---


@pytest.mark.skipif(os.name != "posix", reason="has no SIGINT to send")
@pytest.mark.parametrize("where", ["cache", "directory"])
def test_ctrl_c_leaves_nothing_half_made(case, tmp_path, where):
    hold = Hold()
    case.hub.inject(hold, "GET", f"/{case.repo_id}/resolve/*/base/model.safetensors")
    out = ("--out", str(case.out)) if where == "directory" else ()
    environment = client_environment(case.hub.url, tmp_path / "home", token=case.hub.token)
    command = [sys.executable, "-m", "tallstore", "pull", case.repo_id, *out]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert hold.reached.wait(60)
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
        hold.released.set()
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.strip() == "interrupted"
    assert not case.out.exists()
    assert not list(tmp_path.rglob("*.incomplete"))
    assert not list(tmp_path.rglob("base/model.safetensors"))
