"""Short runs of every target, of the same inputs each time. For longer ones: `python -m tests.fuzz.run --help`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest

from tests.fuzz.run import MEMORY_NBYTES, Overrun, Watched, run_plain
from tests.fuzz.targets import TARGETS

#: Such that all of them take half a minute together.
CASES = {
    "manifest": 3000,
    "tables": 3000,
    "header": 4000,
    "frame": 8000,
    "payload": 3000,
    "checkpoint": 2000,
    "torch-file": 600,
    "index": 600,
    "card": 200,
    "experts-file": 2000,
    "origin": 2000,
    "bundle": 500,
    "numbers": 150,
}


def test_every_target_is_run():
    assert CASES.keys() == TARGETS.keys()


@pytest.mark.filterwarnings("ignore")  # of a newer minor version, of pickles' protocols
@pytest.mark.parametrize("name", CASES)
def test_whatever_comes_is_taken_or_refused_in_one_line(name, tmp_path):
    assert run_plain(name, CASES[name], 0, tmp_path).cases == CASES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_where_coverage_guides_the_mutations(name, tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed: pip install 'tallstore[fuzz]'")
    command = [sys.executable, "-m", "tests.fuzz.run", "--target", name, "--cases", str(CASES[name]), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["cases"] >= CASES[name]
    assert record["edges"] > 0


# --- the runs themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["header", "bundle"])
def test_a_seed_gives_the_same_inputs(name):
    target = TARGETS[name]
    seeds = list(target.seeds())
    one, other = ([target.mutate(random.Random(5), seeds) for _ in range(20)] for _ in range(2))  # noqa: S311 - guards nothing
    assert one == other
    assert one[0] != target.mutate(random.Random(6), seeds)  # noqa: S311


def test_a_case_that_hangs_is_stopped_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.run.CASE_SECONDS", 1)
    watched = Watched(lambda _: time.sleep(60), tmp_path / "found")
    with pytest.raises(Overrun, match="a case took more than 1 s"):
        watched(b"slow")
    assert [path.read_bytes() for path in (tmp_path / "found").iterdir()] == [b"slow"]


def test_a_case_that_takes_memory_is_kept(tmp_path):
    held = []
    watched = Watched(lambda _: held.append(bytearray(b"x") * (MEMORY_NBYTES * 2)), tmp_path / "found")
    with pytest.raises(MemoryError, match="bytes more than at the start"):
        watched(b"large")
    assert [path.read_bytes() for path in (tmp_path / "found").iterdir()] == [b"large"]


def test_what_breaks_is_kept(tmp_path):
    watched = Watched(lambda data: data.decode("ascii"), tmp_path / "found")
    watched(b"sound")
    with pytest.raises(UnicodeDecodeError):
        watched(b"\xff")
    assert watched.cases == 2
    assert [path.read_bytes() for path in (tmp_path / "found").iterdir()] == [b"\xff"]


def test_a_run_tells_what_it_did():
    command = [sys.executable, "-m", "tests.fuzz.run", "--target", "origin", "--cases", "50", "--seed", "3", "--plain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["target"], record["cases"], record["seed"], record["guided"]) == ("origin", 50, 3, False)
