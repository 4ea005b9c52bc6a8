"""Bundles of newer versions pushed and pulled: what this version cannot judge goes as it is, and is named."""

from __future__ import annotations

import pytest

import tallstore
from tallstore.format import layout, versions
from tests.hub.loopback import Account, LoopbackHub
from tests.hub.pulls import call
from tests.hub.pushes import REPO, Pusher, contents, pushed
from tests.resealed import resealed, tables, with_feature, with_keys_everywhere

OWNER = "hf_owner"
TABLE = "tasks/task1/task.json"
FEATURE = "org.example.telepathy"
REQUIRED = f"{TABLE}: requires the feature '{FEATURE}', which this reader does not have; update tallstore [VER-4]"


@pytest.fixture
def hub():
    with LoopbackHub(accounts=[Account(OWNER, "user")]) as running:
        yield running


@pytest.fixture
def push(hub, plain_process):
    return Pusher(plain_process, hub.url, OWNER)


@pytest.fixture
def pull(plain_process, tmp_path):
    def pulled(name, **options):
        outcome = call(
            plain_process,
            tallstore.pull,
            REPO,
            token=OWNER,
            cache_dir=tmp_path / "cache",
            local_dir=tmp_path / name,
            **options,
        )
        assert outcome.error is None, outcome.problem
        return outcome

    return pulled


@pytest.fixture
def newer(bundles, tmp_path):
    """Three tasks, the first of which needs a feature that nobody has."""
    return resealed(bundles / "three", tmp_path / "newer", {TABLE: with_feature(FEATURE)})


def without_origin(path):
    return {name: content for name, content in contents(path).items() if not name.startswith(".")}


def test_what_cannot_be_judged_is_pushed_and_pulled_as_it_is(push, pull, hub, newer, tmp_path):
    outcome = push(newer, REPO)
    assert [text for text in outcome.warnings if FEATURE in text] == [f"{REQUIRED}: its files are pushed as they are"]
    assert pushed(hub) == contents(newer)
    assert b"task1" in hub.repositories[REPO].read()["README.md"]
    whole = pull("whole")
    assert [warning.partition(": ")[2] for warning in whole.warnings] == [
        f"{REQUIRED}; its files are brought as they are"
    ]
    assert without_origin(tmp_path / "whole") == contents(newer)


def test_a_broken_task_beside_it_is_still_refused(push, newer):
    shard = newer / "tasks" / "task2" / "mask-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    outcome = push(newer, REPO)
    assert outcome.error == "FormatError"
    assert "[FILE-2]" in outcome.problem
    assert outcome.oid is None


def test_of_the_others_nothing_is_said(push, pull, newer, tmp_path):
    push(newer, REPO)
    assert pull("others", tasks=["task2", "task3"]).warnings == []
    assert not (tmp_path / "others" / "tasks" / "task1").exists()
    assert tallstore.verify(tmp_path / "others") == []


def test_it_can_be_pulled_alone(push, pull, newer, tmp_path):
    push(newer, REPO)
    assert len(pull("alone", tasks=["task1"]).warnings) == 1
    found, whole = without_origin(tmp_path / "alone"), contents(newer)
    assert found.items() <= whole.items()
    assert {path for path in whole if path.startswith(("tasks/task1/", "groups/", "files/"))} <= found.keys()
    assert [str(problem) for problem in tallstore.verify(tmp_path / "alone")] == [REQUIRED]


def test_a_part_without_it_is_pushed_over_it(push, pull, hub, newer, tmp_path):
    push(newer, REPO)
    pull("others", tasks=["task2", "task3"])
    outcome = push(tmp_path / "others", REPO)
    assert outcome.error is None, outcome.problem
    assert pushed(hub) == contents(newer)
    assert b"| task1 |" in hub.repositories[REPO].read()["README.md"]


def read_as(version):
    """Let this process read as another version does."""
    versions.FORMAT_VERSION = version


@pytest.fixture
def as_released(plain_process):
    """The client's process reads as version 1.0 does."""
    plain_process.submit(read_as, "1.0").result()
    yield
    plain_process.submit(read_as, versions.FORMAT_VERSION).result()


@pytest.mark.usefixtures("as_released")
def test_a_manifest_with_unknown_keys_goes_byte_for_byte(push, pull, hub, bundles, tmp_path):
    newer = resealed(
        bundles / "two",
        tmp_path / "newer",
        dict.fromkeys(tables(bundles / "two"), with_keys_everywhere),
        version="1.999",
    )
    outcome = push(newer, REPO)
    assert outcome.error is None, outcome.problem
    assert pushed(hub) == contents(newer)
    pull("pulled")
    (tmp_path / "pulled" / "README.md").write_text("# Mine\n")
    assert push(tmp_path / "pulled", REPO).error is None
    assert pushed(hub) == contents(newer)
    assert (tmp_path / "pulled" / layout.MANIFEST).read_bytes() == (newer / layout.MANIFEST).read_bytes()
