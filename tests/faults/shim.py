"""Calls of the system that go wrong: a library between a process and the C library, which is compiled for the tests."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.children import Call, Child, Outcome

_SOURCE = Path(__file__).with_name("system_calls.c")
_LIBRARY = "TALLSTORE_TEST_SYSTEM_CALLS"  # the variable that says where it is

FAIL, FAIL_FROM, SHORT, SIGNAL = range(4)  # as in the source
"""One call fails, or all from that one on; reads or writes less than asked for; or a signal arrives just before it."""


@dataclass(frozen=True)
class Faulty:
    """Children whose calls of the system can go wrong."""

    _process: ProcessPoolExecutor

    def run(self, call: Call, conditions: tuple[Call, ...], root: Path, *, at: int, how: int, number: int) -> Outcome:
        """Run *call* in a child; of its system calls on what is under *root*, one goes wrong.

        Args:
            call, conditions: as of `Child`.
            root: a directory.
            at: the number of that call, from 0.
            how: FAIL, FAIL_FROM, SHORT or SIGNAL.
            number: the errno, or the signal.
        """
        armed = functools.partial(_arm, str(root), at, number, how)
        return self._process.submit(_outcome, call, (*conditions, armed)).result(timeout=120)

    def calls(self, call: Call, conditions: tuple[Call, ...], root: Path, how: int = FAIL) -> list[str]:
        """The names of its system calls on what is under *root*; where *how* is SHORT, of those that can be."""
        report = root.parent / f"{root.name}.calls"
        armed = functools.partial(_arm, str(root), -1, 0, how)
        outcome = self._process.submit(_outcome, functools.partial(_recording, call, report), (*conditions, armed))
        assert outcome.result(timeout=120).error is None, outcome.result().error
        names = report.read_text().split()
        report.unlink()
        return names


@contextmanager
def faulty_children(directory: Path) -> Iterator[Faulty | None]:
    """Compile the library in *directory*, and start a process that has it; None where there is no compiler for that."""
    compiler = shutil.which("cc")
    library = directory / "system_calls.so"
    command = [compiler or "false", "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl"]
    if not os.path.exists("/proc/self/fd") or subprocess.run(command, check=False, capture_output=True).returncode:  # noqa: PTH110
        yield None
        return
    settings = {"LD_PRELOAD": str(library), _LIBRARY: str(library)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            process.submit(os.getpid).result()  # starts it
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield Faulty(process)


def _outcome(call: Call, conditions: tuple[Call, ...]) -> Outcome:
    return Child(call, *conditions).outcome()


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ[_LIBRARY])
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    library.faults_disarm.restype = ctypes.c_long
    library.faults_name.argtypes, library.faults_name.restype = [ctypes.c_long], ctypes.c_char_p
    return library


def _arm(root: str, at: int, number: int, how: int) -> None:
    _library().faults_arm(os.fsencode(root), at, number, how)


def _recording(call: Call, report: Path) -> None:
    call()
    library = _library()
    count = library.faults_disarm()
    report.write_text("\n".join(library.faults_name(number).decode() for number in range(count)))
