"""Locks that a forked process finds free: the threads that held them stayed with its parent."""

from __future__ import annotations

import os
import threading
from typing import Final
from weakref import WeakSet


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
