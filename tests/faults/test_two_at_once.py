"""Two writers of one place at once, and readers meanwhile: one is told who is there, the others see old or new."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import sys
import time
from pathlib import Path

import pytest

import tallstore
from tallstore.errors import OutputBusyError, TallstoreError
from tests.faults import operations
from tests.faults.bundles import Weights, same
from tests.faults.children import Child, Outcome, stop_at
from tests.faults.operations import Operation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sees in /proc that a process has stopped")

#: Writers of one bundle that was there before.
OF_A_BUNDLE = tuple(name for name in operations.NAMES if name.startswith(("pack over", "pull more", "pull over")))
GROWING = tuple(name for name in operations.NAMES if name.startswith(("add", "remove", "repack")))
PAIRS = [
    (first, second)
    for kind in (OF_A_BUNDLE, (*GROWING, "pack over a bundle"))
    for first in kind
    for second in kind
    if "two steps" not in second
]
EXPORT = ("export over an export", "export over an export")
SOMEBODY = "somebody else is writing it; wait, or choose another place"


class Stopped:
    """An operation whose process stands still just before one of its file operations, until the block ends."""

    def __init__(self, operation: Operation, event: int) -> None:
        self._operation, self._event = operation, event
        self.outcome: Outcome | None = None

    def __enter__(self) -> Child:
        self._child = self._operation.start(functools.partial(stop_at, self._event, signal.SIGSTOP))
        self._child.wait_until_it_starts()
        status = Path(f"/proc/{self._child.process.pid}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            assert self._child.process.is_alive()
            time.sleep(0.001)
        return self._child

    def __exit__(self, *_error: object) -> None:
        self._child.send(signal.SIGCONT)
        self.outcome = self._child.outcome()


def ordinary(pair: tuple[str, str]) -> object:
    """The pair; of those of the bundle's writers only that the ordinary run has all of."""
    names = [parameter for parameter in operations.some() if isinstance(parameter, str)]
    return pair if all(name in names for name in pair) else pytest.param(*pair, marks=pytest.mark.slow)


def moments(operation: Operation) -> list[int]:
    """File operations just before which it holds its place: one soon after it took it, some later, the last change."""
    events = operation.learn().events
    taken = events.index("fcntl.flock") + 8
    last = max(number for number, event in enumerate(events) if event == "os.rename")
    return [taken, (taken + last) // 2, last - 1, last]


@pytest.mark.parametrize(("first", "second"), [EXPORT, *map(ordinary, dict.fromkeys(PAIRS))])
def test_the_second_writer_is_told_who_is_there(operate, first, second):
    """The first finishes undisturbed, whatever the second wants to do with the place."""
    one, other = operate(first), operate(second)
    event = moments(one)[1]
    one.begin()
    with (stopped := Stopped(one, event)) as child:
        pid = child.process.pid
        error = other.run().error
    assert error is not None
    kind, message = error
    assert kind is OutputBusyError, message
    assert f"process {pid}" in message or not first.startswith("pack")
    assert "\n" not in message
    assert stopped.outcome.error is None
    assert one.is_new()
    assert {path.name for path in one.place.iterdir()} - {"cache"} == {Path(target).parts[0] for target in one.targets}


@pytest.mark.parametrize("name", operations.some(names=(*OF_A_BUNDLE, *GROWING)))
def test_a_reader_meanwhile_sees_the_old_bundle_or_the_new_one(operate, name):
    operation = operate(name)
    times = moments(operation)
    sound = [loaded(operation.place / "bundle")]
    operation.begin()
    sound.append(loaded(operation.place / "bundle"))
    for event in times:
        operation.begin()
        with tallstore.open_bundle(operation.place / "bundle") as before, Stopped(operation, event):
            assert is_sound(lambda: loaded(operation.place / "bundle"), sound)
        assert is_sound(lambda opened=before: {task: opened.state_dict(task) for task in fetched(opened)}, sound)
        assert operation.undone() == []


def fetched(bundle: tallstore.Bundle) -> list[str]:
    return [task for task in bundle.tasks if bundle.is_fetched(task)]


def loaded(path: Path) -> Weights:
    with tallstore.open_bundle(path) as bundle:
        return {task: bundle.state_dict(task) for task in fetched(bundle)}


def is_sound(read, states: list[Weights]) -> bool:
    """Whether what was read is of one state; or the reader was told in one line that it is not there any more."""
    try:
        found = read()
    except TallstoreError as error:
        return "\n" not in str(error)
    return any(found.keys() <= state.keys() and same(found, {task: state[task] for task in found}) for state in states)


def test_a_file_that_somebody_else_is_writing_is_left_alone(operate):
    operation = operate("report over a report")
    operation.learn()
    operation.begin()
    staged = operation.place / "report.html.partial"
    with staged.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        error = operation.run().error
        assert error == (OutputBusyError, f"{operation.place}/report.html: {SOMEBODY}")
        assert operation.is_old()
        assert staged.exists()
    assert operation.run().error is None
    assert operation.undone() == []


def test_a_place_that_is_taken_over_and_over(specimens, tmp_path):
    """Many processes that pack to one place: each packs, or is refused; the bundle is whole all the time."""
    out = tmp_path / "place" / "bundle"
    out.parent.mkdir()
    call = functools.partial(operations.pack, specimens.base, specimens.experts, out)
    children = [Child(call) for _ in range(6)]
    outcomes = [child.outcome() for child in children]
    assert {outcome.error[0] for outcome in outcomes if outcome.error} <= {OutputBusyError}
    assert any(outcome.error is None for outcome in outcomes)
    assert tallstore.verify(out) == []
    assert os.listdir(out.parent) == ["bundle"]  # noqa: PTH208
