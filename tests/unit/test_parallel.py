"""parallel: jobs on threads, the first error in their order, and settings that stay as they were."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

import tallstore
from tallstore.errors import IntegrityError
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.safetensors_header import parse_header
from tallstore.loading import parallel, pieces
from tests.bundle_builder import Bundle, Group, Task
from tests.reference import same_bits


@pytest.fixture
def two_threads():
    """As on a machine with two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_job_is_run_once_two_of_them_at_a_time():
    both, done = threading.Barrier(2, timeout=60), []

    def job(number: int) -> None:
        both.wait()
        done.append(number)

    parallel.run(lambda number=number: job(number) for number in range(40))
    assert sorted(done) == list(range(40))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("by_the_iterable", [False, True])
def test_the_first_error_in_order_is_raised_although_a_later_one_came_before(by_the_iterable):
    later_failed = threading.Event()

    def slow() -> None:
        assert later_failed.wait(60)
        raise KeyError("slow")

    def quick() -> None:
        later_failed.set()
        raise ValueError("quick")

    def jobs():
        yield slow
        if by_the_iterable:
            later_failed.set()
            raise ValueError("iterable")
        yield quick
        yield quick

    with pytest.raises(KeyError, match="slow"):
        parallel.run(jobs())


@pytest.mark.usefixtures("two_threads")
def test_nothing_runs_behind_an_error():
    running, count = threading.Semaphore(0), 0

    def fail() -> None:
        running.release()
        raise ValueError("stop")

    def work() -> None:
        nonlocal count
        count += 1

    with pytest.raises(ValueError, match="stop"):
        parallel.run([fail, *[work] * 1000])
    assert running.acquire(timeout=60)
    left = count
    assert left < 1000
    parallel.run([lambda: None] * 4)  # the threads have passed whatever was left for them
    assert count == left


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("inference", [False, True])
def test_jobs_run_in_the_callers_mode_with_one_thread_each(inference):
    found = set()
    with torch.inference_mode(inference):
        parallel.run(
            [lambda: found.add((torch.is_inference_mode_enabled(), torch.get_num_threads()))] * 6,
        )
    assert found == {(inference, 1)}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_threads_that_start_later_have_the_callers_number():
    parallel.run([lambda: None] * 2)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.parametrize("threads", [1, 2])
def test_one_job_or_one_thread_stays_in_the_calling_thread(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        parallel.run([lambda: found.append(threading.get_ident())] * (3 - threads))
    finally:
        torch.set_num_threads(before)
    assert set(found) == {threading.get_ident()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
# --- begun, and finished later ---


@pytest.mark.usefixtures("two_threads")
def test_what_was_begun_is_done_when_it_is_finished():
    gate, done = threading.Event(), []
    begun = parallel.begin([lambda: gate.wait(10), *(partial(done.append, number) for number in range(20))])
    gate.set()
    begun.finish()
    assert sorted(done) == list(range(20))
    parallel.begin([]).finish()


@pytest.mark.usefixtures("two_threads")
def test_the_first_error_of_what_was_begun_is_raised_when_nothing_runs_any_more():
    running, done = threading.Event(), []

    def fail():
        running.wait(10)
        raise ValueError("first")

    def late():
        running.set()
        time.sleep(0.05)
        done.append("late")

    with pytest.raises(ValueError, match="first"):
        parallel.begin([fail, late]).finish()
    assert done == ["late"]


@pytest.mark.usefixtures("two_threads")
def test_what_is_abandoned_is_not_begun_any_more_and_waited_for():
    gate, done = threading.Event(), []

    def slow():
        gate.wait(10)
        time.sleep(0.05)
        done.append("slow")

    begun = parallel.begin([slow, slow, *(partial(done.append, number) for number in range(50))])
    threading.Timer(0.2, gate.set).start()
    begun.abandon()
    assert set(done) <= {"slow"}


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_the_iterable_comes_when_nothing_runs_any_more():
    done = []

    def jobs():
        yield lambda: time.sleep(0.05) or done.append("first")
        raise ValueError("of the iterable")

    with pytest.raises(ValueError, match="of the iterable"):
        parallel.begin(jobs())
    assert done in (["first"], [])


def test_one_thread_has_done_it_when_it_was_begun(monkeypatch):
    monkeypatch.setattr(parallel.torch, "get_num_threads", lambda: 1)
    done = []
    begun = parallel.begin([partial(done.append, threading.get_ident())])
    assert done == [threading.get_ident()]
    begun.finish()


def test_a_forked_process_has_threads_of_its_own():
    program = """
import os, torch
from tallstore.loading import parallel
torch.set_num_threads(2)
done = []
parallel.run([lambda: done.append(1)] * 8)
child = os.fork()
if not child:
    parallel.run([lambda: done.append(1)] * 8)
    os._exit(len(done))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 16
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    subprocess.run(command, check=True, timeout=100)


# --- experts ---


def bundle_of(root, count: int, numel: int) -> tuple[Bundle, dict[str, torch.Tensor]]:
    """A task 't' with small tensors and one of three chunks, and what they are."""
    random = np.random.default_rng(5)
    base = {f"w{number:02}": torch.from_numpy(random.standard_normal(numel + number)) for number in range(count)}
    base["large"] = torch.from_numpy(random.standard_normal(2 * CHUNK_NUMEL + 77)).to(torch.bfloat16)
    group = Group(root, base)
    task = Task(group, "t")
    for name, tensor in base.items():
        if name == "large":
            task.private(name, tensor)
        else:
            group.vector(name, "I8", random.integers(-127, 128, tensor.numel()), steps=[0.5])
            task.signed(name, random.integers(-1, 2, tensor.numel()), gain=1.0)
    return Bundle(root, base, [group], [task]), task.expected


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("job_numel", [1, 500, pieces._JOB_NUMEL])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_an_expert_is_the_same_however_it_is_divided(tmp_path, monkeypatch, job_numel, dtype):
    monkeypatch.setattr(pieces, "_JOB_NUMEL", job_numel)
    built, expected = bundle_of(tmp_path, 30, 60)
    with tallstore.open_bundle(built.seal()) as bundle:
        state = bundle.state_dict("t", dtype=dtype)
        assert list(state) == list(bundle.keys("t"))
        for name, tensor in state.items():
            assert same_bits(tensor, expected[name].to(dtype or tensor.dtype))


@pytest.mark.usefixtures("two_threads")
def test_the_error_is_that_of_the_first_damaged_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_JOB_NUMEL", 1)
    built, _ = bundle_of(tmp_path, 10, 4096)
    root = built.seal()
    (shard,) = (root / "tasks" / "t").glob("mask-*.safetensors")
    raw = bytearray(shard.read_bytes())
    header = parse_header(bytes(raw), len(raw))
    for name in ("w09", "w04", "w06"):
        raw[header.tensors[f"fields/{name}"].start] ^= 0x01
    shard.write_bytes(raw)
    for _ in range(5):
        with tallstore.open_bundle(root) as bundle, pytest.raises(IntegrityError, match="w04"):
            bundle.state_dict("t")
