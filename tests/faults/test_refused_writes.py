"""Places that cannot be written to, or are being written to: one typed error, nothing left behind, inputs untouched."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import tallstore
from tallstore import files
from tallstore.errors import InputError, OutputBusyError, OutputError
from tests.faults.bundles import digests, large_inputs, names, small_inputs
from tests.faults.children import Child, Job, limit_file_size

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")

FULL = "cannot be written (File too large); make room there, or choose another place"
OPTIONS = {"embed_base": True, "overwrite": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Small ones; no test modifies them."""
    root = tmp_path_factory.mktemp("inputs")
    made = small_inputs(root)
    before = digests(root)
    yield made
    assert digests(root) == before


@pytest.fixture(params=[False, True], ids=["a free place", "over a bundle"])
def job(inputs, tmp_path, request):
    """A pack to a place that is free, or has an older bundle in it."""
    job = Job(*inputs, tmp_path / "place" / "bundle", OPTIONS)
    job.out.parent.mkdir()
    if request.param:
        tallstore.pack(*inputs, job.out, method=tallstore.TallMask())
    return job


# --- a full disk ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("options", [{"dry_run": True}, {"dry_run": True, "method": tallstore.TallMask([0.5, 1.0])}])
def test_a_full_disk_ends_dry_runs_and_trials_too(inputs, tmp_path, monkeypatch, options):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if "method" in options:
        options = {**options, "evaluate": never}
    outcome = Child(Job(*inputs, tmp_path / "bundle", options), functools.partial(limit_file_size, 500)).outcome()
    assert outcome.error is not None
    assert outcome.error[0] is OutputError
    assert outcome.error[1].endswith(FULL)
    assert names(tmp_path) == []


def never(_task, _weights):
    raise AssertionError("there is nothing to evaluate")


FILL = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import tallstore

    disk = Path("disk")
    experts = {name: Path("inputs", name + ".safetensors") for name in ("cars", "birds")}
    for room in map(int, sys.argv[1:]):
        with open(disk / "ballast", "wb") as ballast:
            status = os.statvfs(disk)
            os.posix_fallocate(ballast.fileno(), 0, status.f_bavail * status.f_frsize - room)
        try:
            tallstore.pack("inputs/base.safetensors", experts, disk / "bundle", merged_dtype="float32")
            print("packed")
        except tallstore.OutputError as error:
            print(error)
        print(*sorted(path.name for path in disk.iterdir()))
        os.unlink(disk / "ballast")
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
def test_a_disk_that_is_really_full_is_one_typed_error(tmp_path):
    """Neither the files of the bundle fit, nor the scratch file of a large shared vector, which is mapped."""
    for name in ("inputs", "disk"):
        (tmp_path / name).mkdir()
    large_inputs(tmp_path / "inputs", tensors=1, numel=5 << 20)
    mount = [
        shutil.which("unshare") or "false",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o size=100m none disk && "$@"',
        "sh",
    ]
    if subprocess.run([*mount, "true"], cwd=tmp_path, check=False, capture_output=True).returncode:
        pytest.skip("no disk can be made here")
    rooms = [0, 8 << 20, 22 << 20, 60 << 20]
    command = [*mount, sys.executable, "-c", FILL, *map(str, rooms)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full = f"{(tmp_path / 'disk' / 'bundle').resolve()}: " + FULL.replace("File too large", "No space left on device")
    assert done.stdout.splitlines() == [full, "ballast"] * 3 + ["packed", "ballast bundle"]


# --- other refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_read_only_is_one_typed_error(job):
    before, parent = digests(job.out.parent), job.out.parent
    parent.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot write beside it"):
            job.run()
        assert digests(parent) == before
    finally:
        parent.chmod(0o755)
    job.run()
    assert names(parent) == ["bundle"]


def test_a_companion_file_that_cannot_be_read_is_an_error_of_the_input(job, monkeypatch):
    read = files.hash_file

    def refuse(path):
        if path.parent.name == "birds":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    before = digests(job.out.parent)
    monkeypatch.setattr(files, "hash_file", refuse)
    with pytest.raises(InputError, match=r"expert 'birds' .*config\.json cannot be read: Permission denied"):
        job.run()
    assert digests(job.out.parent) == before


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        ("evaluate", OSError(errno.ENOSPC, "No space left on device")),
        ("evaluate", TimeoutError(errno.ETIMEDOUT, "Connection timed out")),
        ("progress", BrokenPipeError(errno.EPIPE, "Broken pipe")),
    ],
)
def test_what_callbacks_raise_is_not_taken_for_the_disk(job, callback, error):
    def fail(*_arguments):
        raise error

    before = digests(job.out.parent)
    with pytest.raises(type(error), match=error.strerror):
        tallstore.pack(job.base, job.experts, job.out, overwrite=True, **{callback: fail})
    assert digests(job.out.parent) == before
    assert names(job.out.parent) in ([], ["bundle"])


# --- two at once ------------------------------------------------------------------------------------------------------


def test_two_packs_to_one_place_at_once(inputs, tmp_path):
    """The second is refused, the first finishes undisturbed."""
    (tmp_path / "large").mkdir()
    first = Job(*large_inputs(tmp_path / "large", tensors=4, numel=1 << 18), tmp_path / "place" / "bundle", {})
    second = Job(*inputs, first.out, OPTIONS)
    child = Child(first)
    holder = tmp_path / "place" / ".bundle.partial" / ".holder"
    while not (holder.exists() and holder.read_text()):
        time.sleep(0.001)
    child.send(signal.SIGSTOP)
    try:
        with pytest.raises(OutputBusyError, match=f"process {child.process.pid} is writing it"):
            second.run()
        assert not first.out.exists()
    finally:
        child.send(signal.SIGCONT)
    assert child.outcome().exit_code == 0
    assert names(first.out.parent) == ["bundle"]
    assert tallstore.verify(first.out) == []
    with tallstore.open_bundle(first.out) as bundle:
        assert bundle.tasks == ("cars", "birds")
        assert len(bundle.keys("cars")) == 4
    second.run()
    assert names(first.out.parent) == ["bundle"]
    assert tallstore.verify(first.out) == []


def test_an_export_to_a_full_disk_is_one_typed_error_and_leaves_nothing(inputs, tmp_path):
    base, experts = inputs
    task = next(iter(experts))
    tallstore.pack(base, experts, tmp_path / "bundle", embed_base=True)
    program = textwrap.dedent(
        """
        import resource, sys, tallstore
        from tallstore.exporting import export
        bundle, task, out = sys.argv[1:]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            export(tallstore.open_bundle(bundle), task, out)
        except tallstore.OutputError as error:
            print(error)
        """
    )
    arguments = [str(tmp_path / "bundle"), task, str(tmp_path / "exported")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True)
    assert done.stdout == f"{(tmp_path / 'exported').resolve()}: {FULL}\n"
    assert names(tmp_path) == ["bundle"]
