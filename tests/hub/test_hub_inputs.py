"""Models of the Hub as inputs, through the real client and a Hub on this machine.

The client reads its settings when it is imported, so inputs are opened in other processes: one that reaches the Hub,
then one that is offline with the same cache.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from tests.hub.client_process import client_environment
from tests.hub.loopback import Account, LoopbackHub
from tests.hub.loopback.faults import Status

OLD, NEW = "a" * 40, "b" * 40
RIGHT = "hf_right"

OPEN_EACH = """
import json, sys, traceback
from tallstore.checkpoints import open_checkpoint
from tallstore.errors import InputError
from tallstore.hub.pinned import Access

for source, token in json.load(sys.stdin):
    try:
        with open_checkpoint(source, Access(token)) as checkpoint:
            outcome = {
                "where": checkpoint.where,
                "hub": [checkpoint.hub.repo_id, checkpoint.hub.revision],
                "files": [str(path.relative_to(checkpoint.directory)) for path in checkpoint.files],
                "beside": sorted(path.name for path in checkpoint.directory.iterdir()),
                "values": {name: checkpoint.read(name).tolist() for name in checkpoint.names},
            }
    except InputError as error:
        outcome = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    print(json.dumps(outcome))
"""


def weights(value, *names):
    return save({name: torch.tensor([float(value)]) for name in names})


def pickled(value, *names):
    file = io.BytesIO()
    torch.save({name: torch.tensor([float(value)]) for name in names}, file)
    return file.getvalue()


def index(**places):
    return json.dumps({"weight_map": places}).encode()


MODELS = {
    "org/plain": {
        OLD: {"model.safetensors": weights(1, "w")},
        NEW: {
            "model.safetensors": weights(2, "w"),
            "pytorch_model.bin": pickled(3, "w"),
            "onnx/model.safetensors": weights(4, "w"),
            "consolidated.safetensors": weights(5, "w"),
            "config.json": b"{}",
            "vocab.txt": b"a\nb\n",
            "README.md": b"# Plain",
            ".gitattributes": b"",
        },
    },
    "org/sharded": {
        NEW: {
            "model.safetensors.index.json": index(a="one.safetensors", b="two.safetensors"),
            "one.safetensors": weights(1, "a"),
            "two.safetensors": weights(2, "b"),
            "other.safetensors": weights(3, "c"),
        }
    },
    "org/unfinished": {NEW: {"model.safetensors.index.json": index(a="one.safetensors")}},
    "org/pickled": {NEW: {"pytorch_model.bin": pickled(1, "w"), "extra/x.safetensors": b"", "config.json": b"{}"}},
    "org/other-name": {NEW: {"weights.safetensors": weights(1, "w"), "training_args.bin": b"x"}},
    "org/several": {NEW: {"x.safetensors": weights(1, "w"), "y.safetensors": weights(1, "w")}},
    "org/empty": {NEW: {"README.md": b""}},
    "org/adapter": {NEW: {"adapter_config.json": b"{}", "adapter_model.safetensors": weights(1, "w")}},
    "org/quantised": {
        NEW: {
            "config.json": b'{"quantization_config": {"quant_method": "awq"}}',
            "model.safetensors": weights(1, "w"),
        }
    },
    "org/private": {NEW: {"model.safetensors": weights(1, "w")}},
    "org/gated": {NEW: {"model.safetensors": weights(1, "w"), "config.json": b"{}"}},
    "org/forbidden": {NEW: {"model.safetensors": weights(1, "w")}},
    "org/broken": {NEW: {"model.safetensors": weights(1, "w")}},
}

ONLINE = {
    "main": ("org/plain", None),
    "branch": ("org/plain@main", None),
    "tag": ("org/plain@v1", None),
    "pull request": ("org/plain@refs/pr/1", None),
    "commit": (f"org/plain@{OLD}", None),
    "no such revision": ("org/plain@v9", None),
    "no such model": ("org/nothing", None),
    "impossible id": ("org/a--b", None),
    "private, no token": ("org/private", None),
    "private, wrong token": ("org/private", "hf_wrong"),
    "private, impossible token": ("org/private", "hf_impossible\n"),
    "private, right token": ("org/private", RIGHT),  # last: the cache needs no token
    **{repo.partition("/")[2]: (repo, None) for repo in MODELS if repo not in {"org/plain", "org/private"}},
}
OFFLINE = {
    "cached": ("org/plain", None),
    "cached tag": ("org/plain@v1", None),
    "cached pickle": ("org/pickled", None),
    "cached other name": ("org/other-name", None),
    "not cached": ("org/nothing", None),
    "half cached": ("org/unfinished", None),
}


def open_each(hub, sources, home, **settings):
    """Open the *sources* in another process; what became of each."""
    environment = client_environment(hub.url, home, **settings)
    # Bars are not switched off: where there is no terminal, there are none.
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    process = subprocess.run(
        [sys.executable, "-c", OPEN_EACH],
        input=json.dumps(list(sources.values())),
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "it/s" not in process.stderr, "progress bars where there is no terminal"
    return dict(zip(sources, map(json.loads, process.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(accounts=[Account(RIGHT, "member", organisations={"org": "read"})]) as running:
        for repo_id, history in MODELS.items():
            private, gated = repo_id == "org/private", repo_id == "org/gated"
            running.add(repo_id, history, private=private, gated=gated)
        running.repositories["org/plain"].refs |= {"refs/tags/v1": OLD, "refs/pr/1": OLD}
        running.inject(Status(403), path="/api/models/org/forbidden*", times=None)
        running.inject(Status(500), path="/api/models/org/broken*", times=None)
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub-home")


@pytest.fixture(scope="module")
def online(hub, home):
    return open_each(hub, ONLINE, home)


@pytest.fixture(scope="module")
def offline(hub, home, online):
    before = len(hub.log)
    outcomes = open_each(hub, OFFLINE, home, HF_HUB_OFFLINE="1")
    assert len(hub.log) == before
    return outcomes


def downloaded(hub, repo_id):
    prefix = f"/{repo_id}/resolve/{NEW}/"
    return {exchange.path.removeprefix(prefix) for exchange in hub.log.select("GET", f"{prefix}*")}


@pytest.mark.parametrize(
    ("case", "commit", "value"),
    [
        ("main", NEW, 2.0),
        ("branch", NEW, 2.0),
        ("tag", OLD, 1.0),
        ("pull request", OLD, 1.0),
        ("commit", OLD, 1.0),
    ],
)
def test_a_revision_is_pinned_to_its_commit(online, case, commit, value):
    outcome = online[case]
    assert outcome["hub"] == ["org/plain", commit]
    assert outcome["where"] == f"org/plain@{commit}"
    assert outcome["files"] == ["model.safetensors"]
    assert outcome["values"] == {"w": [value]}


def test_only_what_is_needed_is_downloaded(hub, online):
    assert online["main"]["beside"] == ["config.json", "model.safetensors", "vocab.txt"]
    assert downloaded(hub, "org/plain") == {"config.json", "model.safetensors", "vocab.txt"}


def test_the_index_says_which_shards_are_downloaded(hub, online):
    assert online["sharded"]["values"] == {"a": [1.0], "b": [2.0]}
    assert "other.safetensors" not in downloaded(hub, "org/sharded")


def test_a_pickle_is_downloaded_where_there_is_no_safetensors_file(hub, online):
    assert online["pickled"]["values"] == {"w": [1.0]}
    assert downloaded(hub, "org/pickled") == {"pytorch_model.bin", "config.json"}


def test_the_only_safetensors_file_may_have_any_name(hub, online):
    assert online["other-name"]["files"] == ["weights.safetensors"]
    assert downloaded(hub, "org/other-name") == {"weights.safetensors"}


def test_a_token_opens_a_private_model(online):
    assert online["private, right token"]["values"] == {"w": [1.0]}


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("no such revision", "CheckpointNotFoundError", "org/plain@v9: the Hub has that model, but no such revision"),
        ("no such model", "CheckpointNotFoundError", "org/nothing: no such path here, and no such model on the Hub"),
        ("impossible id", "CheckpointNotFoundError", "org/a--b: no such path here, and no valid id of a model"),
        ("private, no token", "CheckpointNotFoundError", "a private one needs a token (`hf auth login`)"),
        ("private, wrong token", "InputError", "org/private: the Hub refuses access (HTTP 401); give a token"),
        ("private, impossible token", "InputError", "org/private: cannot be downloaded from the Hub"),
        ("gated", "InputError", "org/gated: is a gated model; accept its terms on the Hub"),
        ("forbidden", "InputError", "org/forbidden: the Hub refuses access (HTTP 403); give a token"),
        ("broken", "InputError", "org/broken: the Hub answers with HTTP 500; try again later"),
        ("empty", "InputError", "org/empty: has no .safetensors file and no pytorch_model.bin"),
        ("several", "InputError", "org/several: has 2 .safetensors files and no index of shards; download one"),
        ("unfinished", "DamagedCheckpointError", "places tensor 'a' in 'one.safetensors', which is not there"),
        ("adapter", "AdapterCheckpointError", "org/adapter: is a PEFT adapter"),
        ("quantised", "QuantizedCheckpointError", "org/quantised: is quantised by awq"),
    ],
)
def test_what_cannot_be_opened_is_a_typed_error_of_one_line(online, case, kind, message):
    outcome = online[case]
    assert outcome["error"] == kind
    assert message in outcome["message"]
    assert "\n" not in outcome["message"]


def test_weights_that_would_be_refused_are_not_downloaded(hub, online):
    assert downloaded(hub, "org/adapter") == {"adapter_config.json"}
    assert downloaded(hub, "org/quantised") == {"config.json"}
    assert downloaded(hub, "org/several") == set()


def test_no_error_shows_the_token(online):
    for outcome in online.values():
        assert "hf_" not in outcome.get("traceback", "")


@pytest.mark.parametrize(
    ("case", "revision", "value"),
    [
        ("cached", NEW, 2.0),
        ("cached tag", OLD, 1.0),
        ("cached pickle", NEW, 1.0),
        ("cached other name", NEW, 1.0),
    ],
)
def test_what_was_downloaded_opens_offline(offline, case, revision, value):
    assert offline[case]["hub"][1] == revision
    assert offline[case]["values"] == {"w": [value]}


def test_what_was_not_downloaded_says_so_offline(offline):
    assert offline["not cached"]["error"] == "InputError"
    assert "the Hub cannot be reached, and its cache here does not have" in offline["not cached"]["message"]


def test_what_was_downloaded_in_part_says_so_offline(offline):
    assert offline["half cached"]["error"] == "DamagedCheckpointError"
    assert "places tensor 'a' in 'one.safetensors', which is not there" in offline["half cached"]["message"]
