"""The benchmarks run, small, and what they compute by arithmetic is what they say."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tallstore
from tallstore.checkpoints import open_checkpoint

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def paper_storage(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("paper_storage")


@pytest.mark.parametrize(
    ("model", "counts", "gigabits"),
    [
        ("VIT_B_32", (87_849_216, 25_599_489), (57.04, 8.20)),
        ("VIT_L_14", (303_966_208, 38_595_841), (195.77, 26.77)),
    ],
)
def test_the_shapes_sum_up_to_the_papers_parameters_and_bits(paper_storage, model, counts, gigabits):
    clip = getattr(paper_storage, model)
    assert (paper_storage.parameters(clip.masked), paper_storage.parameters(clip.frozen)) == counts
    nbits = [count(20, *counts) for count in (paper_storage.checkpoints_nbits, paper_storage.published_nbits)]
    assert tuple(round(number / 1e9, 2) for number in nbits) == gigabits


def test_any_range_of_a_made_up_task_vector_is_the_same_numbers(paper_storage):
    whole = paper_storage.normals(3, 5, 0, 100_000)
    for start, stop in ((0, 1), (1, 2), (7, 8), (8, 9), (13, 99_999), (99_983, 100_000)):
        np.testing.assert_array_equal(paper_storage.normals(3, 5, start, stop), whole[start:stop])
    assert (whole.mean(), whole.std()) == pytest.approx((0, 1), abs=0.01)
    assert abs(np.corrcoef(whole, paper_storage.normals(4, 5, 0, 100_000))[0, 1]) < 0.01


def test_a_bundle_of_the_papers_layout_takes_the_papers_bits(paper_storage, tmp_path):
    clip = paper_storage.VIT_B_32
    masked, frozen = (paper_storage.scaled(shapes, 32) for shapes in (clip.masked, clip.frozen))
    base = paper_storage.write_base(tmp_path, masked | frozen)
    found = paper_storage.measure(paper_storage.PUBLISHED, base, 2, tmp_path / "bundle")
    expected = paper_storage.published_nbits(2, paper_storage.parameters(masked), paper_storage.parameters(frozen))
    assert 8 * found.embedded == pytest.approx(expected, rel=0.01)
    assert tallstore.verify(tmp_path / "bundle") == []
    with tallstore.open_bundle(tmp_path / "bundle") as bundle, open_checkpoint(base) as opened:
        for name, moved in (("visual.proj", True), ("visual.ln_pre.bias", True), ("text_projection", False)):
            tensor = bundle.tensor("task-01", name)
            assert torch.equal(tensor.flatten(), opened.read(name)) != moved, name


@pytest.mark.slow
def test_the_storage_table_is_printed(tmp_path):
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "paper_storage.py", "--scale", "512", "--tasks", "2", "--out", tmp_path],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    scaled, extrapolated = run.stdout.split("EXTRAPOLATED")
    assert "SCALED: every first dimension divided by 512" in scaled
    assert scaled.count("\n| 2 | ") == 7
    assert extrapolated.count("\n| 2 | ") == 7
    assert "NaN" not in run.stdout
    assert run.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_cost_of_workers_is_printed():
    options = ["--rows", "512", "--columns", "300", "--tasks", "3", "--parameters", "1000000", "--workers", "2"]
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "workers.py", *options],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    measured, multiplied = run.stdout.split("by multiplication")
    assert "| elements of all experts | 0.00 G |" in measured
    assert "| worker, peak anonymous MiB | " in measured
    assert "| on 2 workers, minutes | " in multiplied
    assert run.stderr == ""


@pytest.mark.slow
def test_what_grows_with_the_number_of_tasks_is_printed():
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "many_tasks.py", "--tasks", "2,4", "--tensors", "1", "--repeats", "1"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "| milliseconds | 2 tasks | 4 tasks |" in run.stdout
    for call in ("`open_bundle`", "`add` of a task, and `remove` of it", "`tallstore inspect`"):
        assert f"\n| {call} | " in run.stdout
    assert run.stderr == ""
