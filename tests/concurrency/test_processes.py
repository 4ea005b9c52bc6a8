"""Forked and spawned processes that take a bundle with them: as if they had opened it themselves."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import tallstore
from tallstore.loading import expert as expert_module
from tallstore.loading.kernels import Kernels, kernels
from tests.concurrency.loads import (
    PATIENCE,
    Experts,
    all_ways,
    buffers,
    digest,
    forked,
    in_a_process,
    model_of,
    state_dict,
)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def context(request):
    """Spawned processes import torch, which takes seconds: of those, the ordinary run has few."""
    return multiprocessing.get_context(request.param)


@pytest.fixture
def spawned():
    return multiprocessing.get_context("spawn")


@pytest.fixture(params=[False, True], ids=["cold", "warm"])
def opened(request, bundle_of_either):
    """A bundle before and after something was read of it."""
    with bundle_of_either.open() as bundle:
        if request.param:
            all_ways(bundle, bundle_of_either.expected, 0)
        yield bundle


def test_processes_load_what_their_parent_loads_meanwhile(opened, bundle_of_either, context):
    load_together(opened, bundle_of_either.expected, context, 4)


def test_two_spawned_processes(kinds, spawned):
    with kinds.open() as bundle:
        load_together(bundle, kinds.expected, spawned, 2)


def load_together(opened, expected, context, count):
    processes = [context.Process(target=in_a_process, args=(opened, expected, seed)) for seed in range(count)]
    for process in processes:
        process.start()
    all_ways(opened, expected, 9)
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * count


@contextlib.contextmanager
def busy(work, count: int = 3):
    """A block in which threads do *work* over and over."""
    over = threading.Event()

    def run():
        while not over.wait(0.002):  # long enough for a fork to get a lock that is taken all the time
            work()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE)


LOADS_AND_FORKS = """
import os, sys
import torch
import tallstore

torch.set_num_threads(2)
with tallstore.open_bundle(sys.argv[1], base=sys.argv[2]) as bundle:
    task = bundle.tasks[0]
    before = bundle.state_dict(task)
    child = os.fork()
    if not child:
        after = bundle.state_dict(task)
        os._exit(not all(torch.equal(after[name], before[name]) for name in before))
    sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_waits_for_no_thread_that_it_has_not(chunks):
    """A load in the parent has made torch begin its threads; who forks then need not know of them."""
    command = [sys.executable, "-c", LOADS_AND_FORKS, chunks.path, chunks.base]
    subprocess.run(command, check=True, timeout=PATIENCE, env={**os.environ, "TALLSTORE_COMPILE": "0"})


@pytest.mark.parametrize("forks", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_a_fork_at_any_moment_of_loads_in_other_threads(kinds, intra_op_threads, forks):
    """Whatever locks they hold, whatever they have half opened."""

    def load():
        bundle.close()
        for task in kinds.expected:
            state_dict(bundle, task)

    def load_in_child():
        torch.set_num_threads(1)  # as a worker of DataLoader does
        for task, expected in kinds.expected.items():
            assert state_dict(bundle, task) == expected

    with kinds.open() as bundle, busy(load):
        for _ in range(forks):
            assert forked(load_in_child) == 0


@pytest.mark.parametrize("forks", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_fork_waits_for_the_compiler(chunks, monkeypatch, forks):
    """A child that is forked in the midst of compiling finds LLVM free to compile the same."""
    pytest.importorskip("llvmlite")
    monkeypatch.setenv("TALLSTORE_COMPILE", "1")
    task, expected = next(iter(chunks.expected.items()))

    from tallstore.loading import decode_llvm  # noqa: PLC0415 - an extra

    kept = []

    def compile_all():
        kept.extend(kernels._found.values())  # none is ever freed, which takes a lock of LLVM's, too
        kernels._found.clear()
        decode_llvm.kernel_of.cache_clear()
        state_dict(bundle, task)

    def load_in_child():
        torch.set_num_threads(1)
        compile_all()
        assert state_dict(bundle, task) == expected
        assert any(kernels._found.values())

    with chunks.open() as bundle, busy(compile_all, 1):
        for _ in range(forks):
            assert forked(load_in_child) == 0
    kernels._found.clear()


def test_what_was_compiled_before_a_fork_works_behind_it(chunks, monkeypatch):
    pytest.importorskip("llvmlite")
    monkeypatch.setenv("TALLSTORE_COMPILE", "1")
    monkeypatch.setattr(expert_module, "kernels", Kernels())
    with chunks.open() as bundle:
        all_ways(bundle, chunks.expected, 0)
        monkeypatch.setenv("TALLSTORE_COMPILE", "0")
        assert forked(partial(all_ways, bundle, chunks.expected, 1)) == 0


def test_a_switcher_goes_on_in_a_forked_process(chunks):
    """With a thread of its own that reads ahead, and the models apart."""
    with chunks.open() as bundle:
        tasks = list(chunks.expected)
        model = model_of(bundle.state_dict(tasks[0]))
        switcher = bundle.attach(model)
        switcher.prefetch(tasks[1]).result(PATIENCE)

        def switch_in_child():
            for task in tasks:
                switcher.prefetch(task).result(PATIENCE)
                switcher.set_expert(task)
                assert digest(buffers(model)) == chunks.expected[task]

        with switcher.using(tasks[0]):
            assert forked(switch_in_child) == 0
            assert digest(buffers(model)) == chunks.expected[tasks[0]]
        assert switcher.active_expert is None


def test_a_block_that_a_fork_is_in_ends_in_both_processes(chunks):
    with chunks.open() as bundle:
        model = model_of(bundle.state_dict(next(iter(chunks.expected))))
        switcher = bundle.attach(model)

        def leave_and_switch():
            block.__exit__(None, None, None)
            switcher.set_expert(next(iter(chunks.expected)))

        block = switcher.using(None)
        block.__enter__()
        assert forked(leave_and_switch) == 0
        block.__exit__(None, None, None)


def test_workers_of_a_data_loader(opened, bundle_of_either, context):
    assert_two_workers(opened, bundle_of_either.expected, context)


def test_spawned_workers_of_a_data_loader(kinds, spawned):
    with kinds.open() as bundle:
        assert_two_workers(bundle, kinds.expected, spawned)


def assert_two_workers(opened, expected, context):
    loader = DataLoader(
        Experts(opened, 12), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=PATIENCE
    )
    digests = list(expected.values())
    found = list(loader)
    assert [each for _, each in found] == [digests[number % len(digests)] for number in range(12)]
    assert len({pid for pid, _ in found} - {os.getpid()}) == 2


# --- pickled ----------------------------------------------------------------------------------------------------------


def test_a_bundle_is_pickled_as_what_to_open(chunks, monkeypatch, tmp_path):
    """Relative paths too, and without anything that was read."""
    monkeypatch.chdir(chunks.path.parent)
    with tallstore.open_bundle(chunks.path.name, base=chunks.base.name, verify="always") as bundle:
        for task in bundle.tasks:
            bundle.state_dict(task)
        pickled, copied = pickle.dumps(bundle), copy.deepcopy(bundle)
    assert len(pickled) < 2000
    monkeypatch.chdir(tmp_path)
    for other in (pickle.loads(pickled), copied):  # noqa: S301 - our own
        with other:
            assert other._verify == "always"
            assert {task: state_dict(other, task) for task in other.tasks} == chunks.expected


def test_a_base_in_memory_travels_with_its_bundle(chunks):
    from safetensors.torch import load_file  # noqa: PLC0415

    with tallstore.open_bundle(chunks.path, base=load_file(chunks.base)) as bundle:
        other = pickle.loads(pickle.dumps(bundle))  # noqa: S301
    assert {task: state_dict(other, task) for task in other.tasks} == chunks.expected


def test_no_token_is_pickled(kinds):
    bundle = tallstore.open_bundle(kinds.path, token="hf_secret")  # noqa: S106
    assert b"hf_secret" not in pickle.dumps(bundle)


def test_a_bundle_that_changed_meanwhile_is_refused(kinds, tmp_path):
    shutil.copytree(kinds.path, tmp_path / "bundle")
    pickled = pickle.dumps(tallstore.open_bundle(tmp_path / "bundle"))
    manifest = tmp_path / "bundle" / "tallstore.json"
    shutil.rmtree(tmp_path / "bundle")
    with pytest.raises(tallstore.BundleNotFoundError):
        pickle.loads(pickled)  # noqa: S301
    base = {"w": torch.zeros(64, 64)}
    experts = {"a": {"w": torch.ones(64, 64)}, "b": {"w": torch.randn(64, 64)}}
    tallstore.pack(base, experts, manifest.parent, embed_base=True)
    with pytest.raises(tallstore.BundleChangedError, match="changed after it was opened; open it again"):
        pickle.loads(pickled)  # noqa: S301


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_switcher_says_why_it_cannot_be_sent(kinds, send):
    model = nn.Module()
    model.register_buffer("mask", torch.zeros(7, 5))
    with (
        kinds.open() as bundle,
        pytest.raises(tallstore.OptionError, match="send the bundle, and attach a model to it"),
    ):
        send(bundle.attach(model))
