"""A target under atheris: libFuzzer mutates what reached code that nothing before it had reached."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.run import CASE_SECONDS, Run, Watched, print_record

_MAX_LENGTH = 1 << 15
_STATUS = re.compile(r"^#(\d+)\s.*\bcov: (\d+) ft: (\d+)", re.MULTILINE)


def run_guided(options: argparse.Namespace, place: Path) -> int:
    """Fuzz in a process of its own, which libFuzzer ends; its exit code.

    Prints the record of the run, edges included.
    """
    with tempfile.TemporaryDirectory(dir=options.place) as notes:
        log = Path(notes) / "log"
        arguments = [options.target, str(options.cases), str(options.seed), str(place), str(options.found or ""), notes]
        start = time.perf_counter()
        with log.open("wb") as file:
            done = subprocess.run([sys.executable, "-m", "tests.fuzz.guided", *arguments], stderr=file, check=False)
        text = log.read_text(errors="replace")
        record = Path(notes) / "record"
        if done.returncode or not record.exists():
            sys.stderr.write(text[-8000:])
            return done.returncode or 1
        edges = max((int(found[2]) for found in _STATUS.finditer(text)), default=0)
        run = Run(**json.loads(record.read_text()))
        print_record(options, run, time.perf_counter() - start, edges)
    return 0


def _child(  # noqa: PLR0917 - as they stand on its command line
    name: str, cases: int, seed: int, place: Path, found: Path | None, notes: Path
) -> None:
    import atheris  # noqa: PLC0415 - an extra

    with atheris.instrument_imports(include=["tallstore"]):
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415 - what it imports is instrumented

        target = TARGETS[name]
        run = target.make(place)
    seeds = list(target.seeds())
    corpus = notes / "corpus"
    corpus.mkdir()
    for number, content in enumerate(seeds):
        (corpus / f"{number:05d}").write_bytes(content)
    watched = Watched(run, found, limit_time=False)

    def one(data: bytes) -> None:
        watched(data)
        if watched.cases == min(cases // 10, len(seeds) + 100):
            watched.settle()
        if watched.cases % 500 == 0 or watched.cases >= cases:
            (notes / "record").write_text(json.dumps(watched.record().__dict__))

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        generator = random.Random(number)  # noqa: S311 - guards nothing
        if generator.randrange(2):
            return atheris.Mutate(data, max_size)
        return target.mutate(generator, [data])[:max_size]

    flags = [
        f"-runs={cases}",
        f"-seed={seed}",
        f"-max_len={_MAX_LENGTH}",
        f"-timeout={CASE_SECONDS}",
        "-rss_limit_mb=0",
    ]
    mutator = {"custom_mutator": mutate} if target.has_own_mutator else {}
    atheris.Setup([sys.argv[0], *flags, "-len_control=0", str(corpus)], one, **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    _, name_, cases_, seed_, place_, found_, notes_ = sys.argv
    _child(name_, int(cases_), int(seed_), Path(place_), Path(found_) if found_ else None, Path(notes_))
