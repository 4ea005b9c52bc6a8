"""What tests of the Hub share: one that is empty, and its client."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

import tallstore
from tests.hub.client_process import Client, client_process
from tests.hub.loopback import LoopbackHub
from tests.model_directories import base_tensors, save_model, save_models

NOWHERE = "http://127.0.0.1:9"  # calls say where their Hub is


@pytest.fixture(scope="session")
def plain_process(tmp_path_factory):
    """A process in which the client does not speak Xet."""
    with client_process(NOWHERE, tmp_path_factory.mktemp("plain-client")) as process:
        yield process


@pytest.fixture(scope="session")
def xet_process(tmp_path_factory):
    """A process in which it does."""
    if find_spec("hf_xet") is None:
        pytest.skip("hf_xet is not there for this platform")
    with client_process(NOWHERE, tmp_path_factory.mktemp("xet-client"), xet=True) as process:
        yield process


@pytest.fixture
def hub():
    """A Hub with one user, named "user"."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def client(hub, plain_process, tmp_path):
    """That user's client."""
    return Client(plain_process, hub.url, hub.token, tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a base and its fine-tunes."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def running():
    """A Hub for all tests of a file."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="module")
def process(running, tmp_path_factory):
    """Two processes with a client of that Hub."""
    home = tmp_path_factory.mktemp("home")
    with client_process(running.url, home, token=running.token, processes=2) as started:
        yield started


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """The folder of bundles of "two" and "three" tasks of one base, and of two tasks of another ("elsewhere").

    They are packed as signs, which share nothing: bundles with tasks in common have files in common.
    """
    root = save_models(tmp_path_factory.mktemp("models"))
    save_model(root / "other", {name: tensor + 1 for name, tensor in base_tensors().items()})
    for name, base, tasks in (("two", "base", "12"), ("three", "base", "123"), ("elsewhere", "other", "12")):
        experts = {f"task{task}": root / f"task{task}" for task in tasks}
        tallstore.pack(root / base, experts, root / name, method=tallstore.Sign())
    return root
