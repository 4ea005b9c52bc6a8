"""The GPU benchmark runs, tiny, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_have_every_kind_and_every_way():
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--numel", "200000", "--repeats", "1"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.stderr == ""
    first, decoders, experts = run.stdout.split("\n\n|")
    assert "decoder: decode_torch" in first
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in decoders.splitlines()[2:] if line]
    assert len(rows) == 20
    assert {row[0] for row in rows} >= {"mask", "signed", "two-level", "sign", "sparse", "uniform of 16", "same"}
    assert all(float(row[3]) > 0 and float(row[5]) > 0 for row in rows)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in experts.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [
        (what, dtype) for dtype in ("float32", "bfloat16") for what in ["load"] * 3 + ["switch"] * 5
    ]
    assert all(float(row[4]) > 0 for row in rows)
