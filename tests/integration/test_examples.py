"""The examples run from nothing, and what they print is true; no answer of the server is another expert's."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tallstore
from tests.hub.client_process import client_environment
from tests.hub.loopback import LoopbackHub

pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="the examples' digits need scikit-learn")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STRICT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "PYTHONWARNINGS": "error",
    "NO_PROXY": "127.0.0.1",
}
TASKS = ("rotated", "inverted", "mirrored", "renamed")

needs_server = pytest.mark.skipif(
    find_spec("fastapi") is None or find_spec("uvicorn") is None, reason="the server needs the extra `examples`"
)


def command(name: str, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), "--out", str(out), *arguments]


def run(name: str, out: Path, *arguments: str, status: int = 0, env=STRICT) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(name, out, *arguments), check=False, capture_output=True, text=True, env=env, cwd=out, timeout=300
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert status or done.stderr == ""
    return done


def percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def rows(table: str) -> dict[str, list[float]]:
    """The percentages of a Markdown table, by what stands before them."""
    return {line.split("|")[1].strip(): percentages(line) for line in table.splitlines() if "%" in line}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder for all examples: what one trained, the next ones use."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def shipped(out) -> str:
    """What ship.py prints; *out* then has checkpoints and a bundle."""
    return run("ship.py", out).stdout


def test_ship_packs_verifies_and_loads(shipped, out):
    assert "every byte is the one that was written" in shipped
    assert percentages(shipped)[-1] > 90
    assert tallstore.verify(out / "bundle") == []
    with tallstore.open_bundle(out / "bundle") as bundle:
        assert bundle.tasks == TASKS


def test_ship_pushes_and_loads_from_the_hub(shipped, out, tmp_path):
    with LoopbackHub() as hub:
        environment = client_environment(hub.url, tmp_path, token=hub.token)
        printed = run("ship.py", out, "--repo", "user/digits", env=environment).stdout
    assert re.search(r"^experts in user/digits@[0-9a-f]{40}: rotated, ", printed, re.MULTILINE)
    assert percentages(printed) == percentages(shipped)


def test_evaluate_scores_every_task_and_is_a_gate(shipped, out):
    table = run("evaluate.py", out).stdout
    refused = run("evaluate.py", out, "--at-least", "1", status=1)
    assert refused.stdout == table
    scores = rows(table)
    assert tuple(scores) == TASKS
    for task, (base, trained, bundled, agreement) in scores.items():
        assert base < 60, task
        assert trained > 90, task
        assert abs(trained - bundled) < 3, task
        assert 95 < agreement <= 100, task
        assert (f"{task}: agrees on {agreement}%, less than 100.0%" in refused.stderr) == (agreement < 100), task


def test_add_task_grows_a_bundle_and_tells_what_each_step_costs(shipped, out):
    packed, added, replaced, removed, again = run("add_task.py", out).stdout.splitlines()
    assert packed.startswith(f"shipped: {', '.join(TASKS[:-1])}, in ")
    checkpoint, more = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", added))
    assert more < checkpoint / 10
    assert percentages(added)[0] > 90
    assert added.endswith("every bit of the others stayed")
    truer, before = map(float, re.findall(r"0\.\d+", replaced))
    assert truer > before
    assert removed.startswith("removed 1 task, ")
    assert removed.endswith(" kB freed")
    assert percentages(again)[0] > 90
    assert again.endswith("the others changed a little")
    assert tallstore.verify(out / "bundle-that-grows") == []


def test_every_epoch_of_a_training_loop_comes_back(shipped, out):
    printed = run("training_loop.py", out).stdout
    saved, weights, packed = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:bytes|of them)", printed)
    )
    assert packed < weights / 10 < saved / 25
    scores = rows(printed)
    assert list(scores) == [f"{task}-{epoch}" for task in ("rotated", "mirrored") for epoch in range(1, 5)]
    assert len({trained for trained, _ in scores.values()}) > 4
    for name, (trained, bundled) in scores.items():
        assert abs(trained - bundled) < 8, name


@needs_server
def test_serve_asks_itself(shipped, out):
    printed = run("serve.py", out, "--hot", "mirrored").stdout
    (right,) = re.findall(r"(\d+) answers are right", printed)
    assert int(right) > 360
    assert "model for mirrored: " in printed
    assert "model for rotated, inverted, renamed: " in printed


@contextlib.contextmanager
def serving(out: Path, hot: Sequence[str]) -> Iterator[str]:
    """A server's address, to which an expert's name is added."""
    arguments = ("--port", "0", *(argument for expert in hot for argument in ("--hot", expert)))
    with subprocess.Popen(
        command("serve.py", out, *arguments), env=STRICT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            yield server.stdout.readline().split()[-1].removesuffix("NAME")
        finally:
            server.terminate()


def post(url: str, body: object) -> object:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        return json.load(response)


@pytest.fixture
def alone(shipped, out, monkeypatch):
    """Images, and what each expert answers to each when nobody else is there.

    That is a set: in how a matrix product rounds, the place in the batch may matter. It hardly ever does.
    """
    monkeypatch.syspath_prepend(str(EXAMPLES))
    digits, lanes = importlib.import_module("digits"), importlib.import_module("lanes")
    images = torch.rand(40, 64, generator=torch.Generator().manual_seed(1))
    answers = {}
    with tallstore.open_bundle(out / "bundle") as bundle:
        for task in TASKS:
            model = digits.network()
            model.load_state_dict(bundle.state_dict(task))
            with torch.inference_mode():
                for number, image in enumerate(images):
                    answers[task, number] = set(map(tuple, model(image.expand(lanes.BATCH, -1).contiguous()).tolist()))
    return images, answers


@needs_server
@pytest.mark.parametrize("hot", [("rotated",), pytest.param((), marks=pytest.mark.slow)])
def test_no_answer_is_of_another_expert(alone, out, hot):
    images, answers = alone
    asked = [(task, number) for _ in range(4) for number in range(len(images)) for task in TASKS]
    with serving(out, hot) as url, ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda ask: tuple(post(url + ask[0], images[ask[1]].tolist())), asked))
        for name, body, status in (("rotate", images[0].tolist(), 404), ("rotated", [0.5] * 63, 422)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(url + name, body)
            assert refused.value.code == status
            refused.value.close()
    assert [ask for ask, answer in zip(asked, found, strict=True) if answer not in answers[ask]] == []
    assert len(set(found)) >= len(answers)  # no two experts say the same


def test_who_waits_for_a_damaged_expert_hears_of_it_and_nobody_else(alone, out, tmp_path):
    digits, lanes, (images, answers) = importlib.import_module("digits"), importlib.import_module("lanes"), alone
    shutil.copytree(out / "bundle", tmp_path / "bundle")
    (mask,) = (tmp_path / "bundle" / "tasks" / "mirrored").glob("mask-*.safetensors")
    content = bytearray(mask.read_bytes())
    content[-1] ^= 1
    mask.write_bytes(content)
    asked = [(task, number) for number in range(20) for task in ("mirrored", "renamed")]
    with tallstore.open_bundle(tmp_path / "bundle") as bundle:
        model = digits.network()
        lane = lanes.Lane(bundle.tasks, model, bundle.attach(model).using)
        with ThreadPoolExecutor(16) as pool:
            waiting = [pool.submit(lane.ask, task, images[number].tolist()) for task, number in asked]
    for ask, future in zip(asked, waiting, strict=True):
        if ask[0] == "mirrored":
            assert isinstance(future.exception(), tallstore.IntegrityError)
        else:
            assert tuple(future.result()) in answers[ask]
