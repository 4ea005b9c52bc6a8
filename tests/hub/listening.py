"""What is said while the Hub's client is at work: no word of it may be a token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def listening() -> Iterator[list[str]]:
    """A block whose log records, down to DEBUG, are gathered: ours, and those of the libraries below."""
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
