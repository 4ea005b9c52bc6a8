"""Locks that a forked process finds free: the threads that held them stayed with its parent."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cached_property as cached_property_of_functools
from typing import Any, Final, TypeVar
from weakref import WeakSet

Value = TypeVar("Value")


def lock() -> threading.Lock:
    """A `threading.Lock`; what it guards must be sound at every moment, since a fork does not wait for it."""
    made = threading.Lock()
    _locks.add(made)
    return made


def rlock() -> threading.RLock:
    """A `threading.RLock`, likewise. One that the forking thread holds is held by it in the forked process, too."""
    made = threading.RLock()
    _rlocks.add(made)
    return made


class cached_property(cached_property_of_functools[Value]):  # noqa: N801 - as Python's
    """As Python's, of which each holds a lock before 3.12, for all objects of a class."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        super().__init__(compute)
        held: threading.RLock | None = getattr(self, "lock", None)
        if held is not None:
            _rlocks.add(held)


_locks: Final = WeakSet[threading.Lock]()
_rlocks: Final = WeakSet[threading.RLock]()


def _free_all() -> None:
    for held in list(_locks):
        held._at_fork_reinit()  # type: ignore[attr-defined] # noqa: SLF001 - as concurrent.futures does
    for owned in list(_rlocks):
        if not owned._is_owned():  # type: ignore[attr-defined] # noqa: SLF001
            owned._at_fork_reinit()  # type: ignore[attr-defined] # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
