"""`pack` killed or interrupted at any moment: there is no bundle, the old one or the new one, and it is whole."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tallstore
from tests.faults.bundles import digests, large_inputs, names, small_inputs
from tests.faults.children import Child, Job, Outcome, stop_at, without_exchange

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

NEW: Mapping[str, Any] = {"method": tallstore.SignedMask()}
OLD: Mapping[str, Any] = {"method": tallstore.TallMask()}
# File operations that the ordinary run stops at: every seventh, and all that take or change a place.
EVERY, DECISIVE = 7, {"os.rename", "fcntl.flock", "ctypes.dlsym", "shutil.rmtree"}


class Specimens(NamedTuple):
    """Inputs, and the bundles that two methods make of them."""

    inputs: tuple[Path, Mapping[str, Path]]
    new: Path
    old: Path


class Place:
    """A directory with a bundle in it, or room for one, and a pack that is to go there."""

    def __init__(self, specimens: Specimens, root: Path, *, there: bool, exchange: bool = True):
        self.out = root / "place" / "bundle"
        self.job = Job(*specimens.inputs, self.out, {**NEW, "overwrite": there})
        self.conditions = () if exchange else (without_exchange,)
        self.may_be_missing = not there or not exchange
        self.new = digests(specimens.new)
        self.old = digests(specimens.old) if there else None
        self.old_bundle = specimens.old if there else None

    def begin(self) -> None:
        """As it is before the pack."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        if self.old_bundle:
            shutil.copytree(self.old_bundle, self.out)

    def stop(self, event: int, number: signal.Signals) -> Outcome:
        """Pack from the beginning, and send the process a signal just before that event."""
        self.begin()
        return Child(self.job, *self.conditions, functools.partial(stop_at, event, number)).outcome()

    def events(self) -> list[str]:
        """Every event of a pack that is not stopped."""
        self.begin()
        outcome = Child(self.job, *self.conditions).outcome()
        assert outcome.exit_code == 0, outcome.error
        assert digests(self.out) == self.new
        assert set(outcome.events) >= {"open", "os.rename"}
        return list(outcome.events)

    def is_whole(self) -> bool:
        """Whether what is there may be there: the new bundle, the old one, or none."""
        return digests(self.out) in (self.new, self.old) if self.out.exists() else self.may_be_missing

    def pack_again(self) -> None:
        """The next pack succeeds, and leaves nothing beside the bundle."""
        Job(self.job.base, self.job.experts, self.out, {**NEW, "overwrite": True}).run()
        assert digests(self.out) == self.new
        assert names(self.out.parent) == ["bundle"]


def some(events: Sequence[str]) -> list[int]:
    """Those of the ordinary run, one after the last of all among them."""
    return [n for n, event in enumerate(events) if n % EVERY == 0 or event in DECISIVE] + [len(events)]


def all_of(events: Sequence[str]) -> list[int]:
    return list(range(len(events) + 1))


def specimens(root: Path, inputs: tuple[Path, Mapping[str, Path]]) -> Specimens:
    for name, options in (("new", NEW), ("old", OLD)):
        Job(*inputs, root / name, options).run()
        assert tallstore.verify(root / name) == []
    return Specimens(inputs, root / "new", root / "old")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    (root / "inputs").mkdir()
    return specimens(root, small_inputs(root / "inputs"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Experts of 21 MB, which take long enough to pack for a random moment to be in the midst of it."""
    root = tmp_path_factory.mktemp("large")
    (root / "inputs").mkdir()
    return specimens(root, large_inputs(root / "inputs", tensors=20, numel=1 << 18))


@pytest.fixture(scope="module", autouse=True)
def inputs_are_not_modified(small, large):
    """Whatever these tests do."""
    roots = [specimens.inputs[0].parent for specimens in (small, large)]
    before = [digests(root) for root in roots]
    yield
    assert [digests(root) for root in roots] == before


@pytest.fixture(
    params=[{"there": False}, {"there": True}, {"there": True, "exchange": False}],
    ids=["a free place", "over a bundle", "over a bundle in two steps"],
)
def place(small, tmp_path, request):
    return Place(small, tmp_path, **request.param)


@pytest.mark.parametrize("choose", [some, pytest.param(all_of, marks=pytest.mark.slow)])
def test_killed_just_before_a_file_operation(place, choose):
    """The bundle is the new one, the old one or none; the next pack succeeds and cleans up."""
    *before, end = choose(place.events())
    for event in before:
        assert place.stop(event, signal.SIGKILL).exit_code == -signal.SIGKILL
        assert place.is_whole(), f"event {event} of {end}"
        place.pack_again()
    assert place.stop(end, signal.SIGKILL).exit_code == 0


@pytest.mark.parametrize("choose", [some, pytest.param(all_of, marks=pytest.mark.slow)])
def test_interrupted_just_before_a_file_operation(place, choose):
    """Ctrl-C leaves nothing behind, not even what the next pack would remove."""
    *before, end = choose(place.events())
    for event in before:
        outcome = place.stop(event, signal.SIGINT)
        assert outcome.error == (KeyboardInterrupt, ""), f"event {event} of {end}"
        assert place.is_whole(), f"event {event} of {end}"
        assert names(place.out.parent) in ([], ["bundle"]), f"event {event} of {end}"
        assert place.out.exists() or place.old is None, f"event {event} of {end}"
    assert place.stop(end, signal.SIGINT).exit_code == 0


@pytest.mark.parametrize("there", [False, True], ids=["a free place", "over a bundle"])
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_time(large, tmp_path, there, kills):
    place = Place(large, tmp_path, there=there)
    place.begin()
    child = Child(place.job)
    child.wait_until_it_packs()
    start = time.monotonic()
    assert child.outcome().exit_code == 0
    duration = time.monotonic() - start
    killed = 0
    for number in range(kills):
        place.begin()
        child = Child(place.job)
        child.wait_until_it_packs()
        time.sleep(duration * (number + 0.5) / kills)
        child.send(signal.SIGKILL)
        killed += child.outcome().exit_code == -signal.SIGKILL
        assert place.is_whole(), f"kill {number} of {kills}"
    assert killed > kills // 3
    place.pack_again()
    assert tallstore.verify(place.out) == []


@pytest.fixture
def heard_interrupts():
    """What is started is not deaf to Ctrl-C, as what a shell starts in the background is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
@pytest.mark.parametrize("there", [False, True], ids=["a free place", "over a bundle"])
def test_an_interrupted_command_says_one_line_and_leaves_nothing(large, tmp_path, there):
    place = Place(large, tmp_path, there=there)
    place.begin()
    base, experts = large.inputs
    named = [f"--expert={name}={path}" for name, path in experts.items()]
    command = [sys.executable, "-m", "tallstore", "pack", f"--base={base}", *named, f"--out={place.out}", "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    staging = place.out.parent / ".bundle.partial"
    while not staging.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, complaint = process.communicate(timeout=60)
    assert (process.returncode, printed, complaint) == (130, "", "interrupted\n")
    assert names(place.out.parent) == (["bundle"] if there else [])
    assert place.is_whole()
