"""Models of transformers by a bundle's id: the bundle, and the base that it names, both from the Hub."""

from __future__ import annotations

import pytest

import tallstore
from tests.hub.client_process import client_process
from tests.hub.loopback import LoopbackHub
from tests.hub.pulls import call, contents, model

pytest.importorskip("transformers")

BASE, EXPERTS = "user/base", "user/experts"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A Hub that has fine-tunes as a bundle, and their base, whose commit the bundle names; their folder."""
    import torch  # noqa: PLC0415

    from tests.transformers_models import FAMILIES, TASKS, pack  # noqa: PLC0415

    root = tmp_path_factory.mktemp("models")
    pack(FAMILIES["bert-tied"], torch.float32, root)
    with LoopbackHub() as hub:
        pin = hub.add(BASE).push(contents(root / "base"))
        tallstore.pack(root / "base", {task: root / task for task in TASKS}, root / "named", base_ref=f"{BASE}@{pin}")
        hub.add(EXPERTS).push(contents(root / "named"))
        hub.log.clear()
        yield hub, root


@pytest.fixture
def process(packed, tmp_path):
    """A client with an empty cache."""
    hub, _ = packed
    with client_process(hub.url, tmp_path, token=hub.token) as started:
        yield started


def asked_for(hub, repo_id):
    """The files of a repository that were downloaded."""
    prefix = f"/{repo_id}/resolve/"
    return {exchange.path.removeprefix(prefix).partition("/")[2] for exchange in hub.log.select("GET", f"{prefix}*")}


def test_a_model_and_its_base_come_from_the_hub(packed, process):
    hub, root = packed
    found = call(process, model, EXPERTS, "two")
    assert found.error is None, found.problem
    expected = call(process, model, str(root / "named"), "two", base=root / "base").value
    assert found.value == expected
    assert found.value[0] == "BertForMaskedLM"
    assert "model.safetensors" in asked_for(hub, BASE)
    brought = asked_for(hub, EXPERTS)
    assert any(path.startswith("tasks/two/") for path in brought)
    assert not any(path.startswith(("tasks/one/", "tasks/three/")) for path in brought)
    hub.log.clear()
    assert call(process, model, f"{EXPERTS}@main", "two").value == expected
    assert not hub.log.select("GET", "*/resolve/*")


def test_what_was_opened_by_its_id_switches_a_model_that_it_made(packed, process, tmp_path):
    _, root = packed
    expected = call(process, model, str(root / "named"), "two", base=root / "base").value
    switched = call(process, model, EXPERTS, "two", "one", cache_dir=tmp_path / "cache")
    assert switched.error is None, switched.problem
    assert switched.value == expected
