"""The switch benchmark runs, small, on made-up experts and on a folder of them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A base and two experts; one of them has its encoder's names, and a head beside."""
    base = {"layer.weight": torch.randn(64, 96), "layer.bias": torch.randn(64), "positions": torch.arange(5)}
    for name, prefix in (("base", ""), ("one", ""), ("two", "bert.")):
        moved = {
            prefix + key: t + 0.02 * torch.randn(t.shape) if t.is_floating_point() else t for key, t in base.items()
        }
        (tmp_path / name).mkdir()
        save_file(base if name == "base" else {**moved, "head": torch.ones(2)}, tmp_path / name / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("real", [False, True])
def test_the_table_has_every_way_for_every_dtype(folder, real):
    experts = ["--experts", folder] if real else ["--numel", "5000000"]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "switch.py", "--repeats", "1", *experts],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    rows = [line.strip("|").split("|") for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    ways = 6 + (find_spec("peft") is not None)
    assert [row[2].strip() for row in rows] == ["float32"] * ways + ["bfloat16"] * ways
    assert len({row[3] for row in rows}) == ways
    assert all(float(row[4]) > 0 for row in rows)
    assert run.stderr.count("\n") == 7 - ways
    assert run.stderr in {"", "PEFT, merged LoRA of rank 16: skipped, peft is not installed (pip install peft)\n"}
