"""Bundles pushed by the real client to a Hub on this machine: what is committed, what is sent, what is refused."""

from __future__ import annotations

import shutil

import pytest

import tallstore
from tallstore.format import layout
from tests.hub.client_process import client_process
from tests.hub.loopback import Account, LoopbackHub
from tests.hub.loopback.faults import Call
from tests.hub.pushes import push
from tests.model_directories import base_tensors, save_model, save_models

OWNER, READ_ONLY, STRANGER = "hf_owner", "hf_readonly", "hf_stranger"
ACCOUNTS = [Account(OWNER, "user"), Account(READ_ONLY, "user", role="read"), Account(STRANGER, "stranger")]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Signs share nothing, so bundles of some of these tasks have files in common."""
    root = save_models(tmp_path_factory.mktemp("models"))
    save_model(root / "other", {name: tensor + 1 for name, tensor in base_tensors().items()})
    for name, base, tasks in (("two", "base", "12"), ("three", "base", "123"), ("elsewhere", "other", "12")):
        experts = {f"task{task}": root / f"task{task}" for task in tasks}
        tallstore.pack(root / base, experts, root / name, method=tallstore.Sign())
    return root


@pytest.fixture
def two(bundles, tmp_path):
    """A bundle of two tasks, to be changed."""
    return shutil.copytree(bundles / "two", tmp_path / "two")


@pytest.fixture(scope="module")
def running():
    with LoopbackHub(accounts=ACCOUNTS) as hub:
        yield hub


@pytest.fixture
def hub(running):
    """With an empty log, and nothing that goes wrong."""
    running.log.clear()
    yield running
    running.faults.clear()


@pytest.fixture(scope="module")
def client(running, tmp_path_factory):
    with client_process(running.url, tmp_path_factory.mktemp("home"), token=OWNER) as process:
        yield process


@pytest.fixture
def repo_id(request, hub):
    """A repository's name that no other test has; it is there once it is pushed to."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:60]
    return f"user/{name}".replace("--", "-").strip("-")


def contents(path):
    """The files of a bundle here by path."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def pushed(hub, repo_id, revision="main"):
    """The bundle's files in a repository."""
    return {
        path: content
        for path, content in hub.repositories[repo_id].read(revision).items()
        if path == layout.MANIFEST or layout.is_bundle_path(path)
    }


def titles(hub, repo_id, revision="main"):
    return [commit.title for commit in hub.repositories[repo_id].history(revision)]


def sent(hub):
    """How many large files were sent."""
    return len(hub.log.select("PUT", "/lfs/*"))


# --- what is committed, and what is sent


def test_a_push_is_one_commit_with_all_of_the_bundle(hub, client, bundles, repo_id):
    outcome = push(client, bundles / "two", repo_id)
    repository = hub.repositories[repo_id]
    assert pushed(hub, repo_id) == contents(bundles / "two")
    assert titles(hub, repo_id) == ["Bundle of 2 tasks", "initial commit"]
    assert repository.refs["refs/heads/main"] == outcome.oid
    assert outcome.message == "Bundle of 2 tasks"
    assert b"library_name: tallstore" in repository.read()["README.md"]


def test_what_did_not_change_is_neither_sent_nor_committed(hub, client, bundles, repo_id):
    first = push(client, bundles / "two", repo_id)
    hub.log.clear()
    assert push(client, bundles / "two", repo_id).oid == first.oid
    assert not hub.log.select("POST")
    assert not hub.log.select("PUT")


def test_one_more_task_sends_its_files_alone(hub, client, bundles, repo_id):
    push(client, bundles / "two", repo_id)
    before = pushed(hub, repo_id)
    hub.log.clear()
    push(client, bundles / "three", repo_id)
    added = {path for path in contents(bundles / "three") if before.get(path) is None}
    assert {path for path in added if path.startswith("tasks/")} == {
        path for path in contents(bundles / "three") if path.startswith("tasks/task3/")
    }
    assert sent(hub) == sum(path.endswith(".safetensors") for path in added) > 0
    assert pushed(hub, repo_id) == contents(bundles / "three")
    assert titles(hub, repo_id)[0] == "Bundle of 3 tasks: 1 added"
    assert len(titles(hub, repo_id)) == 3


def test_a_removed_tasks_files_go_in_the_same_commit(hub, client, bundles, repo_id):
    push(client, bundles / "three", repo_id)
    hub.repositories[repo_id].push({"images/plot.png": b"\x89PNG", "notes.txt": b"mine", "files/" + "0" * 64: b"stray"})
    push(client, bundles / "two", repo_id)
    assert pushed(hub, repo_id) == contents(bundles / "two")
    there = hub.repositories[repo_id].read()
    assert there["images/plot.png"] == b"\x89PNG"
    assert there["notes.txt"] == b"mine"
    assert titles(hub, repo_id)[0] == "Bundle of 2 tasks: 1 removed"


def test_the_message_and_its_description_are_the_users(hub, client, bundles, repo_id):
    outcome = push(client, bundles / "two", repo_id, commit_message="Mine", commit_description="All of it.")
    commit = hub.repositories[repo_id].resolve("main")
    assert (commit.title, commit.description) == ("Mine", "All of it.")
    assert outcome.message == "Mine"


def test_progress_counts_the_bytes_that_are_verified(client, bundles, repo_id):
    told = push(client, bundles / "two", repo_id).progress
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    assert done[-1] == totals[0] > 0


# --- where to


def test_a_repository_is_private_where_that_is_asked_for(hub, client, bundles, repo_id):
    push(client, bundles / "two", repo_id, private=True)
    assert hub.repositories[repo_id].private
    assert push(client, bundles / "three", repo_id, private=True).oid
    assert pushed(hub, repo_id) == contents(bundles / "three")


def test_what_shall_be_private_is_not_pushed_where_everybody_sees_it(hub, client, bundles, repo_id):
    hub.add(repo_id)
    outcome = push(client, bundles / "two", repo_id, private=True)
    assert outcome.error == "HubError"
    assert outcome.problem == (
        f"{repo_id}: is public, where private=True was given; make it private in its settings first"
    )
    assert titles(hub, repo_id) == ["initial commit"]


def test_a_branch_is_made_and_main_stays(hub, client, bundles, repo_id):
    main = push(client, bundles / "two", repo_id).oid
    hub.log.clear()
    branch = push(client, bundles / "three", repo_id, revision="next").oid
    again = push(client, bundles / "two", repo_id, revision="next").oid
    refs = hub.repositories[repo_id].refs
    assert (refs["refs/heads/main"], refs["refs/heads/next"]) == (main, again)
    assert hub.repositories[repo_id].commits[again].parent == branch
    assert hub.repositories[repo_id].commits[branch].parent == main
    assert pushed(hub, repo_id) == contents(bundles / "two")


def test_a_new_repository_may_begin_with_a_branch(hub, client, bundles, repo_id):
    push(client, bundles / "two", repo_id, revision="next")
    assert pushed(hub, repo_id) == {}
    assert pushed(hub, repo_id, "next") == contents(bundles / "two")


def test_a_pull_request_leaves_the_branch_alone(hub, client, bundles, repo_id):
    main = push(client, bundles / "two", repo_id).oid
    outcome = push(client, bundles / "three", repo_id, create_pr=True)
    refs = hub.repositories[repo_id].refs
    assert outcome.pr_url == f"{hub.url}/{repo_id}/discussions/1"
    assert (refs["refs/heads/main"], refs["refs/pr/1"]) == (main, outcome.oid)
    assert pushed(hub, repo_id, "refs/pr/1") == contents(bundles / "three")
    more = push(client, bundles / "two", repo_id, revision="refs/pr/1").oid
    assert hub.repositories[repo_id].refs["refs/pr/1"] == more
    assert hub.repositories[repo_id].commits[more].parent == outcome.oid


def test_a_stranger_may_propose(hub, client, bundles, repo_id):
    push(client, bundles / "two", repo_id)
    outcome = push(client, bundles / "three", repo_id, create_pr=True, token=STRANGER)
    assert hub.repositories[repo_id].commits[outcome.oid].author == "stranger"


def test_only_branches_are_pushed_to(hub, client, bundles, repo_id):
    refs = hub.add(repo_id).refs
    refs["refs/tags/v1"] = commit = refs["refs/heads/main"]
    for revision, what in (("v1", f"a tag of {repo_id}"), (commit, "a commit")):
        outcome = push(client, bundles / "two", repo_id, revision=revision)
        assert outcome.error == "OptionError"
        assert outcome.problem == f"revision is {revision!r}, {what}; give a branch"


def test_no_pull_request_against_a_branch_that_is_not_there(hub, client, bundles, repo_id):
    hub.add(repo_id)
    outcome = push(client, bundles / "two", repo_id, revision="nowhere", create_pr=True)
    assert outcome.problem.startswith(f"{repo_id}@nowhere: is no branch that a pull request can be opened against")
    assert "refs/heads/nowhere" not in hub.repositories[repo_id].refs


@pytest.mark.parametrize("name", ["experts", "a/b/c", "user/", "https://huggingface.co/user/x", ""])
def test_an_id_has_an_owner_and_a_name(client, bundles, name):
    outcome = push(client, bundles / "two", name)
    assert (outcome.error, outcome.problem) == ("OptionError", f"repo_id is {name!r}; give 'org/name'")


# --- what is refused


def test_a_broken_bundle_is_not_pushed(hub, client, two, repo_id):
    shard = next(two.glob("tasks/*/mask-*"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    outcome = push(client, two, repo_id)
    assert outcome.error == "FormatError"
    assert str(shard) in outcome.problem
    assert "problems in all, which verify lists; not pushed" in outcome.problem
    assert repo_id not in hub.repositories
    assert not hub.log.select("POST")


def test_no_bundle_is_not_pushed(hub, client, tmp_path, repo_id):
    assert push(client, tmp_path, repo_id).error == "BundleNotFoundError"
    assert not hub.log


def test_a_bundle_of_another_base_is_not_pushed_over(hub, client, bundles, repo_id):
    first = push(client, bundles / "three", repo_id).oid
    outcome = push(client, bundles / "elsewhere", repo_id)
    assert outcome.error == "OutputExistsError"
    assert outcome.problem == (
        f"{repo_id}: has a bundle of another base (of no name); choose another repository, or give overwrite=True"
    )
    assert hub.repositories[repo_id].refs["refs/heads/main"] == first
    push(client, bundles / "elsewhere", repo_id, overwrite=True)
    assert pushed(hub, repo_id) == contents(bundles / "elsewhere")


def test_what_is_no_bundle_is_not_pushed_over(hub, client, bundles, repo_id):
    hub.add(repo_id).push({"model.safetensors": b"weights", "README.md": b"# Mine", "LICENSE": b"MIT"})
    outcome = push(client, bundles / "two", repo_id)
    assert outcome.error == "OutputExistsError"
    assert outcome.problem == (
        f"{repo_id}: has 'model.safetensors', and no bundle; choose another repository, or give overwrite=True"
    )
    push(client, bundles / "two", repo_id, overwrite=True)
    assert pushed(hub, repo_id) == contents(bundles / "two")
    assert hub.repositories[repo_id].read()["model.safetensors"] == b"weights"


def test_a_repository_with_a_card_and_a_licence_is_empty(hub, client, bundles, repo_id):
    hub.add(repo_id).push({"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT", ".gitignore": b"x"})
    push(client, bundles / "two", repo_id)
    assert pushed(hub, repo_id) == contents(bundles / "two")
    assert b"license: mit\n" in hub.repositories[repo_id].read()["README.md"]


def test_a_bundle_that_cannot_be_read_is_not_pushed_over(hub, client, bundles, repo_id):
    hub.add(repo_id).push({"tallstore.json": b'{"format": "tallstore", "format_version": "7.0"}'})
    outcome = push(client, bundles / "two", repo_id)
    assert outcome.error == "OutputExistsError"
    assert f"{repo_id}: has a bundle that cannot be read (tallstore.json: " in outcome.problem
    assert push(client, bundles / "two", repo_id, overwrite=True).oid


def test_what_was_not_fetched_must_be_there_already(hub, client, bundles, two, repo_id):
    shutil.rmtree(two / "tasks/task2")
    outcome = push(client, two, repo_id)
    assert outcome.error == "NotFetchedError"
    assert outcome.problem.startswith(f"{two}: task 'task2' was not fetched, and {repo_id} does not have it")
    assert repo_id not in hub.repositories
    push(client, bundles / "two", repo_id)
    (two / "README.md").write_text("# In part\n")
    push(client, two, repo_id)
    assert pushed(hub, repo_id) == contents(bundles / "two")
    assert b"# In part" in hub.repositories[repo_id].read()["README.md"]


def test_a_file_that_changes_meanwhile_is_not_committed(hub, client, two, repo_id):
    shard = next(two.glob("tasks/*/private-*"))
    changed = bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:]
    hub.inject(Call(lambda: shard.write_bytes(changed)), "POST", "/api/repos/create")
    outcome = push(client, two, repo_id)
    assert outcome.error == "IntegrityError"
    assert f"{shard.relative_to(two).as_posix()}: changed while it was pushed" in outcome.problem
    assert titles(hub, repo_id) == ["initial commit"]


# --- who may


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("token", [False, "hf_wrong", READ_ONLY, STRANGER])
def test_who_may_not_write_is_told_so_in_one_line(request, token, is_there):
    hub, client, bundles, repo_id = map(request.getfixturevalue, ("hub", "client", "bundles", "repo_id"))
    if is_there:
        hub.add(repo_id)
    outcome = push(client, bundles / "two", repo_id, token=token)
    assert outcome.error == "HubAccessError"
    assert outcome.problem.startswith(f"{repo_id}: ")
    assert "give a token that may write there (`hf auth login`, or token=…)" in outcome.problem
    assert "\n" not in outcome.problem
    assert outcome.said
    assert "hf_" not in outcome.said
    assert not sent(hub)


def test_a_private_repository_of_somebody_else_is_not_told_of(hub, client, bundles, repo_id):
    hub.add(repo_id, private=True)
    assert push(client, bundles / "two", repo_id, token=STRANGER).error == "HubAccessError"


@pytest.mark.parametrize("token", [OWNER, "hf_impossible\n", "hf_unprintable\x01", "hf_größer", ""])
def test_a_token_is_never_shown(hub, client, bundles, repo_id, token):
    outcome = push(client, bundles / "two", repo_id, token=token)
    assert outcome.error == (None if token == OWNER else "OptionError")
    assert outcome.said
    assert "hf_" not in outcome.said + outcome.problem
    for content in hub.repositories[repo_id].read().values() if outcome.oid else ():
        assert token.encode() not in content
