"""Fuzz one target for a number of cases.

    python -m tests.fuzz.run --target manifest --cases 300000 --seed 1
    python -m tests.fuzz.run --target bundle --cases 20000 --seed 1 --plain        without atheris

With atheris (Linux, Python 3.11: ``pip install 'tallstore[fuzz]'``) coverage guides the mutations; without, or with
--plain, a seeded generator makes them. Every case has a time limit, and the process a limit of memory above what it had
at its start. The first input that breaks something is written to --found, and the exit code is 1. The last line is a
record of the run in JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

MEMORY = Path("/dev/shm")  # noqa: S108 - directories of unforeseeable names are made in it
CASE_SECONDS = 20
#: Beyond what the process took once it had run its seeds.
MEMORY_NBYTES = 256 << 20


class Overrun(BaseException):
    """A case took too long. No handler of exceptions may take it for one."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise Overrun(f"a case took more than {CASE_SECONDS} s")


def forget_peak() -> None:
    """Let the most memory that this process has had be what it has now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_nbytes() -> int:
    """The most memory that this process has had, since it was forgotten."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Run:
    """What a run took: cases, and memory beyond what was there once the seeds had run, and in all."""

    cases: int
    memory_nbytes: int
    peak_nbytes: int


class Watched:
    """A target under a limit of time and memory, which counts its cases and keeps the input that broke it."""

    def __init__(self, run: Callable[[bytes], object], found: Path | None, *, limit_time: bool = True) -> None:
        self._run, self._found, self._limit_time = run, found, limit_time
        forget_peak()
        self.cases, self.start_nbytes = 0, peak_nbytes()
        if limit_time:
            signal.signal(signal.SIGALRM, _stop)

    def __call__(self, data: bytes) -> None:
        """One case."""
        self.cases += 1
        if self._limit_time:
            signal.alarm(CASE_SECONDS)
        try:
            self._run(data)
        except BaseException:
            self._keep(data)
            raise
        finally:
            if self._limit_time:
                signal.alarm(0)
        if peak_nbytes() > self.start_nbytes + MEMORY_NBYTES:
            self._keep(data)
            raise MemoryError(f"{peak_nbytes() - self.start_nbytes} bytes more than at the start")

    def settle(self) -> None:
        """Memory is measured from here on."""
        forget_peak()
        self.start_nbytes = peak_nbytes()

    def record(self) -> Run:
        """What it took so far."""
        return Run(self.cases, peak_nbytes() - self.start_nbytes, peak_nbytes())

    def _keep(self, data: bytes) -> None:
        if self._found is not None:
            self._found.mkdir(parents=True, exist_ok=True)
            (self._found / f"{time.time_ns()}.bin").write_bytes(data)


def run_plain(
    name: str, cases: int, seed: int, place: Path, found: Path | None = None, *, keep_on: bool = False
) -> Watched:
    """Run *cases* inputs that a generator seeded with *seed* makes; the same ones in every run.

    Raises:
        Exception: whatever an input caused; with *keep_on* it is printed, and the next input comes.
    """
    from tests.fuzz.targets import TARGETS  # noqa: PLC0415 - what atheris instruments is imported behind it

    target = TARGETS[name]
    watched = Watched(target.make(place), found)
    seeds = list(target.seeds())
    generator = random.Random(f"{name} {seed}")  # noqa: S311 - guards nothing
    for case in range(cases):
        data = seeds[case] if case < len(seeds) else target.mutate(generator, seeds)
        try:
            watched(data)
        except Exception:
            if not keep_on:
                raise
            traceback.print_exc()
        if case == min(len(seeds), cases // 10):
            watched.settle()
    return watched


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the options say."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        if options.plain or not _has_atheris():
            return _plain(options, Path(place))
        from tests.fuzz.guided import run_guided  # noqa: PLC0415 - atheris

        return run_guided(options, Path(place))


def _plain(options: argparse.Namespace, place: Path) -> int:
    start = time.perf_counter()
    watched = run_plain(options.target, options.cases, options.seed, place, options.found, keep_on=options.keep_on)
    print_record(options, watched.record(), time.perf_counter() - start, None)
    return 0


def print_record(options: argparse.Namespace, run: Run, seconds: float, edges: int | None) -> None:
    """Print the record of a run, in one line."""
    record = {
        "target": options.target,
        "cases": run.cases,
        "seed": options.seed,
        "guided": edges is not None,
        "seconds": round(seconds, 1),
        "edges": edges,
        "memory_mb": round(run.memory_nbytes / 1e6, 1),
        "peak_mb": round(run.peak_nbytes / 1e6, 1),
    }
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def _has_atheris() -> bool:
    try:
        import atheris  # noqa: F401, PLC0415 - an extra
    except ImportError:
        return False
    return True


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz one target.")
    parser.add_argument("--target", required=True)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="mutate without looking at coverage")
    parser.add_argument("--keep-on", action="store_true", help="print what breaks, and go on (plain)")
    parser.add_argument("--found", type=Path, help="directory for inputs that break something")
    parser.add_argument("--place", type=Path, default=MEMORY if MEMORY.is_dir() else None)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
