"""`tallstore push`, and `Bundle.push_to_hub`: what is printed, and what is done."""

from __future__ import annotations

import json
import shutil

import pytest

import tallstore
from tests.hub.pushes import REPO, CommandLine, contents, plots, pushed, titles


@pytest.fixture
def tool(hub, plain_process):
    return CommandLine(plain_process, hub.url, hub.token)


def test_a_push_says_what_went_and_where(hub, tool, bundles):
    printed, aside = tool("push", bundles / "two", REPO, "--private", "--message", "Mine")
    commit = hub.repositories[REPO].refs["refs/heads/main"]
    first, last = printed.splitlines()
    assert first.startswith(f"pushed to {REPO}: {len(contents(bundles / 'two')) + len(plots(hub)) + 1} files (")
    assert first.endswith(" uploaded, 0 files (0 B) there already")
    assert last == f"{hub.url}/{REPO}/commit/{commit}"
    assert aside == ""
    assert titles(hub)[0] == "Mine"
    assert hub.repositories[REPO].private


def test_a_push_of_nothing_says_so(tool, bundles):
    tool("push", bundles / "two", REPO)
    printed, _ = tool("push", bundles / "two", REPO)
    assert printed.startswith(f"{REPO}: nothing to push, the repository has all of it\n")


def test_a_dry_run_lists_files_and_changes_nothing(hub, tool, bundles):
    printed, _ = tool("push", bundles / "two", REPO, "--dry-run")
    assert printed.startswith(f"{REPO} (to be made): ")
    assert "nothing was changed: a dry run" in printed
    for path in contents(bundles / "two"):
        assert f"upload  {path} " in printed
    assert REPO not in hub.repositories


def test_a_dry_run_as_json_has_every_file(hub, tool, bundles):
    tool("push", bundles / "three", REPO)
    before = titles(hub)
    found = json.loads(tool("push", bundles / "two", REPO, "--dry-run", "--json")[0])
    paths = {verb: {file["path"] for file in found[verb]} for verb in ("upload", "keep", "delete")}
    here = contents(bundles / "two").keys()
    assert paths["upload"] | paths["keep"] == here | {"README.md"} | plots(hub).keys()
    assert {"README.md", "tallstore.json"} <= paths["upload"]
    assert {path for path in here if path.endswith(".safetensors")} <= paths["keep"]
    assert paths["delete"] == contents(bundles / "three").keys() - here
    for file in found["upload"] + found["keep"]:
        if file["path"] in here:
            assert file["size"] == len(contents(bundles / "two")[file["path"]])
    assert found["commit"] is None
    assert titles(hub) == before


def test_options_reach_the_push(hub, tool, bundles):
    tool("push", bundles / "two", REPO)
    tool("push", bundles / "three", REPO, "--revision", "next")
    assert pushed(hub, "next") == contents(bundles / "three")
    found = json.loads(tool("push", bundles / "three", REPO, "--create-pr", "--json")[0])
    assert found["pr_url"] == f"{hub.url}/{REPO}/discussions/1"
    assert hub.repositories[REPO].refs["refs/pr/1"] == found["commit"]
    tool("push", bundles / "elsewhere", REPO, "--overwrite")
    assert pushed(hub) == contents(bundles / "elsewhere")


def test_errors_are_one_line_with_the_options_of_the_command_line(tool, bundles):
    tool("push", bundles / "two", REPO)
    printed, aside = tool("push", bundles / "elsewhere", REPO, code=1)
    assert printed == ""
    assert aside == (
        f"error: {REPO}: has a bundle of another base (of no name); choose another repository, or give --overwrite\n"
    )
    printed, aside = tool("push", bundles / "two", REPO, "--token", "hf_wrong", code=1)
    assert "the Hub refuses access (HTTP 401)" in aside
    assert "--token" in aside
    assert "hf_wrong" not in aside


def test_the_examples_run_as_they_stand(hub, tool, bundles, tmp_path):
    shutil.copytree(bundles / "two", tmp_path / "bundle")
    listed = tool("push", "--help")[0].partition("\nExamples\n")[2]
    hub.add("user/theirs")
    for line in listed.splitlines():
        if line.startswith("  tallstore "):
            arguments = line.split()[1:]
            renamed = {"bundle": tmp_path / "bundle", "me/experts": REPO, "them/experts": "user/theirs"}
            tool(*(renamed.get(argument, argument.strip("'")) for argument in arguments if argument not in _QUOTED))
    assert pushed(hub) == contents(bundles / "two")
    assert "refs/pr/1" in hub.repositories["user/theirs"].refs


_QUOTED = {"more", "tasks'"}  # words of a message


def _push_to_hub(url, path, options):
    from tests.hub import pushes  # noqa: PLC0415 - in the client's process

    pushes._connect(url)
    with tallstore.open_bundle(path) as bundle:
        return bundle.push_to_hub(REPO, **options)


def test_a_bundle_pushes_itself(hub, plain_process, bundles):
    options = {"token": hub.token, "private": True, "commit_message": "Mine", "commit_description": "All."}
    made = plain_process.submit(_push_to_hub, hub.url, bundles / "two", options).result(60)
    commit = hub.repositories[REPO].resolve("main")
    assert made.oid == commit.sha
    assert (commit.title, commit.description) == ("Mine", "All.")
    assert pushed(hub) == contents(bundles / "two")
    assert hub.repositories[REPO].private
