"""A thousand tasks in one bundle: opening it, and one task of it, is the work that it is among few, the manifest apart.

Counted, not timed: files that are opened, written, moved and deleted, directories that are listed, bytes that are read.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import tallstore
from tallstore.cli.completion import task_names
from tallstore.format import layout
from tallstore.notebook import MAX_ROWS
from tests.command_line import run
from tests.packing_cases import normal

FEW, MANY = MAX_ROWS, 1000  # more than that is shown of neither
NAME = "task-{:04d}".format


def base_model():
    return {"w": normal(64, 64), "b": normal(7, seed=1)}


def expert(number):
    """The same whatever the others are."""
    return {name: tensor + 0.01 * normal(*tensor.shape, seed=2 + number) for name, tensor in base_model().items()}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A bundle of few tasks and one of a thousand, by the number of their tasks; base included."""
    root = tmp_path_factory.mktemp("many")
    for count in (FEW, MANY):
        experts = {NAME(number): expert(number) for number in range(count)}
        tallstore.pack(base_model(), experts, root / str(count), embed_base=True, compress=False)
    return {count: root / str(count) for count in (FEW, MANY)}


_CHOSEN = re.compile(r"(?<=/.units)-\w+|(?<=/\d{6})-[0-9a-f]+")  # names that are new every time
_EVENTS = {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir"}


class Watch:
    """Counts what is done below a directory, while it is on."""

    def __init__(self):
        self.root, self.events = None, Counter()

    def __call__(self, event, arguments):
        if self.root is not None and event in _EVENTS:
            self.count(event, str(arguments[0]))

    def count(self, event, place):
        if self.root is not None and place.startswith(self.root):
            self.events[event, _CHOSEN.sub("", place.removeprefix(self.root))] += 1


@pytest.fixture(scope="module")
def watch():
    watching = Watch()
    sys.addaudithook(watching)  # for good: switched off, it costs a comparison
    with pytest.MonkeyPatch.context() as patched:
        for name in ("stat", "lstat"):
            patched.setattr(os, name, _counted(watching, name, getattr(os, name)))
        yield watching


def _counted(watching, name, function):
    def call(path, *arguments, **options):
        watching.count(name, str(path))
        return function(path, *arguments, **options)

    return call


@pytest.fixture
def work(bundles, watch):
    """How often files of a bundle are opened and directories listed by a function of its path."""

    def count(function, of):
        root = bundles[of]
        watch.events, watch.root = Counter(), f"{root}/"
        try:
            found = function(root)
        finally:
            watch.root = None
        return watch.events, found

    return count


READS = {
    "open": tallstore.open_bundle,
    "list": lambda path: tallstore.open_bundle(path).tasks,
    "keys": lambda path: tallstore.open_bundle(path).keys(NAME(7)),
    "one tensor": lambda path: tallstore.open_bundle(path).tensor(NAME(7), "w"),
    "load": lambda path: tallstore.open_bundle(path).state_dict(NAME(7)),
    "is fetched": lambda path: tallstore.open_bundle(path).is_fetched(NAME(7)),
    "in a line": lambda path: repr(tallstore.open_bundle(path)),
    "complete": lambda path: task_names(SimpleNamespace(params={"bundle": str(path)}, args=[]), "task-0007"),
    "inspect a task": lambda path: run("inspect", path, "--task", NAME(7)).stdout,
}


@pytest.mark.parametrize("name", READS)
def test_no_more_is_opened_among_a_thousand_tasks_than_among_few(work, name):
    few, _ = work(READS[name], FEW)
    many, _ = work(READS[name], MANY)
    assert few == many
    assert few["open", layout.MANIFEST] <= 2
    touched = {place.split("/")[1] for _, place in few if place.startswith("tasks/")}
    assert touched <= {NAME(7)}


def test_no_more_is_read_than_the_manifest_has_more(bundles):
    extra = []
    for path in bundles.values():
        with tallstore.open_bundle(path) as bundle:
            listed = bundle.bytes_read
            assert listed == (path / layout.MANIFEST).stat().st_size
            bundle.state_dict(NAME(7))
            bundle.state_dict(NAME(8))
            extra.append(bundle.bytes_read - listed)
    few, many = extra
    assert many == pytest.approx(few, rel=0.02)  # numbers in tables have more digits or fewer


def test_a_second_task_opens_its_own_files_alone(bundles, work):
    for count in (FEW, MANY):
        with tallstore.open_bundle(bundles[count]) as bundle:
            bundle.state_dict(NAME(7))
            events, _ = work(lambda _, bundle=bundle: bundle.state_dict(NAME(8)), count)
        opened = {place: times for (event, place), times in events.items() if event == "open"}
        assert {place.rpartition("/")[0] for place in opened} == {f"tasks/{NAME(8)}", "base"}
        assert set(opened.values()) == {1}


CHANGES = {
    "add": lambda path: tallstore.add(path, {"new": expert(5000)}),
    "replace": lambda path: tallstore.add(path, {NAME(7): expert(5000)}, replace=True),
    "remove": lambda path: tallstore.remove(path, [NAME(7)]),
    "add and remove": lambda path: (tallstore.add(path, {"new": expert(5000)}), tallstore.remove(path, ["new"])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_touches_no_more_among_a_thousand_tasks_than_among_few(bundles, watch, tmp_path, name):
    found = {}
    for count, original in bundles.items():
        place = tmp_path / str(count) / "bundle"  # of one name, since a change works beside it too
        shutil.copytree(original, place)
        watch.events, watch.root = Counter(), f"{place.parent}/"
        try:
            CHANGES[name](place)
        finally:
            watch.root = None
        found[count] = watch.events
        touched = {path.split("/")[2] for _, path in watch.events if path.startswith("bundle/tasks/")}
        assert touched <= {NAME(7), "new-g0002", f"{NAME(7)}-g0002"}
    assert found[FEW] == found[MANY]


def test_a_bundle_that_grew_in_groups_is_opened_as_one_that_was_packed(bundles, tmp_path, watch):
    """What is read of a task is its own, and its group's, whatever groups there are."""
    place = shutil.copytree(bundles[MANY], tmp_path / "bundle")
    for number in range(3):
        tallstore.add(place, {f"more-{number}-{task}": expert(2000 + 10 * number + task) for task in range(3)})
    watch.events, watch.root = Counter(), f"{place}/"
    try:
        weights = tallstore.open_bundle(place).state_dict("more-1-2")
    finally:
        watch.root = None
    assert torch.equal(weights["b"], expert(2012)["b"])
    directories = {path.rpartition("/")[0] for event, path in watch.events if event == "open"}
    assert directories == {"", "base", "groups/g0003", "tasks/more-1-2-g0003"}
    assert tallstore.verify(place) == []


def test_as_many_lines_are_shown(work):
    few, many = (work(lambda path: str(tallstore.open_bundle(path)), count) for count in (FEW, MANY))
    assert few[0] == many[0]
    assert len(many[1].splitlines()) == len(few[1].splitlines()) + 1  # that there are more


def test_what_a_notebook_shows_is_of_the_first_tasks(work):
    """As many rows as people look at, and the tables of those alone."""
    events, shown = work(lambda path: tallstore.open_bundle(path)._repr_html_(), MANY)
    assert shown.count(NAME(0)[:5]) == MAX_ROWS
    assert f"and {MANY - MAX_ROWS} more in bundle.tasks" in shown
    assert sum(place.startswith("tasks/") for event, place in events if event == "open") == MAX_ROWS


def test_every_one_of_them_comes_back(bundles):
    with tallstore.open_bundle(bundles[MANY]) as bundle:
        assert bundle.tasks == tuple(map(NAME, range(MANY)))
        for number in (0, 499, 999):
            weights, exact = bundle.state_dict(NAME(number)), expert(number)
            assert torch.equal(weights["b"], exact["b"])
            moved, true = (found["w"] - base_model()["w"] for found in (weights, exact))
            assert torch.cosine_similarity(moved.flatten(), true.flatten(), dim=0) > 0.8
