"""Files that somebody writes to, shortens or replaces while a process has them open: a typed error, and no crash."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

import tallstore
from tallstore.checkpoints import open_checkpoint
from tallstore.errors import DamagedCheckpointError
from tests.concurrency.loads import buffers, digest, model_of, state_dict
from tests.faults.bundles import large_inputs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="other systems keep files that are open from such changes")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bundle of tensors of two chunks, and its base as a safetensors file and as torch's."""
    root = tmp_path_factory.mktemp("packed")
    base, experts = large_inputs(root, tensors=1, numel=(1 << 20) + 1024)
    tallstore.pack(base, experts, root / "bundle", method=tallstore.TallMask())
    torch.save(load_file(base), root / "base.bin")
    with tallstore.open_bundle(root / "bundle", base=base) as bundle:
        return root, {task: state_dict(bundle, task) for task in bundle.tasks}


@pytest.fixture(params=["base.safetensors", "base.bin"])
def place(packed, tmp_path, request):
    """A copy: the bundle, the base beside it, and the digests of the experts."""
    root, expected = packed
    shutil.copytree(root / "bundle", tmp_path / "bundle")
    shutil.copy(root / request.param, tmp_path / request.param)
    return tmp_path / "bundle", tmp_path / request.param, expected


def overwrite(path, *, set_back=False):
    """Other content of the same size, in place: one byte of a tensor in the midst of the file."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(status.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    if set_back:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("set_back", [False, True], ids=["", "with its time set back"])
def test_a_base_that_is_written_to_is_refused_by_the_next_load(place, set_back):
    path, base, expected = place
    with tallstore.open_bundle(path, base=base) as bundle:
        assert state_dict(bundle, "cars") == expected["cars"]
        overwrite(base, set_back=set_back)
        with pytest.raises((DamagedCheckpointError, tallstore.BaseMismatchError)):
            bundle.state_dict("cars")


def test_a_base_that_is_shortened_is_refused(place):
    path, base, expected = place
    with tallstore.open_bundle(path, base=base) as bundle:
        assert state_dict(bundle, "cars") == expected["cars"]
        os.truncate(base, base.stat().st_size // 2)
        with pytest.raises(DamagedCheckpointError, match="was changed while it was"):
            bundle.state_dict("cars")
        with pytest.raises(DamagedCheckpointError, match="was changed while it was"):
            bundle.tensor("birds", "layer.0")


@pytest.mark.parametrize("change", [overwrite, lambda path: os.truncate(path, path.stat().st_size // 2)])
def test_a_switch_on_a_base_that_changed_is_refused_and_the_model_stays(place, change):
    """The base is mapped, and stays so between switches: it is looked at before each."""
    path, base, expected = place
    with tallstore.open_bundle(path, base=base) as bundle:
        model = model_of(bundle.state_dict("cars"))
        switcher = bundle.attach(model)
        switcher.set_expert("birds")
        switcher.set_expert("cars")
        change(base)
        for task in ("birds", None):
            with pytest.raises(DamagedCheckpointError, match="was changed while it was in use"):
                switcher.set_expert(task)
            assert switcher.active_expert == "cars"
            assert digest(buffers(model)) == expected["cars"]


def test_a_base_that_another_took_the_place_of_stays_mapped(place, tmp_path):
    """As programs replace files that do it well: whoever has the old one keeps it."""
    path, base, expected = place
    with tallstore.open_bundle(path, base=base) as bundle:
        model = model_of(bundle.state_dict("cars"))
        switcher = bundle.attach(model)
        switcher.set_expert("birds")
        (tmp_path / "new").write_bytes(b"of another program")
        (tmp_path / "new").replace(base)
        for task in ("cars", "birds", "cars"):
            switcher.set_expert(task)
            assert digest(buffers(model)) == expected[task]


@pytest.mark.parametrize("mapped", [False, True])
def test_an_input_that_is_shortened_is_refused(packed, tmp_path, mapped):
    for name in ("base.safetensors", "base.bin"):
        path = tmp_path / name
        shutil.copy(packed[0] / name, path)
        with open_checkpoint(path) as checkpoint:
            read = checkpoint.map if mapped else checkpoint.read
            assert read("layer.0", 0, 1 << 20).sum() == read("layer.0", 0, 1 << 20).sum()
            os.truncate(path, 1 << 20)
            with pytest.raises(DamagedCheckpointError, match="was changed while it was"):
                read("layer.0", 0, 1 << 20)


def test_a_shard_that_is_shortened_or_grows_while_it_is_open(place):
    path, base, expected = place
    for shard in sorted(path.glob("*/*/*.safetensors")):
        content = shard.read_bytes()
        with tallstore.open_bundle(path, base=base) as bundle:
            for task in bundle.tasks:
                bundle.state_dict(task)
            os.truncate(shard, len(content) // 2)
            task = "birds" if "birds" in shard.parts else "cars"
            with pytest.raises(tallstore.IntegrityError):
                bundle.state_dict(task)
            shard.write_bytes(content + b"more")
            assert state_dict(bundle, task) == expected[task]  # what it was, and what nobody reads
        shard.write_bytes(content)


LOADS_ALL_THE_TIME = """
    import os, sys, threading
    import tallstore
    bundle, base = sys.argv[1:]
    size, ends, loads = os.stat(base).st_size, [], []

    def load():
        try:
            with tallstore.open_bundle(bundle, base=base) as opened:
                while True:
                    opened.state_dict("cars")
                    loads.append(1)
        except tallstore.TallstoreError as error:
            ends.append(error)

    with open(base, "rb") as file:
        content = file.read()
    for turn in range(int(os.environ["TURNS"])):
        loads.clear()
        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(loads) < 4:
            pass
        os.truncate(base, size // 3)
        for thread in threads:
            thread.join()
        with open(base, "wb") as file:
            file.write(content)
    print(len(ends))
"""


@pytest.mark.parametrize("turns", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_base_that_is_shortened_in_the_midst_of_loads_ends_no_process(packed, tmp_path, turns):
    """What is mapped of a file that ends before it is more than an error: SIGBUS. Loads map nothing."""
    root, _ = packed
    shutil.copy(root / "base.safetensors", tmp_path / "base.safetensors")
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(LOADS_ALL_THE_TIME),
        root / "bundle",
        tmp_path / "base.safetensors",
    ]
    done = subprocess.run(
        command, env={**os.environ, "TURNS": str(turns)}, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode != -signal.SIGBUS
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{2 * turns}\n")
