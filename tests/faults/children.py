"""Operations in processes of their own, to be killed, interrupted and starved. They start in milliseconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tallstore import files

Call = Callable[[], object]  # a function of a module, or a partial of one: it goes to the child by pickle

_PRELOADED = ["tallstore.packing", "tallstore.exporting", "tallstore.hub.reporting", "tallstore.hub.pulling"]
_CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    _CONTEXT.set_forkserver_preload(
        [*_PRELOADED, "tallstore.verifying", "huggingface_hub.hf_api", "matplotlib.figure", __name__]
    )

_PATIENCE = 120  # seconds; a child that takes longer hangs
_TOUCHES_FILES = ("open", "os.", "shutil.", "fcntl.", "ctypes.")
_STARTED = "started"


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        exit_code: negative for the signal that ended it.
        error: type and message of what was raised; None where nothing was, or where nobody was left to say.
        events: what the child asked the system for that has to do with files, as Python's audit hooks call it.
    """

    exit_code: int
    error: tuple[type[BaseException], str] | None = None
    events: tuple[str, ...] = ()


class Child:
    """A process that makes a call."""

    def __init__(self, call: Call, *conditions: Call) -> None:
        """Start it.

        Args:
            call: what to do.
            conditions: called in the child before.
        """
        self._receiver, sender = _CONTEXT.Pipe(duplex=False)
        self.process: BaseProcess = _CONTEXT.Process(target=_run, args=(call, sender, conditions))
        self.process.start()
        sender.close()

    def wait_until_it_starts(self) -> None:
        """Wait for the moment before the call."""
        assert self._receiver.poll(_PATIENCE), "the child does not start"
        assert self._receiver.recv() == _STARTED

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens where the child has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def outcome(self) -> Outcome:
        """Wait for its end."""
        said: list[Any] = [(None, ())]
        with contextlib.suppress(EOFError):
            while True:
                assert self._receiver.poll(_PATIENCE), "the child hangs"
                said.append(self._receiver.recv())
        self.process.join()
        exit_code = self.process.exitcode
        self._receiver.close()
        self.process.close()
        error, events = said[0] if said[-1] == _STARTED else said[-1]
        return Outcome(exit_code, error, events)


def _run(call: Call, sender: Connection, conditions: Iterable[Call]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever began the tests may have ignored it
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - as long as the process lives
    for condition in conditions:
        condition()
    sender.send(_STARTED)
    _EVENTS.start()
    error: tuple[type[BaseException], str] | None = None
    try:
        call()
    except BaseException as raised:  # noqa: BLE001 - the parent judges what it was
        error = (type(raised), str(raised))
    sender.send((error, _EVENTS.stop()))
    sys.exit(error is not None)


class _Events:
    """What a process asks of the file system; can stop the process short at one of these moments."""

    def __init__(self) -> None:
        self._heard: list[str] = []
        self._listens = False
        self._lock = threading.RLock()  # a signal may be handled inside it
        self._at: int | None = None
        self._action: Call = lambda: None

    def act_at(self, event: int, action: Call) -> None:
        """Do something just before the event of that number."""
        self._at, self._action = event, action

    def start(self) -> None:
        sys.addaudithook(self._hear)
        self._listens = True

    def stop(self) -> tuple[str, ...]:
        self._listens = False
        return tuple(self._heard)

    def _hear(self, event: str, _arguments: tuple[object, ...]) -> None:
        if self._listens and event.startswith(_TOUCHES_FILES):
            with self._lock:
                number = len(self._heard)
                self._heard.append(event)
            if number == self._at:
                self._action()


_EVENTS = _Events()


def stop_at(event: int, number: signal.Signals) -> None:
    """A condition: the child gets a signal just before that event."""
    _EVENTS.act_at(event, lambda: os.kill(os.getpid(), number))


def limit_file_size(nbytes: int) -> None:
    """A condition: no file may become larger, as on a disk that is full."""
    import resource  # noqa: PLC0415 - POSIX only

    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def without_exchange() -> None:
    """A condition: a file system on which two directories cannot change places in one step."""
    files._exchange = lambda _first, _second: False


def obeying_permissions() -> None:
    """A condition: permissions bind, which they do not for root as it is."""
    import ctypes  # noqa: PLC0415 - Linux only

    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread and those that it starts
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable capabilities, twice: none
    if ctypes.CDLL(None, use_errno=True).capset(header, sets):
        raise OSError(ctypes.get_errno(), "cannot give up the capabilities of root")
