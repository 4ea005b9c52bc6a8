"""The benchmarks of speed run, small, and their tables have the rows that they are to have."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tallstore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPES = {"wide": (96, 64), "long": (5000,), "small": (7, 5)}
COMPILED = [f"tallstore, verify={verify!r}, compiled before" for verify in ("never", "first-read")]
OURS = ["tallstore, verify='never'", "tallstore"]
COLD = [
    "tallstore, one expert, base and merged warm",
    "tallstore, second expert of an open bundle, base and merged warm",
]

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot drop files from its cache")


@pytest.fixture
def built(tmp_path):
    """A base and two experts, as --built takes them."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for place, spread in (("base", 0.0), ("one", 0.01), ("two", 0.01)):
        (tmp_path / place).mkdir()
        moved = {name: value + spread * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_file(moved, tmp_path / place / "model.safetensors")
    return tmp_path


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(script, *arguments):
    """What a benchmark prints on stdout, and on stderr."""
    run = subprocess.run(
        [sys.executable, BENCHMARKS / script, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)},
        timeout=300,
    )
    return run.stdout, run.stderr


def tables(printed):
    """The tables of what was printed, each a list of rows of cells, headings left out."""
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in printed.split("\n\n")]
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in block[2:]] for block in blocks if block]


def test_every_way_to_load_is_in_the_tables(built, modules):
    formats = modules("peer_formats")
    peers = [chosen for chosen in formats.FORMATS if formats.missing("", chosen.package) is None]
    printed, left_out = run("load.py", "--built", built, "--repeats", "1", "--cold")
    found = tables(printed)
    assert len(found) == 4
    for number, rows in enumerate(found):
        names = [row[0] for row in rows]
        assert names[0] == "safetensors, mmap + clone"
        compiled = [] if find_spec("llvmlite") is None else COMPILED
        assert names[4:] == [chosen.name for chosen in peers] + OURS + compiled + COLD * (number % 2)
        assert all(float(row[1]) > 0 for row in rows)
        assert float(rows[0][2]) == 1.0
    assert printed.count("One more task: ") == 2
    lines = left_out.splitlines()
    assert sum("skipped, " in line for line in lines) == 2 * (len(formats.FORMATS) - len(peers))
    assert not [line for line in lines if line.startswith("tallstore")]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # zipnn's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formats_that_keep_every_bit_do(built, modules, tmp_path, dtype):
    formats = modules("peer_formats")
    for place in ("base", "one"):
        file = built / place / "model.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    truth = load_file(built / "one" / "model.safetensors")
    chosen = [found for found in formats.FORMATS if not found.reads_base and formats.missing("", found.package) is None]
    if not chosen:
        pytest.skip("none of the libraries is installed")
    for number, found in enumerate(chosen):
        found.ready()
        found.write(built / "one", built / "base", tmp_path / str(number))
        state = found.read(tmp_path / str(number), built / "base")
        assert state.keys() == truth.keys(), found.name
        assert all(state[name].dtype == dtype and torch.equal(state[name], truth[name]) for name in truth), found.name


def test_tensors_of_a_file_in_memory(built, modules):
    file = built / "one" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    state, truth = modules("peer_formats").views(raw), load_file(file)
    assert state.keys() == truth.keys()
    assert all(torch.equal(state[name], truth[name]) for name in truth)
    state["wide"].zero_()
    assert not modules("peer_formats").views(raw)["wide"].any()


def test_a_load_that_moves_no_bytes_is_found_out(modules):
    load = modules("load")
    state = {"weight": torch.empty(64 << 20, dtype=torch.uint8)}
    load.check_own(state, 64 << 20, "loaded")
    with pytest.raises(RuntimeError, match="mapped: 67108864 bytes of tensors, and 4096 of memory"):
        load.check_own(state, 4096, "mapped")


def test_a_load_that_fails_is_left_out_with_a_line(modules, capfd):
    load = modules("load")

    def fail():
        raise ValueError("no such load")

    assert load.try_out(load.Loader("Nobody's", lambda: fail, ()), 1) is None
    printed = capfd.readouterr().err
    assert "no such load" in printed
    assert printed.endswith("Nobody's: left out, its load failed\n")


def test_opening_is_timed(tmp_path):
    printed, errors = run("opening.py", "--tasks", "5", "--tensors", "3", "--repeats", "1")
    calls, commands = tables(printed)
    assert "`open_bundle`" in [row[0] for row in calls]
    assert [row[0] for row in commands][-1] == "tallstore inspect, 5 tasks"
    assert all(float(row[1]) > 0 for row in calls + commands if row[0] != "`bundle.tasks`, first call")
    assert errors == ""


def test_a_bundle_whose_task_is_listed_again_and_again_is_a_bundle(modules, tmp_path):
    opening = modules("opening")
    opening.write_bundles(tmp_path, 5, 3)
    assert tallstore.verify(tmp_path / "large") == []
    with tallstore.open_bundle(tmp_path / "large", base=tmp_path / "base.safetensors") as bundle:
        assert len(bundle.tasks) == 5
        states = [bundle.state_dict(task) for task in bundle.tasks[1:]]
        assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])


def test_growth_is_timed():
    printed, errors = run("growth.py", "--tasks", "2", "4", "--numel", "600000", "--repeats", "1")
    (rows,) = tables(printed)
    assert [row[0] for row in rows] == ["2", "4"]
    assert float(rows[0][2]) == 1.0
    assert all(float(row[4]) >= float(row[5]) > 2 for row in rows)
    assert errors == ""
