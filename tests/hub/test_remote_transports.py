"""How the bytes of a bundle travel: from another server that the Hub redirects to, and by Xet."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

import tallstore
from tests.hub import pulls
from tests.hub.client_process import client_process
from tests.hub.loopback import LoopbackHub
from tests.hub.loopback.faults import Drop, Status, Tamper, Truncate
from tests.hub.pulls import call, contents, digests
from tests.model_directories import pack_models, save_models


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    models = save_models(tmp_path_factory.mktemp("models"))
    return pack_models(models, models / "bundle", embed_base=True)


@pytest.fixture(scope="module")
def elsewhere(bundle):
    """A Hub that has large files on another server."""
    with LoopbackHub(cdn=True) as hub:
        yield hub


@pytest.fixture(scope="module")
def process(elsewhere, tmp_path_factory):
    with client_process(elsewhere.url, tmp_path_factory.mktemp("home"), token=elsewhere.token) as started:
        yield started


@pytest.fixture
def repo_id(request, elsewhere, bundle):
    repo_id = f"user/{pulls.name_of(request)}"
    elsewhere.add(repo_id).push(contents(bundle))
    elsewhere.log.clear()
    yield repo_id
    elsewhere.faults.clear()


def test_large_files_come_from_another_server_without_the_token(elsewhere, process, bundle, repo_id, tmp_path):
    path = call(process, tallstore.pull, repo_id, cache_dir=tmp_path).value
    assert contents(path) == contents(bundle)
    sent = elsewhere.log.select("GET", server="storage")
    assert len(sent) == sum(name.endswith(".safetensors") for name in contents(bundle))
    assert not any(exchange.authorised for exchange in sent)


@pytest.mark.parametrize("fault", [Status(503), Drop(), Truncate(50)], ids=["503", "dropped", "cut off"])
def test_faults_of_that_server_are_got_over(elsewhere, process, bundle, repo_id, tmp_path, fault):  # noqa: PLR0917
    elsewhere.inject(fault, "GET", "/lfs/*", times=3)
    found = call(process, digests, repo_id, ["task1"], cache_dir=tmp_path)
    assert found.value == digests(bundle, ["task1"])


def test_what_that_server_tampers_with_is_refused(elsewhere, process, repo_id, tmp_path):
    elsewhere.inject(Tamper(100), "GET", "/lfs/*")
    found = call(process, digests, repo_id, ["task1"], cache_dir=tmp_path)
    assert found.error == "IntegrityError"
    assert ".safetensors: came with another sha256" in found.problem


# --- Xet ---


@pytest.fixture(scope="module")
def by_xet(bundle):
    if find_spec("hf_xet") is None:
        pytest.skip("hf_xet is not there for this platform")
    with LoopbackHub(xet=True) as hub:
        hub.add("user/bundle").push(contents(bundle))
        yield hub


@pytest.fixture(scope="module")
def xet_process(by_xet, tmp_path_factory):
    with client_process(by_xet.url, tmp_path_factory.mktemp("home"), token=by_xet.token, xet=True) as started:
        yield started


def test_large_files_come_by_xet(by_xet, xet_process, bundle, tmp_path):
    found = call(xet_process, digests, "user/bundle", ["task1"], cache_dir=tmp_path)
    assert found.value == digests(bundle, ["task1"])
    assert not by_xet.log.select("GET", "*/resolve/*.safetensors")
    offline = call(xet_process, digests, "user/bundle", ["task1"], cache_dir=tmp_path, local_files_only=True)
    assert offline.value == found.value


def test_a_directory_is_pulled_by_xet(xet_process, bundle, tmp_path):
    out = tmp_path / "out"
    call(xet_process, tallstore.pull, "user/bundle", local_dir=out, cache_dir=tmp_path / "cache")
    assert tallstore.verify(out) == []
    assert digests(out, ["task2"]) == digests(bundle, ["task2"])


@pytest.mark.parametrize("fault", [Status(503), Drop()], ids=["503", "dropped"])
def test_faults_of_xet_are_got_over(by_xet, xet_process, bundle, tmp_path, fault):
    by_xet.inject(fault, path="/cas/*", times=2)
    found = call(xet_process, digests, "user/bundle", ["task3"], cache_dir=tmp_path)
    by_xet.faults.clear()
    assert found.value == digests(bundle, ["task3"])


def test_xet_that_stays_away_is_one_line(by_xet, xet_process, tmp_path):
    by_xet.inject(Status(500), path="/cas/*", times=None)
    found = call(xet_process, digests, "user/bundle", ["task2"], cache_dir=tmp_path)
    by_xet.faults.clear()
    assert found.error == "HubError"
    assert ".safetensors: " in found.problem
    assert "\n" not in found.problem
