"""Bundles pushed by the real client to a Hub on this machine: what is committed, what is sent, what is refused."""

from __future__ import annotations

import shutil

import pytest

from tallstore.format import layout
from tallstore.format.origin import ORIGIN, Origin, read_origin, serialise_origin
from tallstore.format.parsing import parse_manifest
from tests.hub.loopback import Account, LoopbackHub
from tests.hub.loopback.faults import Call
from tests.hub.pushes import REPO, Pusher, contents, name_base, pushed, titles

OWNER, READ_ONLY, STRANGER = "hf_owner", "hf_readonly", "hf_stranger"
ACCOUNTS = [Account(OWNER, "user"), Account(READ_ONLY, "user", role="read"), Account(STRANGER, "stranger")]


@pytest.fixture
def two(bundles, tmp_path):
    """A bundle of two tasks, to be changed."""
    return shutil.copytree(bundles / "two", tmp_path / "two")


@pytest.fixture
def hub():
    with LoopbackHub(accounts=ACCOUNTS) as running:
        yield running


@pytest.fixture
def push(hub, plain_process):
    return Pusher(plain_process, hub.url, OWNER, plots=False)


def table(hub):
    """The lines of the card's table."""
    return [line for line in hub.repositories[REPO].read()["README.md"].splitlines() if line.startswith(b"| ")]


def sent(hub):
    """How many large files were sent."""
    return len(hub.log.select("PUT", "/lfs/*"))


# --- what is committed, and what is sent


def test_a_push_is_one_commit_with_all_of_the_bundle(hub, push, bundles):
    outcome = push(bundles / "two", REPO)
    repository = hub.repositories[REPO]
    assert pushed(hub) == contents(bundles / "two")
    assert titles(hub) == ["Bundle of 2 tasks", "initial commit"]
    assert repository.refs["refs/heads/main"] == outcome.oid
    assert outcome.message == "Bundle of 2 tasks"
    assert b"library_name: tallstore" in repository.read()["README.md"]


def test_what_did_not_change_is_neither_sent_nor_committed(hub, push, bundles):
    first = push(bundles / "two", REPO)
    hub.log.clear()
    assert push(bundles / "two", REPO).oid == first.oid
    assert not hub.log.select("POST")
    assert not hub.log.select("PUT")


def write_origin(bundle, sha):
    """As `tallstore.pull` does."""
    (bundle / ORIGIN).parent.mkdir(parents=True, exist_ok=True)
    manifest = parse_manifest((bundle / layout.MANIFEST).read_bytes(), "")
    (bundle / ORIGIN).write_bytes(serialise_origin(Origin(REPO, sha, manifest.manifest_sha256)))


def test_tasks_that_others_added_after_the_pull_are_not_removed(hub, push, bundles, two):
    write_origin(two, push(bundles / "two", REPO).oid)
    added = push(bundles / "three", REPO).oid
    outcome = push(two, REPO)
    assert outcome.error == "HubConflictError"
    assert "task 'task3' was added there after this bundle was pulled" in outcome.problem
    assert hub.repositories[REPO].refs["refs/heads/main"] == added
    taken = push(two, REPO, overwrite=True)
    assert pushed(hub) == contents(bundles / "two")
    assert read_origin(two).sha == taken.oid
    assert push(two, REPO).oid == taken.oid


def test_tasks_that_were_there_at_the_pull_are_removed(hub, push, bundles, two):
    write_origin(two, push(bundles / "three", REPO).oid)
    assert push(two, REPO).message == "Bundle of 2 tasks: 1 removed"
    assert pushed(hub) == contents(bundles / "two")


def test_one_more_task_sends_its_files_alone(hub, push, bundles):
    push(bundles / "two", REPO)
    before = pushed(hub)
    hub.log.clear()
    push(bundles / "three", REPO)
    added = {path for path in contents(bundles / "three") if before.get(path) is None}
    assert {path for path in added if path.startswith("tasks/")} == {
        path for path in contents(bundles / "three") if path.startswith("tasks/task3/")
    }
    assert sent(hub) == sum(path.endswith(".safetensors") for path in added) > 0
    assert pushed(hub) == contents(bundles / "three")
    assert titles(hub)[0] == "Bundle of 3 tasks: 1 added"
    assert len(titles(hub)) == 3


def test_a_removed_tasks_files_go_in_the_same_commit(hub, push, bundles):
    push(bundles / "three", REPO)
    hub.repositories[REPO].push({"images/plot.png": b"\x89PNG", "notes.txt": b"mine", "files/" + "0" * 64: b"stray"})
    push(bundles / "two", REPO)
    assert pushed(hub) == contents(bundles / "two")
    there = hub.repositories[REPO].read()
    assert there["images/plot.png"] == b"\x89PNG"
    assert there["notes.txt"] == b"mine"
    assert titles(hub)[0] == "Bundle of 2 tasks: 1 removed"


def test_the_message_and_its_description_are_the_users(hub, push, bundles):
    outcome = push(bundles / "two", REPO, commit_message="Mine", commit_description="All of it.")
    commit = hub.repositories[REPO].resolve("main")
    assert (commit.title, commit.description) == ("Mine", "All of it.")
    assert outcome.message == "Mine"


def test_progress_counts_the_bytes_that_are_verified(push, bundles):
    told = push(bundles / "two", REPO).progress
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    assert done[-1] == totals[0] > 0


# --- where to


def test_a_repository_is_private_where_that_is_asked_for(hub, push, bundles):
    push(bundles / "two", REPO, private=True)
    assert hub.repositories[REPO].private
    assert push(bundles / "three", REPO, private=True).oid
    assert pushed(hub) == contents(bundles / "three")


def test_what_shall_be_private_is_not_pushed_where_everybody_sees_it(hub, push, bundles):
    hub.add(REPO)
    outcome = push(bundles / "two", REPO, private=True)
    assert outcome.error == "HubError"
    assert outcome.problem == (
        f"{REPO}: is public, where private=True was given; make it private in its settings first"
    )
    assert titles(hub) == ["initial commit"]


def test_a_branch_is_made_and_main_stays(hub, push, bundles):
    main = push(bundles / "two", REPO).oid
    hub.log.clear()
    branch = push(bundles / "three", REPO, revision="next").oid
    again = push(bundles / "two", REPO, revision="next").oid
    refs = hub.repositories[REPO].refs
    assert (refs["refs/heads/main"], refs["refs/heads/next"]) == (main, again)
    assert hub.repositories[REPO].commits[again].parent == branch
    assert hub.repositories[REPO].commits[branch].parent == main
    assert pushed(hub) == contents(bundles / "two")


def test_a_branch_is_made_though_nothing_changed(hub, push, bundles):
    main = push(bundles / "two", REPO).oid
    assert push(bundles / "two", REPO, revision="same").oid == main
    assert hub.repositories[REPO].refs["refs/heads/same"] == main


def test_a_new_repository_may_begin_with_a_branch(hub, push, bundles):
    push(bundles / "two", REPO, revision="next")
    assert pushed(hub) == {}
    assert pushed(hub, "next") == contents(bundles / "two")


def test_a_pull_request_leaves_the_branch_alone(hub, push, bundles):
    main = push(bundles / "two", REPO).oid
    outcome = push(bundles / "three", REPO, create_pr=True)
    refs = hub.repositories[REPO].refs
    assert outcome.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert (refs["refs/heads/main"], refs["refs/pr/1"]) == (main, outcome.oid)
    assert pushed(hub, "refs/pr/1") == contents(bundles / "three")
    more = push(bundles / "two", REPO, revision="refs/pr/1").oid
    assert hub.repositories[REPO].refs["refs/pr/1"] == more
    assert hub.repositories[REPO].commits[more].parent == outcome.oid


def test_only_branches_are_pushed_to(hub, push, bundles):
    refs = hub.add(REPO).refs
    refs["refs/tags/v1"] = commit = refs["refs/heads/main"]
    for revision, what in (("v1", f"a tag of {REPO}"), (commit, "a commit")):
        outcome = push(bundles / "two", REPO, revision=revision)
        assert outcome.error == "OptionError"
        assert outcome.problem == f"revision is {revision!r}, {what}; give a branch"


def test_no_pull_request_against_a_branch_that_is_not_there(hub, push, bundles):
    hub.add(REPO)
    outcome = push(bundles / "two", REPO, revision="nowhere", create_pr=True)
    assert outcome.problem.startswith(f"{REPO}@nowhere: is no branch that a pull request can be opened against")
    assert "refs/heads/nowhere" not in hub.repositories[REPO].refs


@pytest.mark.parametrize("name", ["experts", "a/b/c", "user/", "https://huggingface.co/user/x", ""])
def test_an_id_has_an_owner_and_a_name(push, bundles, name):
    outcome = push(bundles / "two", name)
    assert (outcome.error, outcome.problem) == ("OptionError", f"repo_id is {name!r}; give 'org/name'")


# --- what is refused


def test_a_broken_bundle_is_not_pushed(hub, push, two):
    shard = next(two.glob("tasks/*/mask-*"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    outcome = push(two, REPO)
    assert outcome.error == "FormatError"
    assert str(shard) in outcome.problem
    assert "problems in all, which verify lists; not pushed" in outcome.problem
    assert REPO not in hub.repositories
    assert not hub.log.select("POST")


def test_no_bundle_is_not_pushed(hub, push, tmp_path):
    assert push(tmp_path, REPO).error == "BundleNotFoundError"
    assert not hub.log


def test_a_bundle_of_another_base_is_not_pushed_over(hub, push, bundles):
    first = push(bundles / "three", REPO).oid
    outcome = push(bundles / "elsewhere", REPO)
    assert outcome.error == "OutputExistsError"
    assert outcome.problem == (
        f"{REPO}: has a bundle of another base (of no name); choose another repository, or give overwrite=True"
    )
    assert hub.repositories[REPO].refs["refs/heads/main"] == first
    push(bundles / "elsewhere", REPO, overwrite=True)
    assert pushed(hub) == contents(bundles / "elsewhere")


def test_what_is_no_bundle_is_not_pushed_over(hub, push, bundles):
    hub.add(REPO).push({"model.safetensors": b"weights", "README.md": b"# Mine", "LICENSE": b"MIT"})
    outcome = push(bundles / "two", REPO)
    assert outcome.error == "OutputExistsError"
    assert outcome.problem == (
        f"{REPO}: has 'model.safetensors', and no bundle; choose another repository, or give overwrite=True"
    )
    push(bundles / "two", REPO, overwrite=True)
    assert pushed(hub) == contents(bundles / "two")
    assert hub.repositories[REPO].read()["model.safetensors"] == b"weights"


def test_a_repository_with_a_card_a_licence_and_a_picture_is_empty(hub, push, bundles):
    files = {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT", ".gitignore": b"x", "images/a.png": b"\x89"}
    hub.add(REPO).push(files)
    push(bundles / "two", REPO)
    assert pushed(hub) == contents(bundles / "two")
    assert b"license: mit\n" in hub.repositories[REPO].read()["README.md"]


def test_a_bundle_that_cannot_be_read_is_not_pushed_over(hub, push, bundles):
    hub.add(REPO).push({"tallstore.json": b'{"format": "tallstore", "format_version": "7.0"}'})
    outcome = push(bundles / "two", REPO)
    assert outcome.error == "OutputExistsError"
    assert f"{REPO}: has a bundle that cannot be read (tallstore.json: " in outcome.problem
    assert push(bundles / "two", REPO, overwrite=True).oid


def test_a_card_that_is_no_text_is_refused(hub, push, two):
    (two / "README.md").write_bytes(b"caf\xe9")
    outcome = push(two, REPO)
    assert outcome.error == "CardError"
    assert outcome.problem == f"{two}/README.md: is not UTF-8 (byte 3); save it as UTF-8"
    (two / "README.md").unlink()
    hub.add(REPO).push({"README.md": b"caf\xe9"})
    outcome = push(two, REPO)
    assert outcome.problem == f"{REPO}, README.md: is not UTF-8 (byte 3); save it as UTF-8"
    assert "tallstore.json" not in hub.repositories[REPO].read()


def test_the_licence_of_the_bases_card_is_passed_on(hub, push, two):
    hub.add("org/base").push({"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
    name_base(two, "org/base")
    push(two, REPO)
    readme = hub.repositories[REPO].read()["README.md"]
    assert b"license: cc-by-4.0\n" in readme
    assert b"base_model: org/base\n" in readme


def test_a_base_that_cannot_be_asked_has_no_licence(hub, push, two):
    name_base(two, "org/nowhere")
    assert push(two, REPO).error is None
    assert b"license" not in hub.repositories[REPO].read()["README.md"]


def test_what_was_not_fetched_must_be_there_already(hub, push, bundles, two):
    shutil.rmtree(two / "tasks/task2")
    outcome = push(two, REPO)
    assert outcome.error == "NotFetchedError"
    assert outcome.problem.startswith(f"{two}: task 'task2' was not fetched, and {REPO} does not have it")
    assert REPO not in hub.repositories
    push(bundles / "two", REPO)
    (two / "README.md").write_text("# In part\n\n<!-- tallstore:begin -->\n<!-- tallstore:end -->\n")
    whole = table(hub)
    push(two, REPO)
    assert pushed(hub) == contents(bundles / "two")
    assert titles(hub)[0] == "Bundle of 2 tasks"
    # What is not here is in the card as it was.
    assert b"# In part" in hub.repositories[REPO].read()["README.md"]
    assert table(hub) == whole
    assert len(whole) == 4


def test_a_file_that_changes_meanwhile_is_not_committed(hub, push, two):
    shard = next(two.glob("tasks/*/private-*"))
    changed = bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:]
    hub.inject(Call(lambda: shard.write_bytes(changed)), "POST", "/api/repos/create")
    outcome = push(two, REPO)
    assert outcome.error == "IntegrityError"
    assert f"{shard.relative_to(two).as_posix()}: changed while it was pushed" in outcome.problem
    assert titles(hub) == ["initial commit"]


# --- who may


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("token", [None, "hf_wrong", READ_ONLY, STRANGER])
def test_who_may_not_write_is_told_so_in_one_line(hub, push, bundles, token, is_there):
    if is_there:
        hub.add(REPO)
    outcome = push(bundles / "two", REPO, token=token)
    assert outcome.error == "HubAccessError"
    assert outcome.problem.startswith(f"{REPO}: ")
    assert "give a token that may write there (`hf auth login`, or token=…)" in outcome.problem
    assert "\n" not in outcome.problem
    assert outcome.said
    assert "hf_" not in outcome.said
    assert not sent(hub)


def test_a_private_repository_of_somebody_else_is_not_told_of(hub, push, bundles):
    hub.add(REPO, private=True)
    assert push(bundles / "two", REPO, token=STRANGER).error == "HubAccessError"


@pytest.mark.parametrize("token", [OWNER, "hf_impossible\n", "hf_unprintable\x01", "hf_größer", ""])
def test_a_token_is_never_shown(hub, push, bundles, token):
    outcome = push(bundles / "two", REPO, token=token)
    assert outcome.error == (None if token == OWNER else "OptionError")
    assert outcome.said
    assert "hf_" not in outcome.said + outcome.problem
    for content in hub.repositories[REPO].read().values() if outcome.oid else ():
        assert token.encode() not in content
