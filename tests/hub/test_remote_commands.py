"""Commands on bundles of the Hub: what each downloads, what it prints, and how verify needs no download."""

from __future__ import annotations

import json

import pytest

import tallstore
from tallstore.format import layout
from tests.hub import pulls
from tests.hub.pulls import call, command, contents
from tests.model_directories import pack_models


@pytest.fixture(scope="module")
def bundle(models):
    return pack_models(models, models / "bundle", embed_base=True, method=tallstore.TallMask())


@pytest.fixture
def repo_id(request, running, bundle):
    """A repository with the bundle that no other test has."""
    repo_id = f"user/{pulls.name_of(request)}"
    running.add(repo_id).push({**contents(bundle), "README.md": b"# Card", ".gitattributes": b""})
    running.log.clear()
    return repo_id


@pytest.fixture
def run(process, tmp_path):
    """Runs a command, and tells what it printed."""

    def run(*arguments, code=0):
        found = call(process, command, *arguments, code=code)
        assert found.error is None, found.problem
        return found.value

    return run


def downloaded(hub):
    paths = [each.path.rpartition("/resolve/")[2].partition("/")[2] for each in hub.log.select("GET", "*/resolve/*")]
    return sorted(paths)


def test_inspect_downloads_the_manifest_alone(running, run, repo_id):
    printed, _ = run("inspect", repo_id)
    assert downloaded(running) == [layout.MANIFEST]
    sha = running.repositories[repo_id].refs["refs/heads/main"]
    assert f"{repo_id}@{sha[:12]} (format" in printed
    assert "not fetched: task1, task2, task3" in printed
    found = json.loads(run("inspect", f"{repo_id}@main", "--json")[0])
    assert found["where"] == f"{repo_id}@{sha[:12]}"
    assert found["base"] == {
        "repo_id": None,
        "revision": None,
        "embedded": True,
        "tensors": None,
        "parameters": None,
        "checkpoint_nbytes": None,
    }
    assert downloaded(running) == [layout.MANIFEST]


def test_inspect_of_a_task_downloads_its_tables(running, run, repo_id):
    printed, _ = run("inspect", repo_id, "--task", "task2")
    assert "block.weight" in printed
    assert downloaded(running) == ["base.json", "groups/g0001/group.json", layout.MANIFEST, "tasks/task2/task.json"]


def test_report_downloads_all_but_the_base_and_companions(running, run, repo_id, bundle, tmp_path):
    out = tmp_path / "report.html"
    printed, _ = run("report", repo_id, "--out", out)
    assert printed.startswith(f"reported {repo_id} in {out}: ")
    others = ("README.md", ".gitattributes")
    assert downloaded(running) == sorted(
        path for path in contents(bundle) if not path.startswith(("base/", "files/")) and path not in others
    )
    sha = running.repositories[repo_id].refs["refs/heads/main"]
    remote = out.read_text(encoding="utf-8").replace(f"{repo_id}@{sha[:12]}", "bundle")
    tallstore.write_report(bundle, tmp_path / "local.html")
    assert remote == (tmp_path / "local.html").read_text(encoding="utf-8")


def test_pull_says_what_is_where(running, run, repo_id, bundle, tmp_path):
    printed, _ = run("pull", repo_id, "--task", "task1", "--out", tmp_path / "out")
    assert printed.startswith(f"{tmp_path / 'out'}: ")
    assert "not fetched: task2, task3" in printed
    found = json.loads(run("pull", repo_id, "--out", tmp_path / "out", "--revision", "main", "--json")[0])
    assert found == {"path": str(tmp_path / "out"), "files": len(contents(bundle)), **found}
    assert found["not_fetched"] == []
    assert run("verify", tmp_path / "out")[0].startswith("no problems")


def test_a_directory_remembers_where_it_came_from(run, repo_id, tmp_path):
    run("pull", repo_id, "--task", "task1", "--out", tmp_path / "out")
    _, error = run("export", tmp_path / "out", "task2", "--out", tmp_path / "exported", code=1)
    assert f"tallstore pull {repo_id} --task task2 --out {tmp_path / 'out'}" in error


def test_export_fetches_companion_files_and_the_base(running, run, repo_id, models, tmp_path):
    run("export", repo_id, "task1", "--out", tmp_path / "one")
    assert not [path for path in downloaded(running) if path.startswith(("tasks/task2", "tasks/task3"))]
    assert (tmp_path / "one" / "config.json").read_bytes() == (models / "task1" / "config.json").read_bytes()
    run("export", repo_id, "--all", "--out", tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["task1", "task2", "task3"]


def test_merged_models_and_statistics(run, repo_id, bundle, tmp_path):
    run("consensus", repo_id, "--out", tmp_path / "remote")
    run("consensus", bundle, "--out", tmp_path / "local")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    printed, _ = run("statistics", repo_id, "--task", "task1", "--task", "task2")
    assert repo_id in printed


def test_tasks_are_completed_from_the_cache_without_asking(running, run, process, repo_id):
    run("inspect", repo_id)
    running.log.clear()
    assert call(process, pulls.completed, repo_id, "task").value == ["task1", "task2", "task3"]
    assert call(process, pulls.completed, "user/nothing", "task").value == []
    assert not running.log


# --- verify ---


def keep_in_git(repository, files):
    """Commit files as small ones, whatever they are."""
    entries = {path: repository.store_blob(content) for path, content in files.items()}
    repository.advance("refs/heads/main", lambda found: found.update(entries), title="In git", author="user")


def test_verify_downloads_the_manifest_alone(running, run, repo_id):
    printed, _ = run("verify", repo_id)
    assert printed.startswith("no problems: the Hub's hashes and sizes of")
    assert downloaded(running) == [layout.MANIFEST]


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("tasks/task1/mask-00001-of-00001.safetensors", "FILE-2"),
        ("tasks/task1/task.json", "FILE-5"),
        ("base.json", "FILE-1"),
        ("files/more.txt", "FILE-3"),
    ],
)
def test_verify_finds_another_file(running, run, repo_id, path, rule):
    repository = running.repositories[repo_id]
    content = repository.read().get(path, b"")
    is_longer = rule in {"FILE-1", "FILE-3"}
    repository.push({path: content + b" " if is_longer else content[:-1] + bytes([content[-1] ^ 1])})
    printed, error = run("verify", repo_id, code=1)
    assert f"[{rule}]" in printed
    assert path in printed
    assert "1 problem" in error
    assert downloaded(running) == [layout.MANIFEST]


def test_verify_finds_what_is_missing(running, run, repo_id):
    running.repositories[repo_id].push({}, delete=["tasks/task1/task.json", "groups/g0001/group.json"])
    printed, _ = run("verify", repo_id, code=1)
    assert "tasks/task1/task.json: is not in the repository [FILE-4]" in printed
    assert "groups/g0001/group.json: is not in the repository [FILE-4]" in printed


def test_a_task_that_was_not_pushed_is_no_problem(running, run, bundle, repo_id):
    own = [path for path in contents(bundle) if path.startswith("tasks/task2/")]
    running.repositories[repo_id].push({}, delete=own)
    assert run("verify", repo_id)[0].startswith("no problems")


def test_what_the_hub_has_no_hash_of_is_downloaded(running, run, bundle, repo_id):
    """Shards that a repository keeps in git: it has blob ids of them, and the manifest has none."""
    shards = {path: content for path, content in contents(bundle).items() if path.endswith(".safetensors")}
    repository = running.repositories[repo_id]
    keep_in_git(repository, shards)
    run("verify", repo_id)
    assert {path for path in downloaded(running) if path.endswith(".safetensors")} == set(shards)
    one = "tasks/task1/mask-00001-of-00001.safetensors"
    keep_in_git(repository, {one: shards[one][:-1] + b"x"})
    assert f"{one}: came with another sha256" in run("verify", repo_id, code=1)[0]


def test_a_manifest_that_breaks_a_rule_is_told(running, run, bundle, repo_id):
    raw = (bundle / layout.MANIFEST).read_bytes()
    running.repositories[repo_id].push({layout.MANIFEST: raw.replace(b'"task1"', b'"task9"')})
    assert "[MAN-1]" in run("verify", repo_id, code=1)[0]


# --- what a terminal shows of errors ---


@pytest.mark.parametrize("name", ["inspect", "verify", "statistics", "pull"])
def test_an_id_that_leads_nowhere_is_one_line(run, name):
    _, error = run(name, "user/nothing", code=1)
    (line,) = error.splitlines()
    assert line.startswith("error: user/nothing: no such path here, and no such repository on the Hub")
