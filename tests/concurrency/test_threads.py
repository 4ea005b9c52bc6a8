"""Threads that share a bundle get what one thread gets, whatever they load, in whatever way, whoever comes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tallstore.loading import expert as expert_module
from tallstore.loading.kernels import Kernels
from tests.concurrency.loads import PATIENCE, WAYS, all_ways, state_dict, switches

THREADS = 8


def at_once(jobs: Sequence[Callable[[], object]]) -> None:
    """Run jobs, each in a thread of its own, begun at the same moment; raise what one raised."""
    begun = threading.Barrier(len(jobs))

    def run(job):
        begun.wait(PATIENCE)
        job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        for done in [threads.submit(run, job) for job in jobs]:
            done.result(PATIENCE)


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_threads_load_different_and_equal_tasks_in_every_way(bundle_of_either, intra_op_threads, is_warm, rounds):
    with bundle_of_either.open() as bundle:
        if is_warm:
            all_ways(bundle, bundle_of_either.expected, 0)
        at_once([partial(all_ways, bundle, bundle_of_either.expected, seed, rounds) for seed in range(THREADS)])


@pytest.mark.parametrize("way", WAYS)
def test_threads_that_all_come_first_to_the_same_task(kinds, way):
    """Tables, shards and the base are opened by whoever comes first, and the others find them."""
    for task, expected in kinds.expected.items():
        with kinds.open() as bundle:
            found = []
            at_once([lambda: found.append(WAYS[way](bundle, task))] * THREADS)  # noqa: B023 - done before the next
            assert found == [expected] * THREADS


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_compiled_functions_are_compiled_once_and_shared(chunks, intra_op_threads, monkeypatch, compiled):
    monkeypatch.setenv("TALLSTORE_COMPILE", compiled)
    monkeypatch.setattr(expert_module, "kernels", Kernels())
    with chunks.open() as bundle:
        at_once([partial(all_ways, bundle, chunks.expected, seed) for seed in range(THREADS // 2)])


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_a_switcher_a_thread_over_one_bundle(bundle_of_either, intra_op_threads, count):
    with bundle_of_either.open() as bundle:
        at_once([partial(switches, bundle, bundle_of_either.expected, seed, count) for seed in range(THREADS)])


@pytest.mark.parametrize("times", [30, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_bundle_that_is_closed_while_others_load(bundle_of_either, intra_op_threads, times):
    bundle = bundle_of_either.open()
    closed, loaded = [], []

    def close():
        while len(loaded) < times:
            bundle.close()
            closed.append(1)
            time.sleep(0.0005)

    def load(task):
        while len(loaded) < times or len(closed) < times // 10:
            assert state_dict(bundle, task) == bundle_of_either.expected[task]
            loaded.append(1)

    tasks = list(bundle_of_either.expected)
    at_once([close, *(partial(load, tasks[number % len(tasks)]) for number in range(4))])
