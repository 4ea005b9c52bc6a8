"""Pushes in a client's process: what became of each, and all that was said meanwhile."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tallstore
from tallstore.hub import repository


@dataclass
class Outcome:
    """What a push returned or raised.

    Attributes:
        oid, message, pr_url: of the commit; oid is None where there is none.
        error, problem: the class and message of what was raised.
        progress: what was told.
        warnings: their texts.
        said: log records down to DEBUG, and the traceback.
    """

    oid: str | None = None
    message: str | None = None
    pr_url: str | None = None
    error: str | None = None
    problem: str = ""
    progress: list[tuple[int, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    said: str = ""


def push(process: ProcessPoolExecutor, path: Path, repo_id: str, **options: object) -> Outcome:
    """Push in the *process*, and wait for it."""
    return start(process, path, repo_id, **options).result(timeout=120)


def start(process: ProcessPoolExecutor, path: Path, repo_id: str, **options: object) -> Future[Outcome]:
    return process.submit(_push, path, repo_id, options)


def _push(path: Path, repo_id: str, options: dict[str, object]) -> Outcome:
    repository._WAITS = (0.001, 0.001)
    outcome = Outcome()
    with _listening() as records, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            made = tallstore.push(path, repo_id, progress=lambda *told: outcome.progress.append(told), **options)
            outcome.oid, outcome.message, outcome.pr_url = made.oid, made.commit_message, made.pr_url
        except tallstore.TallstoreError as error:
            outcome.error, outcome.problem = type(error).__name__, str(error)
            outcome.said = traceback.format_exc()
    outcome.warnings = [str(warning.message) for warning in warned]
    outcome.said += "\n".join(records)
    return outcome


@contextmanager
def _listening() -> Iterator[list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in (None, "huggingface_hub", "httpx2", "httpcore2")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield records
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
