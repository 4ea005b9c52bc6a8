"""Units of work on an executor, and what came of them in the order in which they were given."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from tallstore.errors import TallstoreError, WorkerError
from tallstore.packing.unit import Unit, UnitMade, pack_unit

_AHEAD = 64  # units begun ahead of the one that is waited for: what an executor holds of them is bounded


def in_order(
    work: Iterable[Unit | str], threads: ThreadPoolExecutor, executor: Executor | None
) -> Generator[UnitMade | str, None, None]:
    """Pack units, several at a time; a name in *work* comes through in its place.

    When the iterator is closed, no unit is running any more.

    Args:
        work: gone through as there is room.
        threads: our own, which pack unless somebody gives an *executor*.
        executor: of processes, of threads, or of other machines.

    Raises:
        TallstoreError: as the unit raised it.
        WorkerError: a unit did not come back from *executor*.
    """
    pending = deque[Future[UnitMade] | str]()
    most = _AHEAD if executor is not None else 2 * (os.cpu_count() or 1)
    try:
        for item in work:
            if isinstance(item, str):
                pending.append(item)
            elif executor is None:
                pending.append(threads.submit(pack_unit, item))
            else:
                pending.append(_send(executor, item))
            if len(pending) > most:
                yield _first(pending, foreign=executor is not None)
        while pending:
            yield _first(pending, foreign=executor is not None)
    finally:
        for future in pending:
            if not isinstance(future, str) and not future.cancel():
                future.exception()  # waits for its end


def _first(pending: deque[Future[UnitMade] | str], *, foreign: bool) -> UnitMade | str:
    """What came of the first of *pending*, which is pending as long as it is waited for."""
    made = _settle(pending[0], foreign=foreign)
    pending.popleft()
    return made


def _send(executor: Executor, unit: Unit) -> Future[UnitMade]:
    try:
        return executor.submit(pack_unit, unit)
    except Exception as error:
        raise _lost(error) from error


def _settle(pending: Future[UnitMade] | str, *, foreign: bool) -> UnitMade | str:
    if isinstance(pending, str) or not foreign:
        return pending if isinstance(pending, str) else pending.result()
    try:
        return pending.result()
    except (TallstoreError, OSError):
        raise
    except Exception as error:
        raise _lost(error) from error


def _lost(error: Exception) -> WorkerError:
    lines = str(error).splitlines()
    what = f"{type(error).__name__}: {lines[0].rstrip('.')[:200]}" if lines else type(error).__name__
    return WorkerError(f"executor: a unit of work did not come back ({what}); nothing was written, pack again")
