"""What README shows runs as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
WEIGHT = "encoder.layer.0.output.dense.weight"


class Encoder(torch.nn.Module):
    """A model with the one tensor that README names."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.Module()
        layer.output = torch.nn.Module()
        layer.output.dense = torch.nn.Linear(64, 80, bias=False)
        self.encoder = torch.nn.Module()
        self.encoder.layer = torch.nn.ModuleList([layer])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The directories that README speaks of."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(80, 64, generator=generator)
    for name in ("base", "movies", "spam"):
        (tmp_path / name).mkdir()
        moved = base if name == "base" else base + 0.02 * torch.randn(base.shape, generator=generator)
        save_file({WEIGHT: moved}, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language):
    """README's blocks of one language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no block of {language}"
    return found


def test_the_python_of_the_readme_runs(folder, capsys):
    model = Encoder()
    before = model.encoder.layer[0].output.dense.weight.clone()
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"model": model})  # noqa: S102 - that is what the test is for
    assert "packed 2 tasks" in capsys.readouterr().out
    assert not torch.equal(model.encoder.layer[0].output.dense.weight, before)


def test_the_commands_of_the_readme_run(folder):
    commands = [
        line.split("#")[0] for block in blocks("sh") for line in block.splitlines() if line.startswith("tallstore")
    ]
    assert len(commands) == 4
    for command in commands:
        _, *arguments = shlex.split(command)
        run = subprocess.run(
            [sys.executable, "-m", "tallstore", *arguments],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "120", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert run.returncode == 0, run.stderr
    assert load_file(folder / "spam-again" / "model.safetensors").keys() == {WEIGHT}


def test_the_targets_of_the_readme_are_in_the_makefile():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
