"""How bytes get to the Hub: by Xet, in parts, through a server of its own; and that none is sent twice."""

from __future__ import annotations

import pytest

import tallstore
from tests.hub.loopback import Account, LoopbackHub
from tests.hub.loopback.faults import Drop, Status
from tests.hub.pushes import REPO, Pusher, contents, pushed, titles
from tests.model_directories import save_models

ACCOUNTS = [Account("hf_owner", "user"), Account("hf_stranger", "stranger")]


@pytest.fixture
def xet_hub():
    with LoopbackHub(accounts=ACCOUNTS, xet=True) as running:
        yield running


@pytest.fixture
def xet_push(xet_hub, xet_process):
    return Pusher(xet_process, xet_hub.url, xet_hub.token, plots=False)


def sent_nbytes(hub):
    return sum(exchange.received_nbytes for exchange in hub.log.select("POST", "/cas/v1/xorbs/*"))


def test_a_bundle_travels_by_xet(xet_hub, xet_push, bundles):
    assert xet_push(bundles / "two", REPO).oid == xet_hub.repositories[REPO].refs["refs/heads/main"]
    assert pushed(xet_hub) == contents(bundles / "two")
    assert not xet_hub.log.select("PUT")
    first = sent_nbytes(xet_hub)
    xet_hub.log.clear()
    xet_push(bundles / "three", REPO)
    assert pushed(xet_hub) == contents(bundles / "three")
    assert 0 < sent_nbytes(xet_hub) < first
    xet_hub.log.clear()
    xet_push(bundles / "three", REPO)
    assert not xet_hub.log.select("POST")
    assert titles(xet_hub) == ["Bundle of 3 tasks: 1 added", "Bundle of 2 tasks", "initial commit"]


def test_a_stranger_proposes_by_xet(xet_hub, xet_push, xet_process, bundles):
    xet_push(bundles / "two", REPO)
    outcome = Pusher(xet_process, xet_hub.url, "hf_stranger", plots=False)(bundles / "three", REPO, create_pr=True)
    assert xet_hub.repositories[REPO].commits[outcome.oid].author == "stranger"
    assert pushed(xet_hub, "refs/pr/1") == contents(bundles / "three")
    assert pushed(xet_hub) == contents(bundles / "two")


@pytest.mark.parametrize("fault", [Status(503), Status(429), Drop()], ids=repr)
@pytest.mark.parametrize("path", ["/api/models/*/xet-write-token/*", "/cas/v1/xorbs/*", "/cas/v*/shards"])
def test_what_passes_is_tried_again_by_xet(xet_hub, xet_push, bundles, path, fault):
    xet_hub.inject(fault, None, path)
    outcome = xet_push(bundles / "two", REPO)
    assert outcome.error is None, outcome.problem
    assert pushed(xet_hub) == contents(bundles / "two")
    assert len(titles(xet_hub)) == 2


def test_a_store_that_refuses_is_told_in_one_line(xet_hub, xet_push, bundles):
    xet_hub.inject(Status(403), None, "/cas/*", times=None)
    outcome = xet_push(bundles / "two", REPO)
    assert outcome.error in {"HubError", "HubAccessError"}
    assert outcome.problem.startswith(f"{REPO}: ")
    assert "\n" not in outcome.problem
    assert "hf_owner" not in outcome.said
    assert titles(xet_hub) == ["initial commit"]


def test_large_files_travel_in_parts_to_a_server_of_their_own(plain_process, tmp_path):
    models = save_models(tmp_path)
    tallstore.pack(models / "base", {f"task{seed}": models / f"task{seed}" for seed in (1, 2)}, tmp_path / "bundle")
    with LoopbackHub(multipart=1000, cdn=True) as hub:
        push = Pusher(plain_process, hub.url, hub.token, plots=False)
        hub.inject(Status(503), "PUT", "/lfs/*/2")
        assert push(tmp_path / "bundle", REPO).oid
        assert pushed(hub) == contents(tmp_path / "bundle")
        parts = hub.log.select("PUT", "/lfs/*", "storage")
        assert len(parts) > len(hub.repositories[REPO].uploaded)
        assert not any(part.authorised for part in parts)
