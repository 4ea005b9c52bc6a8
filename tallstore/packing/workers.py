"""Threads that tiles and tasks are spread over.

Small torch operations on several intra-op threads contend with each other, and with whatever else the machine does;
whole tiles on threads of one intra-op thread each do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch may use, each with one intra-op thread; what is pending on an error is dropped."""
    count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "tallstore", torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)  # a thread's setting is also what later threads begin with
