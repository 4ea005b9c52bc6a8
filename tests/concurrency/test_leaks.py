"""Ten thousand loads later, a process holds what it held after the first ones: files, threads, memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tallstore
from tallstore.format import bundle_files
from tallstore.loading import resident
from tests.concurrency.loads import WAYS, buffers, digest, model_of, state_dict
from tests.few_files import few_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux what a process holds")

_LOG = logging.getLogger(__name__)  # --log-cli-level=INFO shows the figures
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
COUNTS = [300, pytest.param(10_000, marks=pytest.mark.slow)]


class Held(NamedTuple):
    """What a process holds; bytes of memory, and those of Python's objects."""

    files: int
    mappings: int
    threads: int
    memory: int
    objects: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        return cls(
            len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - fewer objects than pathlib
            Path("/proc/self/maps").read_bytes().count(b"\n"),
            threading.active_count(),
            int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE,
            tracemalloc.get_traced_memory()[0],
        )


@contextlib.contextmanager
def nothing_grows(work: Callable[[int], object], count: int, what: str) -> Iterator[None]:
    """Do *work* so many times: of five parts, one at least holds no more at its end than at its beginning.

    What allocators and libraries keep of their own grows when it will, by turns; a leak grows all the time.
    """
    yield
    if count >= 1000:  # it makes all that Python does take several times as long
        tracemalloc.start()
    held = []
    try:
        for number in range(count):
            work(number)
            if (number + 1) % (count // 5) == 0:
                held.append(Held.now())
    finally:
        tracemalloc.stop()
    _LOG.info("%s, %s times: %s, then %s", what, count, held[0], held[-1])
    parts = [Held(*(after - before for before, after in zip(*ends, strict=True))) for ends in pairwise(held)]
    assert held[-1].files <= held[0].files, held
    assert held[-1].threads <= held[0].threads, held
    assert min(part.mappings for part in parts) <= 1, held
    assert min(part.objects for part in parts) <= 20_000, held
    assert min(part.memory for part in parts) <= 1 << 20, held


@pytest.mark.parametrize("count", COUNTS)
def test_loads(kinds, intra_op_threads, count):
    ways, tasks = list(WAYS.values()), list(kinds.expected)
    with kinds.open() as bundle:

        def load(number):
            task = tasks[number % len(tasks)]
            assert ways[number % len(ways)](bundle, task) == kinds.expected[task]

        with nothing_grows(load, count, "loads, one way after another"):
            pass


@pytest.mark.parametrize("verify", ["first-read", "always"])
@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_loads_of_several_chunks(chunks, intra_op_threads, verify, count):
    tasks = list(chunks.expected)
    with (
        chunks.open(verify=verify) as bundle,
        nothing_grows(lambda number: bundle.state_dict(tasks[number % 2]), count, "loads of 8 MB"),
    ):
        pass


@pytest.mark.parametrize("count", COUNTS)
def test_bundles_that_are_opened_closed_or_forgotten(kinds, count):
    def load(number):
        bundle = kinds.open()
        bundle.tensor("all", "mask")
        if number % 2:
            bundle.close()

    with nothing_grows(load, count, "bundles opened"):
        pass


@pytest.mark.parametrize("count", COUNTS)
def test_refused_loads(kinds, tmp_path, count):
    """Errors hold on to nothing."""
    path = kinds.path / "tasks/all/mask-00001-of-00001.safetensors"
    content = path.read_bytes()

    def load(_number):
        with kinds.open() as bundle, pytest.raises(tallstore.IntegrityError):
            bundle.state_dict("all")

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with nothing_grows(load, count, "loads refused"):
            pass
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("count", COUNTS)
def test_switches(chunks, intra_op_threads, count):
    tasks = [*chunks.expected, None]
    with chunks.open() as bundle:
        model = model_of(bundle.state_dict(tasks[0])).requires_grad_(False)
        switcher = bundle.attach(model, cache_nbytes=0)

        def switch(number):
            if number % 7 == 0:
                switcher.prefetch(tasks[number % 2]).result()
            switcher.set_expert(tasks[number % 3])

        with nothing_grows(switch, count, "switches"):
            pass
        for task, expected in chunks.expected.items():
            switcher.set_expert(task)
            assert digest(buffers(model)) == expected


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_switchers_that_come_and_go(kinds, count):
    """Each with a thread that reads ahead, and with mappings of the base."""
    with kinds.open() as bundle:
        whole = bundle.state_dict("few")

        def attach(_number):
            switcher = bundle.attach(model_of(whole), strict=False)
            switcher.prefetch("few").result()
            switcher.set_expert("few")

        with nothing_grows(attach, count, "switchers"):
            pass


def test_recent_things_are_bounded(kinds, monkeypatch):
    """Tables and shards of more tasks than stay."""
    monkeypatch.setattr(bundle_files, "_MAX_OPEN_SHARDS", 2)
    monkeypatch.setattr(bundle_files, "_MAX_TABLES", 1)
    with kinds.open() as bundle:
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for task, expected in list(kinds.expected.items()) * 3:
            assert state_dict(bundle, task) == expected
            gc.collect()
            assert len(os.listdir("/proc/self/fd")) <= files + 2  # noqa: PTH208
            assert len(bundle._files._shards._items) <= 2
            assert len(bundle._files._tasks._items) <= 1


def test_models_share_the_mappings_that_a_process_may_have(tmp_path, monkeypatch):
    """Each mapping takes a descriptor: so many models over one base would have more than a process may open."""
    base = {f"w{number}": torch.full((1 << 16,), float(number)) for number in range(40)}
    tallstore.pack(
        base,
        {"a": {name: weight + 1 for name, weight in base.items()}},
        tmp_path / "bundle",
        method=tallstore.Sign(),
        embed_base=True,
    )
    gc.collect()
    assert resident._mappings._count == 0
    with few_files(monkeypatch, 60), tallstore.open_bundle(tmp_path / "bundle") as bundle:
        models = [model_of(base) for _ in range(8)]
        switchers = [bundle.attach(model) for model in models]
        for switcher, model in zip(switchers, models, strict=True):
            switcher.set_expert("a")
            assert digest(buffers(model)) == state_dict(bundle, "a")
        assert 0 < resident._mappings._count <= resident._most_held()
    del switcher, switchers
    gc.collect()
    assert resident._mappings._count == 0
