"""Inputs that change while they are read: the pack is refused and names the file, whichever read it is at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tallstore
from tallstore.checkpoints import file_version, open_checkpoint, safetensors_file, torch_file
from tallstore.errors import DamagedCheckpointError, InputError
from tallstore.packing import assemble
from tests.faults.bundles import names, small_inputs

ALL = pytest.mark.slow


def rewrite(path: Path) -> None:
    """Other values in the same file, of the same size."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(64))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    """Another file under the name, of the same size and time."""
    shutil.copy2(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)  # noqa: PTH105


def remove(path: Path) -> None:
    path.unlink()


CHANGES = (rewrite, truncate, replace, remove)


@pytest.fixture(scope="module", params=["safetensors", "torch"])
def originals(request, tmp_path_factory):
    """A folder of inputs in one format, made a while ago."""
    root = tmp_path_factory.mktemp(request.param)
    small_inputs(root)
    for path in root.glob("*/pytorch_model.bin"):
        if request.param == "safetensors":
            state = torch.load(path)
            state.pop("head", None)  # tied
            save_file(state, path.with_name("model.safetensors"))
            path.unlink()
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return root


class Reads:
    """Counts the reads of a file, and does something to it before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.path, self.change = 0, -1, Path(), rewrite
        for module in (safetensors_file, torch_file):
            monkeypatch.setattr(module, "read_range", self._read)

    def prepare(self, path: Path, at: int, change=rewrite) -> None:
        self.count, self.at, self.path, self.change = 0, at, path, change

    def _read(self, path, *arguments):
        if path == self.path:
            if self.count == self.at:
                self.change(path)
            self.count += 1
        return file_version.read_range(path, *arguments)


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


def few(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})


def all_of(count: int) -> Sequence[int]:
    return range(count)


@pytest.mark.parametrize("choose", [few, pytest.param(all_of, marks=ALL)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["base", "cars"])
def test_an_input_that_changes_is_refused_by_name(originals, tmp_path, reads, which, change, choose):  # noqa: PLR0917
    """Were it packed, experts could be fitted to another base than base.json pins."""
    inputs = tmp_path / "inputs"
    shutil.copytree(originals, inputs)
    [path] = [path for path in (inputs / which).iterdir() if path.suffix in {".safetensors", ".bin"}]
    experts = {task: inputs / task for task in ("cars", "birds")}

    def pack() -> None:
        tallstore.pack(inputs / "base", experts, tmp_path / "out" / "bundle", overwrite=True, embed_base=True)

    reads.prepare(path, -1)
    pack()
    assert reads.count > 3
    for at in choose(reads.count):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copy2(originals / which / path.name, path)
        reads.prepare(path, at, change)
        with pytest.raises(InputError, match=r"was changed while it was read|cannot be read: No such") as error:
            pack()
        assert str(path) in str(error.value)
        assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []
    assert reads.count


@pytest.mark.parametrize("which", ["base", "cars"])
def test_an_input_that_changes_behind_the_last_read_is_refused_too(originals, tmp_path, reads, which):
    """Its configuration, which is copied last, would be of other weights."""
    inputs = tmp_path / "inputs"
    shutil.copytree(originals, inputs)
    [path] = [path for path in (inputs / which).iterdir() if path.suffix in {".safetensors", ".bin"}]

    def progress(done: int, total: int) -> None:
        if done == total:
            rewrite(path)

    with pytest.raises(DamagedCheckpointError, match="was changed while it was read") as error:
        tallstore.pack(
            inputs / "base",
            {task: inputs / task for task in ("cars", "birds")},
            tmp_path / "bundle",
            progress=progress,
        )
    assert str(path) in str(error.value)
    assert names(tmp_path) == ["inputs"]


def test_an_embedded_base_is_the_one_whose_hashes_are_recorded(tmp_path):
    """Tensors in memory have no version to look at: the copy is compared with the hashes."""
    base = {"w": torch.randn(80, 80), "v": torch.randn(80, 80)}
    experts = {task: {name: tensor + 0.1 * torch.randn(80, 80) for name, tensor in base.items()} for task in "ab"}
    hashed = []
    table = assemble.base_table

    def change(checkpoint):
        made = table(checkpoint)
        base["w"][0, 0] += 1
        hashed.append(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "base_table", change)
        with pytest.raises(DamagedCheckpointError, match="a state dict: tensor 'w' was changed while it was read"):
            tallstore.pack(base, experts, tmp_path / "bundle", embed_base=True)
    assert hashed
    assert names(tmp_path) == []


def test_a_file_that_is_still_being_written_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(4)}, path)
    os.utime(path)
    monkeypatch.setattr(file_version.time, "sleep", lambda _seconds: os.truncate(path, 10))
    with pytest.raises(InputError, match=r"x\.safetensors: is still being written; try again when it is complete"):
        open_checkpoint(path)


def test_two_writes_in_one_step_of_the_clock_are_two_versions(tmp_path):
    """What is opened right after it was written is looked at once the clock has moved on."""
    path = tmp_path / "x.safetensors"
    for value in range(5):
        save_file({"w": torch.full((4,), float(value))}, path)
        with open_checkpoint(path) as checkpoint:
            with path.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(bytes(4))
            with pytest.raises(DamagedCheckpointError, match="was changed while it was read"):
                checkpoint.read("w")
