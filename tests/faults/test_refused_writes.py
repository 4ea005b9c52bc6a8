"""Places that cannot be written to, or inputs that cannot be read: one typed error, and the old state is there."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence

import pytest

import tallstore
from tallstore import files
from tallstore.errors import InputError, OutputError, TallstoreError
from tests.faults import operations
from tests.faults.bundles import digests, large_inputs, names
from tests.faults.children import Child, Outcome, limit_file_size, obeying_permissions
from tests.faults.operations import Operation, everything
from tests.faults.shim import FAIL, FAIL_FROM, SHORT, SIGNAL, faulty_children

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")

FULL = "cannot be written (File too large); make room there, or choose another place"
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ESTALE)
READERS = ("pack over a bundle", "export all over exports", "report over a report", "repack over its groups")
ALL = pytest.mark.slow


def is_one_line_of(outcome: Outcome, *places: object) -> bool:
    """Whether a typed error of one line was raised, which names one of the places."""
    assert outcome.error is not None
    kind, message = outcome.error
    return issubclass(kind, TallstoreError) and "\n" not in message and any(str(place) in message for place in places)


def few(calls: Sequence[object]) -> list[int]:
    """Those of the ordinary run: the last but one is when the new takes the old one's place, or soon after."""
    return sorted({len(calls) // 3, 2 * len(calls) // 3, len(calls) - 2})


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("next_limit", [lambda n: 5 * n + 900, pytest.param(lambda n: n + 150 + n // 16, marks=ALL)])
@pytest.mark.parametrize("name", operations.some())
def test_a_full_disk_is_one_typed_error_and_leaves_nothing(operate, name, next_limit):
    """However far the operation has come by then."""
    operation = operate(name)
    operation.learn()
    limit = refused = 0
    while True:
        operation.begin()
        outcome = operation.run(functools.partial(limit_file_size, limit))
        if outcome.error is None:
            break
        assert is_one_line_of(outcome, operation.place, "user/experts"), f"{limit} bytes: {outcome.error}"
        assert outcome.error[0] is OutputError, f"{limit} bytes: {outcome.error}"
        assert operation.is_sound(), f"{limit} bytes"
        assert operation.is_clean() or operation.keeps, f"{limit} bytes"
        limit, refused = next_limit(limit), refused + 1
    assert operation.undone() == []
    assert refused > 1


@pytest.mark.parametrize("options", [{"dry_run": True}, {"dry_run": True, "method": tallstore.TallMask([0.5, 1.0])}])
def test_a_full_disk_ends_dry_runs_and_trials_too(specimens, tmp_path, monkeypatch, options):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if "method" in options:
        options = {**options, "evaluate": never}
    call = functools.partial(operations.pack, specimens.base, specimens.experts, tmp_path / "bundle", **options)
    outcome = Child(call, functools.partial(limit_file_size, 500)).outcome()
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


# --- permissions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_only():
    """Makes directories, and those in them, read-only until the test ends."""
    changed = []

    def change(*directories):
        for directory in directories:
            for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
                changed.append(folder)
                folder.chmod(0o555)

    yield change
    for folder in changed:
        if folder.exists():
            folder.chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="root obeys no permissions")
@pytest.mark.parametrize("name", operations.some())
def test_a_directory_that_is_read_only_is_one_typed_error(operate, read_only, name):
    operation = operate(name)
    operation.learn()
    operation.begin()
    before = everything(operation.place)
    read_only(operation.place)
    outcome = operation.run(obeying_permissions)
    assert is_one_line_of(outcome, operation.place, "user/experts"), outcome.error
    assert issubclass(outcome.error[0], OutputError)
    assert everything(operation.place) == before
    for folder in (operation.place, *operation.place.rglob("*")):
        folder.chmod(folder.stat().st_mode | stat.S_IWUSR)
    assert operation.run(obeying_permissions).error is None
    assert operation.undone() == []


@pytest.mark.skipif(sys.platform != "linux", reason="root obeys no permissions")
@pytest.mark.parametrize("name", ["pack over a bundle", "export over an export", "pull over an older bundle"])
def test_a_target_that_is_read_only_is_one_typed_error(operate, read_only, name):
    """Its old content could not be removed, though it could be replaced."""
    operation = operate(name)
    operation.learn()
    operation.begin()
    before = everything(operation.place)
    target = operation.place / next(iter(operation.targets))
    read_only(target)
    outcome = operation.run(obeying_permissions)
    assert is_one_line_of(outcome, target), outcome.error
    assert issubclass(outcome.error[0], OutputError)
    assert operation.is_old()
    assert everything(operation.place) == before or operation.keeps
    for folder in (target, *target.rglob("*")):
        folder.chmod(folder.stat().st_mode | stat.S_IWUSR)
    assert operation.run(obeying_permissions).error is None
    assert operation.undone() == []


# --- calls of the system that fail ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    with faulty_children(tmp_path_factory.mktemp("library")) as started:
        if started is None:
            pytest.skip("no C compiler, or no Linux")
        yield started


def judge(operation: Operation, outcome: Outcome, moment: str, *named: object) -> None:
    """Either it was of no consequence, or it was told in one line, and nothing has changed."""
    if outcome.error is None:
        assert operation.is_new(), moment
        return
    assert is_one_line_of(outcome, *named), f"{moment}: {outcome.error}"
    assert operation.is_sound(), moment


@pytest.mark.parametrize("choose", [few, pytest.param(operations.spread, marks=ALL)])
@pytest.mark.parametrize("name", operations.some())
def test_a_write_that_fails_is_one_typed_error(specimens, operate, faulty, name, choose):
    """One call of the system on what is written, of whatever kind."""
    operation = operate(name)
    operation.learn()
    operation.begin()
    calls = faulty.calls(operation.call, operation.conditions, operation.place)
    listed = ["user/experts", *(path.as_posix() for path in digests(specimens.new / "bundle"))]
    for at in choose(calls):
        number = ERRORS[at % len(ERRORS)]
        moment = f"call {at} of {len(calls)}, {calls[at]}: {os.strerror(number)}"
        operation.begin()
        outcome = faulty.run(operation.call, operation.conditions, operation.place, at=at, how=FAIL, number=number)
        judge(operation, outcome, moment, operation.place, *listed)
        assert outcome.error is None or operation.is_clean() or operation.keeps, moment
    assert operation.run_again() == []


@pytest.mark.parametrize("choose", [few, pytest.param(operations.spread, marks=ALL)])
@pytest.mark.parametrize("name", operations.some(1, READERS))
def test_a_read_that_fails_is_one_typed_error(specimens, operate, faulty, name, choose):
    """One call of the system on what is read: a checkpoint, or a bundle's file."""
    operation = operate(name)
    operation.learn()
    operation.begin()
    root = specimens.root / "inputs" if "pack" in name else specimens.new / "bundle"
    calls = faulty.calls(operation.call, operation.conditions, root)
    listed = [path.as_posix() for path in digests(root)]
    for at in choose(calls):
        moment = f"call {at} of {len(calls)}, {calls[at]}"
        operation.begin()
        outcome = faulty.run(operation.call, operation.conditions, root, at=at, how=FAIL, number=errno.EIO)
        judge(operation, outcome, moment, root, *listed)
        assert operation.is_clean(), moment


@pytest.mark.parametrize("choose", [few, pytest.param(operations.spread, marks=ALL)])
@pytest.mark.parametrize("name", operations.some(2, READERS))
def test_reads_and_writes_that_come_in_parts_are_of_no_consequence(specimens, operate, faulty, name, choose):
    operation = operate(name)
    operation.learn()
    for root in (specimens.root, operation.place):
        operation.begin()
        calls = faulty.calls(operation.call, operation.conditions, root, SHORT)
        for at in choose(calls):
            operation.begin()
            outcome = faulty.run(operation.call, operation.conditions, root, at=at, how=SHORT, number=0)
            assert outcome.error is None, f"call {at} of {len(calls)}, {calls[at]}: {outcome.error}"
            assert operation.undone() == [], f"call {at} of {len(calls)}, {calls[at]}"


@pytest.mark.parametrize(("how", "number"), [(FAIL_FROM, errno.EIO), pytest.param(SIGNAL, signal.SIGKILL, marks=ALL)])
@pytest.mark.parametrize("choose", [few, pytest.param(operations.spread, marks=ALL)])
@pytest.mark.parametrize("name", operations.some())
def test_a_disk_that_goes_away_for_good(operate, faulty, name, choose, how, number):  # noqa: PLR0917 - as pytest calls it
    """From some call on nothing works, or the process is killed just before it; the next run cleans up what is left."""
    operation = operate(name)
    operation.learn()
    operation.begin()
    calls = faulty.calls(operation.call, operation.conditions, operation.place)
    for at in choose(calls):
        moment = f"call {at} of {len(calls)}, {calls[at]}"
        operation.begin()
        outcome = faulty.run(operation.call, operation.conditions, operation.place, at=at, how=how, number=number)
        if how == SIGNAL:
            assert outcome.exit_code == -number or at > 0.9 * len(calls), moment
        elif outcome.error is not None:
            assert is_one_line_of(outcome, ""), f"{moment}: {outcome.error}"
        assert operation.is_sound(), moment
        assert operation.run_again() == [], moment


# --- other refusals ---------------------------------------------------------------------------------------------------


def test_a_companion_file_that_cannot_be_read_is_an_error_of_the_input(specimens, tmp_path, monkeypatch):
    read: Callable[..., object] = files.hash_file

    def refuse(path):
        if path.parent.name == "birds":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(files, "hash_file", refuse)
    with pytest.raises(InputError, match=r"expert 'birds' .*config\.json cannot be read: Permission denied"):
        operations.pack(specimens.base, specimens.experts, tmp_path / "bundle")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        ("evaluate", OSError(errno.ENOSPC, "No space left on device")),
        ("evaluate", TimeoutError(errno.ETIMEDOUT, "Connection timed out")),
        ("progress", BrokenPipeError(errno.EPIPE, "Broken pipe")),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_what_callbacks_raise_is_not_taken_for_the_disk(specimens, tmp_path, there, callback, error):
    def fail(*_arguments):
        raise error

    place = tmp_path / "place"
    if there:
        shutil.copytree(specimens.old, place)
    else:
        place.mkdir()
    before = digests(place)
    with pytest.raises(type(error), match=error.strerror):
        operations.pack(specimens.base, specimens.experts, place / "bundle", **{callback: fail})
    assert digests(place) == before
    assert names(place) == (["bundle"] if there else [])
