"""Many jobs on a few threads, which stay for the next ones.

Small torch operations on several intra-op threads contend with each other, and with whatever else the machine does;
whole chunks on threads of one intra-op thread each do not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeAlias

import torch

Job: TypeAlias = Callable[[], None]

_MOST_THREADS: Final = 16  # between its operations a thread holds the interpreter's lock: more would wait for it


def run(jobs: Iterable[Job]) -> None:
    """Run *jobs*, on as many threads as torch may use. They must not write to the same memory.

    The iterable is gone through in the calling thread, and so is a single job.

    Raises:
        Exception: the first one in the order of *jobs*, raised by a job or by the iterable itself, when no job is
            running any more. Jobs behind it were run then, or not.
    """
    count = min(torch.get_num_threads(), _MOST_THREADS)
    if count < 2:
        for job in jobs:
            job()
        return
    remaining = iter(jobs)
    first = next(remaining, None)
    if first is None:
        return
    try:
        second = next(remaining, None)
    except Exception:
        first()
        raise
    if second is None:
        first()
    else:
        _run(itertools.chain((first, second), remaining), _shared.threads(count), count)


def _run(jobs: Iterator[Job], threads: ThreadPoolExecutor, count: int) -> None:
    inference = torch.is_inference_mode_enabled()
    ahead = threading.Semaphore(2 * count)  # an error finds few jobs begun behind it
    pending = deque[Future[None]]()

    def collect(*, wait: bool) -> None:
        while pending and (wait or pending[0].done()):
            pending[0].result()
            pending.popleft()

    try:
        while True:
            try:
                job = next(jobs, None)
            except Exception:
                collect(wait=True)  # what went wrong before it
                raise
            if job is None:
                break
            ahead.acquire()
            pending.append(threads.submit(_run_one, job, inference))
            pending[-1].add_done_callback(lambda _: ahead.release())
            collect(wait=False)
        collect(wait=True)
    finally:
        Begun(pending).abandon()


def _run_one(job: Job, inference: bool) -> None:  # noqa: FBT001 - what torch calls it
    """Run a job in the mode that the thread was in which asked for it: the mode is a thread's own."""
    with torch.inference_mode(inference):
        job()


def begin(jobs: Iterable[Job]) -> Begun:
    """Begin what `run` does, and return; where there is one thread only, the jobs are done then.

    Raises:
        Exception: raised by the iterable, when no job is running any more; where there is one thread, also by a job.
    """
    count = min(torch.get_num_threads(), _MOST_THREADS)
    if count < 2:
        run(jobs)
        return Begun([])
    threads, inference = _shared.threads(count), torch.is_inference_mode_enabled()
    begun: list[Future[None]] = []
    try:
        begun.extend(threads.submit(_run_one, job, inference) for job in jobs)
    except BaseException:
        Begun(begun).abandon()
        raise
    return Begun(begun)


class Begun:
    """Jobs that were begun."""

    def __init__(self, futures: Sequence[Future[None]]) -> None:
        self._futures = futures

    def finish(self) -> None:
        """Wait until all are done.

        Raises:
            Exception: the first one in the order of the jobs, when none is running any more.
        """
        try:
            for future in self._futures:
                future.result()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Run none that is not running; wait for those that are."""
        for future in [future for future in self._futures if not future.cancel()]:
            future.exception()  # waits for its end


@contextlib.contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch may use, each with one intra-op thread; what is pending on an error is dropped."""
    pool = _begin(torch.get_num_threads())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def one_intra_op_thread() -> Iterator[None]:
    """In the calling thread, which may be anybody's; what it was before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Threads:
    """This process's threads, begun when they are first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._count = 0

    def threads(self, count: int) -> ThreadPoolExecutor:
        """*count* threads of one intra-op thread each."""
        with self._lock:
            if self._threads is None or self._count != count:
                self._threads, self._count = _begin(count), count  # the others end when nothing runs there any more
            return self._threads

    def forget(self) -> None:
        """Begin anew, in a forked process: the threads are its parent's."""
        self._lock, self._threads = threading.Lock(), None


def _use_one_intra_op_thread() -> None:
    torch.get_num_threads()  # a thread that asks for the first time is given the process's number
    torch.set_num_threads(1)


def _begin(count: int) -> ThreadPoolExecutor:
    """All at once: what one sets in torch is also what threads begin with that come later."""
    before = torch.get_num_threads()
    threads = ThreadPoolExecutor(count, "tallstore", _use_one_intra_op_thread)
    begun = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            threads.submit(begun.wait)
        begun.wait()
    finally:
        begun.abort()
        torch.set_num_threads(before)
    return threads


_shared: Final = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forget)
