"""Places that cannot be written to, or are being written to: one typed error, nothing left behind, inputs untouched."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tallstore
from tallstore.errors import InputError, OutputBusyError, OutputError
from tests.faults.bundles import digests, large_inputs, names, small_inputs
from tests.faults.children import Child, Job, limit_file_size

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")

FULL = "cannot be written (File too large); make room there, or choose another place"
OPTIONS = {"embed_base": True, "overwrite": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    small = small_inputs(root)
    before = digests(root)
    yield small
    assert digests(root) == before


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The bundle that a pack of them makes."""
    return Job(*inputs, tmp_path_factory.mktemp("whole") / "bundle", OPTIONS)


@pytest.fixture(params=[False, True], ids=["a free place", "over a bundle"])
def job(inputs, tmp_path, request):
    """A pack to a place that is free, or has an older bundle in it."""
    job = Job(*inputs, tmp_path / "place" / "bundle", OPTIONS)
    job.out.parent.mkdir()
    if request.param:
        tallstore.pack(*inputs, job.out, method=tallstore.TallMask())
    return job


@pytest.mark.parametrize("step", [500, pytest.param(20, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_typed_error_and_leaves_nothing(job, step):
    """However far the pack has come by then."""
    before, present = digests(job.out.parent), names(job.out.parent)
    limit = 0
    while (outcome := Child(job, functools.partial(limit_file_size, limit)).outcome()).error is not None:
        error, message = outcome.error
        assert error is OutputError, f"{limit} bytes: {message}"
        assert message == f"{job.out.resolve()}: {FULL}"
        assert digests(job.out.parent) == before
        assert names(job.out.parent) == present
        limit += step
    assert limit > 4000
    assert tallstore.verify(job.out) == []


def test_a_full_disk_ends_dry_runs_too(job, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = names(tmp_path)
    dry = Job(*inputs, job.out, {**OPTIONS, "dry_run": True})
    outcome = Child(dry, functools.partial(limit_file_size, 500)).outcome()
    assert outcome.error is not None
    assert outcome.error[0] is OutputError
    assert outcome.error[1].endswith(FULL)
    assert names(tmp_path) == before


SMALL_DISK = "mount -t tmpfs -o size={size} none {place} && exec {python} -c '{script}' {place}"
PACK_TO_IT = """
import sys
from pathlib import Path
import tallstore
place = Path(sys.argv[1])
inputs = Path("inputs")
experts = {name: inputs / f"{name}.safetensors" for name in ("cars", "birds")}
try:
    tallstore.pack(inputs / "base.safetensors", experts, place / "bundle", merged_dtype="float32")
except tallstore.OutputError as error:
    print(type(error).__name__, error)
print([path.name for path in place.iterdir()])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
@pytest.mark.parametrize("size", ["1m", "8m", "24m"])
def test_a_disk_that_is_really_full_is_one_typed_error(tmp_path, size):
    """The scratch file of a large shared vector, which is mapped, among what does not fit."""
    for name in ("inputs", "disk"):
        (tmp_path / name).mkdir()
    large_inputs(tmp_path / "inputs", tensors=1, numel=6 << 20)
    unshare = shutil.which("unshare")
    shell = SMALL_DISK.format(size=size, place="disk", python=sys.executable, script=PACK_TO_IT)
    if (
        unshare is None
        or subprocess.run([unshare, "-rm", "mount", "-t", "tmpfs", "none", "disk"], cwd=tmp_path).returncode
    ):
        pytest.skip("may not mount a tmpfs")
    ...
