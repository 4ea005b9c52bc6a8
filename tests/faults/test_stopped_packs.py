"""`pack` killed or interrupted at any moment: there is no bundle, the old one or the new one, and it is whole."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

import tallstore
from tests.faults.bundles import digests, large_inputs, names, small_inputs
from tests.faults.children import Child, Job, Outcome, stop_at, without_exchange

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

METHOD = {"method": tallstore.TallMask()}
OF_THE_OLD_ONE = {"method": tallstore.SignedMask()}
DENSE = 40  # events from the end, where the bundle is put in its place, that the ordinary run stops at one by one
SPARSE = 5  # before them, every how many


class Place:
    """A directory with a bundle in it, or room for one, and a pack that is to go there."""

    def __init__(self, inputs: tuple[Path, Mapping[str, Path]], root: Path, *, there: bool, exchange: bool = True):
        self.out = root / "place" / "bundle"
        self.job = Job(*inputs, self.out, {**METHOD, "overwrite": there})
        self.conditions = () if exchange else (without_exchange,)
        self.may_be_missing = not there or not exchange
        new = Job(*inputs, root / "new", METHOD)
        new.run()
        self.new, self.old, self.old_bundle = digests(new.out), None, None
        if there:
            old = Job(*inputs, root / "old", OF_THE_OLD_ONE)
            old.run()
            self.old, self.old_bundle = digests(old.out), old.out

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

    def events(self) -> list[int]:
        """Every event of a pack that is not stopped, the end of it included."""
        self.begin()
        outcome = Child(self.job, *self.conditions).outcome()
        assert outcome.exit_code == 0, outcome.error
        assert digests(self.out) == self.new
        assert outcome.events > 2 * DENSE
        return list(range(outcome.events + 1))

    def is_whole(self) -> bool:
        """Whether what is there may be there: the new bundle, the old one, or none."""
        return digests(self.out) in (self.new, self.old) if self.out.exists() else self.may_be_missing

    def pack_again(self) -> None:
        """The next pack succeeds, and leaves nothing beside the bundle."""
        Job(self.job.base, self.job.experts, self.out, {**METHOD, "overwrite": True}).run()
        assert digests(self.out) == self.new
        assert names(self.out.parent) == ["bundle"]


def sampled(events: list[int]) -> list[int]:
    """Those of the ordinary run."""
    return events[:-DENSE:SPARSE] + events[-DENSE:]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_inputs(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Experts of 32 MB, which take long enough to pack for a random moment to be in the midst of it."""
    return large_inputs(tmp_path_factory.mktemp("large"), tensors=8, numel=1 << 20)


@pytest.fixture(scope="module", autouse=True)
def inputs_are_not_modified(small, large):
    """Whatever these tests do."""
    roots = [base.parent for base, _ in (small, large)]
    before = [digests(root) for root in roots]
    yield
    assert [digests(root) for root in roots] == before


@pytest.fixture(
    params=[{"there": False}, {"there": True}, {"there": True, "exchange": False}],
    ids=["a free place", "over a bundle", "over a bundle in two steps"],
)
def place(small, tmp_path, request):
    return Place(small, tmp_path, **request.param)


@pytest.mark.parametrize("choose", [sampled, pytest.param(list, marks=pytest.mark.slow)])
def test_killed_just_before_any_file_operation(place, choose):
    for event in choose(place.events()):
        outcome = place.stop(event, signal.SIGKILL)
        assert place.is_whole(), f"event {event}"
        if outcome.exit_code == 0:
            break
        assert outcome.exit_code == -signal.SIGKILL
        place.pack_again()
    else:
        pytest.fail("no pack was left to finish")


@pytest.mark.parametrize("choose", [sampled, pytest.param(list, marks=pytest.mark.slow)])
def test_interrupted_just_before_any_file_operation(place, choose):
    """Ctrl-C leaves nothing behind, not even what the next pack would remove."""
    for event in choose(place.events()):
        outcome = place.stop(event, signal.SIGINT)
        assert place.is_whole(), f"event {event}"
        assert names(place.out.parent) in ([], ["bundle"]), f"event {event}"
        assert place.out.exists() or place.old is None, f"event {event}"
        if outcome.exit_code == 0:
            break
        assert outcome.error is not None
        assert outcome.error[0] is KeyboardInterrupt, f"event {event}"
    else:
        pytest.fail("no pack was left to finish")


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
