"""A process that may hold few files open."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tallstore.format import bundle_files


@contextlib.contextmanager
def few_files(monkeypatch: pytest.MonkeyPatch, count: int = 20) -> Iterator[None]:
    """A block in which a further file beyond *count* cannot be opened, and bundles keep four shards open."""
    resource = pytest.importorskip("resource", reason="needs a limit on open files")
    monkeypatch.setattr(bundle_files, "_MAX_OPEN_SHARDS", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as free:  # what else this process has open may be anywhere between
        numbers = [free.enter_context(open(os.devnull)).fileno() for _ in range(count)]  # noqa: PTH123 - numbers count
    resource.setrlimit(resource.RLIMIT_NOFILE, (numbers[-1] + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
