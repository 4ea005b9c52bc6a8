"""Packing on somebody's executor: the same bytes, errors as they are, and nothing half-made where a worker dies."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tallstore
from tallstore.checkpoints import open_checkpoint
from tallstore.checkpoints.checkpoint import Checkpoint, Origin
from tallstore.errors import NonFiniteError, TallstoreError, WorkerError
from tallstore.packing import job
from tests.packing_cases import METHODS, base_model, contents, experts_of, normal, tuned

BASE = {**base_model(), "second.weight": normal(80, 70, seed=9), "third.weight": normal(90, 66, seed=10)}
EXPERTS = experts_of(BASE, 3)
SPAWN = multiprocessing.get_context("spawn")


def write(root, name, state):
    root.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, root / f"{name}.safetensors")
    return root / f"{name}.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The base and its experts in files; one of them as torch writes it."""
    root = tmp_path_factory.mktemp("inputs")
    experts = {name: write(root, name, state) for name, state in EXPERTS.items()}
    torch.save(EXPERTS["b"], root / "b.pt")
    return write(root, "base", BASE), {**experts, "b": root / "b.pt"}


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        yield pool


@pytest.fixture
def small_units(monkeypatch):
    """A unit a tensor, about."""
    monkeypatch.setattr(job, "_UNIT_NUMEL", 15_000)


@pytest.mark.parametrize("name", METHODS)
def test_processes_write_the_same_bytes(tmp_path, files, processes, small_units, name):
    base, experts = files
    for out, executor in (("here", None), ("there", processes)):
        tallstore.pack(base, experts, tmp_path / out, method=METHODS[name], executor=executor)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert tallstore.verify(tmp_path / "there") == []


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("numel", [0, 15_000, 1 << 22])
def test_whatever_the_number_of_workers_and_the_size_of_the_units(tmp_path, monkeypatch, files, count, numel):
    base, experts = files
    tallstore.pack(base, experts, tmp_path / "here")
    monkeypatch.setattr(job, "_UNIT_NUMEL", numel)
    tallstore.pack(base, experts, tmp_path / "tiles")
    with ThreadPoolExecutor(count) as threads:
        tallstore.pack(base, experts, tmp_path / "there", executor=threads)
    assert contents(tmp_path / "tiles") == contents(tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_whatever_the_number_of_processes(tmp_path, files, small_units, count):
    base, experts = files
    tallstore.pack(base, experts, tmp_path / "here")
    with ProcessPoolExecutor(count, mp_context=SPAWN) as pool:
        tallstore.pack(base, experts, tmp_path / "there", executor=pool)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="nothing forks here")
def test_forked_processes_write_the_same_bytes(tmp_path, files, small_units):
    base, experts = files
    tallstore.pack(base, experts, tmp_path / "here")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        tallstore.pack(base, experts, tmp_path / "there", executor=pool)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_state_dicts_go_with_the_work(tmp_path, processes, small_units):
    """Among them tied tensors, views, and what is not contiguous."""
    tied = normal(90, 70, seed=11)
    base = {**BASE, "tied": tied, "tied too": tied, "view": normal(140, 150, seed=12).T[:100]}
    experts = {name: tuned(base, seed) for seed, name in enumerate("ab")}
    experts["a"]["tied too"] = experts["a"]["tied"]
    experts["a"]["view"] = experts["a"]["view"].T.contiguous().T
    for out, executor in (("here", None), ("there", processes)):
        tallstore.pack(base, experts, tmp_path / out, executor=executor)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_resized_private_and_unknown_tensors(tmp_path, processes, small_units):
    experts = {
        "a": {
            **EXPERTS["a"],
            "embed.weight": torch.cat([EXPERTS["a"]["embed.weight"], normal(7, 20)]),
            "head": normal(5),
        },
        "b": EXPERTS["b"],
    }
    for out, executor in (("here", None), ("there", processes)):
        tallstore.pack(BASE, experts, tmp_path / out, private="norm*", compress=False, executor=executor)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_masks_over_somebody_elses_merge(tmp_path, files, processes, small_units):
    """One that lacks a tensor."""
    base, experts = files
    merged = {name: value for name, value in tuned(BASE, 7).items() if name != "second.weight"}
    path = write(tmp_path, "merged", merged)
    for out, executor in (("here", None), ("there", processes)):
        tallstore.pack(base, experts, tmp_path / out, method=tallstore.TallMask(merge=path), executor=executor)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_auto_packs_on_it_too(tmp_path, files, processes, small_units):
    base, experts = files
    for out, executor in (("here", None), ("there", processes)):
        tallstore.pack(base, experts, tmp_path / out, method=tallstore.Auto(max_bits=3), executor=executor)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_dry_run_writes_nothing(tmp_path, files, processes):
    base, experts = files
    report = tallstore.pack(base, experts, tmp_path / "out", dry_run=True, executor=processes)
    assert report.bundle_nbytes > 0
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_all_of_it(tmp_path, files, processes, small_units):
    base, experts = files
    told = []
    tallstore.pack(base, experts, tmp_path / "out", executor=processes, progress=lambda *done: told.append(done))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    assert len(told) > 3


# --- errors -----------------------------------------------------------------------------------------------------------


class Rogue(Checkpoint):
    """Reads zeros in the process that made it, and in any other does what it was told to."""

    def __init__(self, like, action):
        super().__init__(Origin("a rogue"), {name: like.spec(name) for name in like.names})
        self._home, self._action = os.getpid(), action

    def _flat_bytes(self, name, start, stop):
        if os.getpid() != self._home:
            if self._action == "die":
                os._exit(9)
            raise RuntimeError("two\nlines.")
        spec = self.spec(name)
        return np.zeros((stop - start) * (spec.nbytes // max(1, spec.numel)), np.uint8)

    def _release(self):
        pass


@pytest.mark.parametrize(("action", "said"), [("die", "BrokenProcessPool"), ("raise", "RuntimeError: two")])
def test_a_worker_that_does_not_come_back_is_one_line_and_leaves_nothing(tmp_path, files, action, said):
    base, experts = files
    rogue = Rogue(open_checkpoint(base), action)
    with (
        ProcessPoolExecutor(1, mp_context=SPAWN) as pool,
        pytest.raises(WorkerError, match=rf"\Aexecutor: a unit of work did not come back \({said}[^\n]*\Z"),
    ):
        tallstore.pack(base, {**experts, "a": rogue}, tmp_path / "out", executor=pool)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_sent_is_said(tmp_path, files, processes):
    base, experts = files
    rogue = Rogue(open_checkpoint(base), lambda: None)  # no lambda can be pickled
    with pytest.raises(WorkerError, match="pickle"):
        tallstore.pack(base, {**experts, "a": rogue}, tmp_path / "out", executor=processes)
    assert list(tmp_path.iterdir()) == []


def test_an_executor_that_was_shut_down_is_said(tmp_path, files):
    base, experts = files
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(WorkerError, match="RuntimeError: cannot schedule new futures"):
        tallstore.pack(base, experts, tmp_path / "out", executor=pool)
    assert list(tmp_path.iterdir()) == []


def test_an_input_error_of_a_worker_is_the_same_as_here(tmp_path, files, processes):
    base, experts = files
    broken = {**EXPERTS["a"], "second.weight": torch.full((80, 70), torch.nan)}
    experts = {**experts, "a": write(tmp_path / "in", "broken", broken)}
    found = []
    for executor in (None, processes):
        with pytest.raises(NonFiniteError) as caught:
            tallstore.pack(base, experts, tmp_path / "out", executor=executor)
        found.append((str(caught.value), caught.value.where, caught.value.problem))
    assert found[0] == found[1]
    assert not (tmp_path / "out").exists()


class StoppedError(Exception):
    """A worker died here."""


class Stopping(Checkpoint):
    """Another checkpoint, until one of its reads stops the work for once."""

    def __init__(self, like, at):
        super().__init__(Origin("a checkpoint that stops"), {name: like.spec(name) for name in like.names})
        self._like, self._left = like, at

    def _flat_bytes(self, name, start, stop):
        self._left -= 1
        if not self._left:
            raise StoppedError
        return self._like.read_bytes(name, start, stop)

    def _release(self):
        self._like.close()


class Again(Executor):
    """Does work that was stopped once more, as Dask and Ray do where a worker dies."""

    def __init__(self):
        self.stops = 0

    def submit(self, function, /, *arguments, **keywords):
        future = Future()
        try:
            result = function(*arguments, **keywords)
        except StoppedError:
            self.stops += 1
            result = function(*arguments, **keywords)
        future.set_result(result)
        return future


@pytest.mark.parametrize("at", [1, 4, 9, 12])
def test_work_that_was_half_done_can_be_done_again(tmp_path, files, at):
    """Nothing of the first attempt is left, whatever it had written."""
    base, experts = files
    tallstore.pack(base, experts, tmp_path / "here")
    executor = Again()
    stopping = Stopping(open_checkpoint(experts["a"]), at)
    tallstore.pack(base, {**experts, "a": stopping}, tmp_path / "there", executor=executor)
    assert executor.stops == 1
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert tallstore.verify(tmp_path / "there") == []


class Elsewhere(Executor):
    """A worker of another machine, which has no such directories."""

    def submit(self, function, /, unit):
        future = Future()
        try:
            function(replace(unit, file=unit.file.parent / "elsewhere" / unit.file.name))
        except TallstoreError as error:
            future.set_exception(error)
        return future


def test_storage_that_a_worker_does_not_see_is_said(tmp_path, files):
    base, experts = files
    with pytest.raises(
        WorkerError, match=r"\Aexecutor: a worker does not see .*; write the bundle to storage that all"
    ):
        tallstore.pack(base, experts, tmp_path / "out", executor=Elsewhere())
    assert list(tmp_path.iterdir()) == []


class Backwards(Executor):
    """Runs what it was given when the last of it is asked for, last things first."""

    def __init__(self):
        self.left = []

    def submit(self, function, /, *arguments, **keywords):
        future = Later(self)
        self.left.append((future, function, arguments, keywords))
        return future


class Later(Future):
    def __init__(self, executor):
        super().__init__()
        self.executor = executor

    def result(self, timeout=None):
        while self.executor.left:
            future, function, arguments, keywords = self.executor.left.pop()
            future.set_running_or_notify_cancel()
            try:
                future.set_result(function(*arguments, **keywords))
            except TallstoreError as error:
                future.set_exception(error)
        return super().result(timeout)


def test_the_order_in_which_units_are_done_does_not_matter(tmp_path, files, small_units):
    base, experts = files
    for out, executor in (("here", None), ("there", Backwards())):
        tallstore.pack(base, experts, tmp_path / out, executor=executor)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
