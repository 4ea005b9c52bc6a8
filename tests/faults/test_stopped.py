"""What writes, killed or interrupted at any moment: the old state is there or the new one; the next run cleans up."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

import tallstore
from tests.faults import operations
from tests.faults.bundles import digests, large_inputs, names
from tests.faults.children import stop_at
from tests.faults.operations import Look, Operation

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

ALL = pytest.mark.slow
# What takes or changes a place; the ordinary run stops at some of these, the last among them.
DECISIVE = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "fcntl.flock", "ctypes.dlsym", "shutil.rmtree")


def few(events: Sequence[str]) -> list[int]:
    """Those of the ordinary run: the last two decisive ones, and two more of all."""
    decisive = [number for number, event in enumerate(events) if event in DECISIVE]
    return sorted({*decisive[-2:], *range(len(events) // 4, len(events), len(events) // 2 + 1)})


def one(events: Sequence[str]) -> list[int]:
    """One near the end, where the new takes the old one's place."""
    return [[number for number, event in enumerate(events) if event in DECISIVE][-2]]


def check(operation: Operation, moment: str) -> None:
    """What is there is sound, and the next run leads to the end from there."""
    assert operation.is_sound(), moment
    assert operation.run_again() == [], moment


@pytest.mark.parametrize(
    ("number", "choose"),
    [
        (signal.SIGKILL, few),
        (signal.SIGTERM, one),
        pytest.param(signal.SIGKILL, operations.spread, marks=ALL),
        pytest.param(signal.SIGTERM, functools.partial(operations.spread, most=20), marks=ALL),
    ],
)
@pytest.mark.parametrize("name", operations.some(1))
def test_killed_just_before_a_file_operation(operate, name, number, choose):
    operation = operate(name)
    events = operation.learn().events
    assert set(events) >= {"open", "os.rename"}
    for event in choose(events):
        operation.begin()
        outcome = operation.run(functools.partial(stop_at, event, number))
        moment = f"event {event} of {len(events)}, {events[event]}"
        # Where threads and a server are at work, there may be fewer events than the last time.
        assert outcome.exit_code == -number or event > 0.9 * len(events), moment
        check(operation, moment)


@pytest.mark.parametrize("choose", [few, pytest.param(functools.partial(operations.spread, most=50), marks=ALL)])
@pytest.mark.parametrize("name", operations.some())
def test_interrupted_just_before_a_file_operation(operate, name, choose):
    """Ctrl-C leaves nothing behind but what is kept for the next run."""
    operation = operate(name)
    events = operation.learn().events
    for event in choose(events):
        operation.begin()
        outcome = operation.run(functools.partial(stop_at, event, signal.SIGINT))
        moment = f"event {event} of {len(events)}, {events[event]}"
        assert outcome.error == (KeyboardInterrupt, "") or event > 0.9 * len(events), f"{moment}: {outcome.error}"
        assert operation.is_sound(), moment
        assert operation.is_clean() or operation.keeps, moment
    check(operation, moment)


@pytest.mark.parametrize("kills", [1, pytest.param(40, marks=ALL)])
@pytest.mark.parametrize("name", operations.some())
def test_killed_at_any_time(operate, name, kills):
    operation = operate(name)
    operation.learn()
    chance = random.Random(name)  # noqa: S311 - nothing is kept secret by it
    killed = sum(killed_at(operation, chance.random()) for _ in range(kills))
    assert kills < 10 or killed > kills // 3


def killed_at(operation: Operation, share: float) -> bool:
    """Kill a child when about that share of what it takes has passed; whether it was still there."""
    operation.begin()
    start = time.monotonic()
    whole = operation.start()
    whole.wait_until_it_starts()
    start = time.monotonic()
    whole.outcome()
    duration = time.monotonic() - start
    operation.begin()
    child = operation.start()
    child.wait_until_it_starts()
    time.sleep(duration * share)
    child.send(signal.SIGKILL)
    exit_code = child.outcome().exit_code
    check(operation, f"after {share:.3f} of the time")
    return exit_code == -signal.SIGKILL


# --- large ones -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Experts of 21 MB, which take long enough to pack for a random moment to be in the midst of it."""
    root = tmp_path_factory.mktemp("large")
    (root / "inputs").mkdir()
    base, experts = large_inputs(root / "inputs", tensors=20, numel=1 << 18)
    before = digests(root / "inputs")
    tallstore.pack(base, experts, root / "old" / "bundle", method=tallstore.TallMask())
    yield base, experts, root / "old"
    assert digests(root / "inputs") == before


@pytest.mark.parametrize("there", [False, True], ids=["a free place", "over a bundle"])
@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=ALL)])
def test_a_large_pack_killed_at_any_time(large, tmp_path, there, kills):
    base, experts, old = large
    place = tmp_path / "place"
    call = functools.partial(operations.pack, base, experts, place / "bundle", embed_base=False)
    operation = Operation(call, place, {"bundle": Look()}, old if there else None)
    operation.learn()
    killed = 0
    for number in range(kills):
        killed += killed_at(operation, (number + 0.5) / kills)
    assert killed > kills // 3
    assert tallstore.verify(place / "bundle") == []


@pytest.fixture
def heard_interrupts():
    """What is started is not deaf to Ctrl-C, as what a shell starts in the background is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
@pytest.mark.parametrize("there", [False, True], ids=["a free place", "over a bundle"])
def test_an_interrupted_command_says_one_line_and_leaves_nothing(large, tmp_path, there):
    base, experts, old = large
    place = tmp_path / "place"
    operation = Operation(functools.partial(len, ()), place, {"bundle": Look()}, old if there else None)
    operation.begin()
    before = digests(place)
    named = [f"--expert={name}={path}" for name, path in experts.items()]
    out = place / "bundle"
    command = [sys.executable, "-m", "tallstore", "pack", f"--base={base}", *named, f"--out={out}", "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (place / ".bundle.partial").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, complaint = process.communicate(timeout=60)
    assert (process.returncode, printed, complaint) == (130, "", "interrupted\n")
    assert names(place) == (["bundle"] if there else [])
    assert digests(place) == before
