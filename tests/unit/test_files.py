"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from tallstore import files
from tallstore.errors import BundleNotFoundError, OutputBusyError, OutputError
from tallstore.files import hash_file, staged_directory, write_file

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def entries(directory):
    return sorted(path.name for path in directory.iterdir())


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_from_bytes_and_files(tmp_path):
    (tmp_path / "body").write_bytes(b"body" * 1_000_000)
    written = write_file(tmp_path / "file", b"head", tmp_path / "body", b"", b"tail")
    content = b"head" + b"body" * 1_000_000 + b"tail"
    assert (tmp_path / "file").read_bytes() == content
    assert written.size == len(content)
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert written.git_oid == hashlib.sha1(b"blob 4000008\0" + content, usedforsecurity=False).hexdigest()
    assert hash_file(tmp_path / "file") == written
    assert entries(tmp_path) == ["body", "file"]


def test_git_knows_the_empty_file(tmp_path):
    assert write_file(tmp_path / "file").git_oid == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_is_what_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, moment):
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_arguments):
        raise failure

    monkeypatch.setattr(*((files.os, "fsync", fail) if moment == "fsync" else (files.Path, "replace", fail)))
    with pytest.raises(type(failure)):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert entries(tmp_path) == ["file"]


def test_a_part_that_is_missing_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "file", b"head", tmp_path / "missing")
    assert entries(tmp_path) == []


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_directory_appears_when_it_is_filled(tmp_path):
    target = tmp_path / "new" / "bundle"
    with staged_directory(target) as staging:
        assert not target.exists()
        write_file(staging / "file", b"x")
        (staging / "folder").mkdir()
        assert not target.exists()
    assert entries(target) == ["file", "folder"]
    assert entries(target.parent) == ["bundle"]


@pytest.mark.parametrize("failure", [ValueError("bad input"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("there_before", [False, True])
def test_an_error_leaves_nothing_behind(tmp_path, failure, there_before):
    target = tmp_path / "new" / "bundle"
    if there_before:
        target.mkdir(parents=True)
        (target / "old").write_bytes(b"old")

    def fill():
        with staged_directory(target) as staging:
            (staging / "folder").mkdir()
            write_file(staging / "folder" / "file", b"x")
            raise failure

    with pytest.raises(type(failure)):
        fill()
    if there_before:
        assert entries(target) == ["old"]
        assert entries(target.parent) == ["bundle"]
    else:
        assert entries(tmp_path) == []  # nor the folders that were made for it


@pytest.mark.parametrize(
    ("failure", "raised"), [(OSError(errno.EIO, "broken"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_error_while_it_is_put_in_place_leaves_the_old_one(tmp_path, monkeypatch, failure, raised):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_bytes(b"old")

    def fail(*_arguments):
        raise failure

    monkeypatch.setattr(files, "_exchange", fail)
    with pytest.raises(raised), staged_directory(target) as staging:
        write_file(staging / "new", b"new")
    assert entries(tmp_path) == ["bundle"]
    assert entries(target) == ["old"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_is_replaced(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_arguments: False)
    target = tmp_path / "bundle"
    (target / "folder").mkdir(parents=True)
    (target / "folder" / "old").write_bytes(b"old")
    with staged_directory(target) as staging:
        assert entries(target) == ["folder"]
        write_file(staging / "new", b"new")
    assert entries(tmp_path) == ["bundle"]
    assert entries(target) == ["new"]


def test_stepping_aside_is_taken_back_on_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_arguments: False)
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    replace = files.Path.replace

    def fail_the_second_time(self, other):
        if self.name.endswith(".partial") and other == target:
            raise KeyboardInterrupt
        return replace(self, other)

    monkeypatch.setattr(files.Path, "replace", fail_the_second_time)
    with pytest.raises(KeyboardInterrupt), staged_directory(target) as staging:
        (staging / "new").mkdir()
    assert entries(tmp_path) == ["bundle"]
    assert entries(target) == ["old"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_a_directory_is_replaced_in_one_step(tmp_path):
    """Whoever looks sees the old directory or the new one, never none."""
    target = tmp_path / "bundle"
    with staged_directory(target) as staging:
        write_file(staging / "0", b"")
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            seen.add(tuple(path.name for path in target.iterdir()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(1, 50):
            with staged_directory(target) as staging:
                write_file(staging / str(number), b"")
    finally:
        done.set()
        watcher.join()
    # A look that began in the old directory may find it emptied; it never finds two files or a partial name.
    assert seen <= {(str(number),) for number in range(50)} | {()}


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "bundle").mkdir()
    with staged_directory(tmp_path / "bundle") as staging:
        write_file(staging / "file", b"x")
    assert entries(tmp_path / "bundle") == ["file"]
    assert entries(tmp_path) == ["bundle"]


@posix
def test_behind_a_link_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with staged_directory(tmp_path / "link") as staging:
        write_file(staging / "new", b"x")
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path) == ["link", "real"]
    assert entries(tmp_path / "real") == ["new"]


@posix
def test_a_link_under_the_staging_name_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    (tmp_path / ".bundle.partial").symlink_to("precious")
    with pytest.raises(OutputError, match="bundle"), staged_directory(tmp_path / "bundle"):
        pytest.fail("was staged")
    assert entries(tmp_path / "precious") == ["file"]


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match="cannot write beside it"), staged_directory(tmp_path / "file" / "bundle"):
        pytest.fail("was staged")
    assert entries(tmp_path) == ["file"]


def test_what_a_block_left_in_the_staging_directory_is_not_seen_by_the_next(tmp_path):
    staging = tmp_path / ".bundle.partial"
    (staging / "folder").mkdir(parents=True)
    (staging / "folder" / "file").write_bytes(b"x")
    (staging / "link").symlink_to(tmp_path)
    (staging / ".holder").write_text("12345")
    with staged_directory(tmp_path / "bundle") as staged:
        write_file(staged / "file", b"x")
    assert entries(tmp_path) == ["bundle"]
    assert entries(tmp_path / "bundle") == ["file"]


# --- other processes --------------------------------------------------------------------------------------------------

HOLD = textwrap.dedent(
    """
    import signal, sys
    from pathlib import Path
    from tallstore.files import staged_directory, write_file

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever began the tests may have ignored it
    with staged_directory(Path(sys.argv[1])) as staging:
        (staging / "folder").mkdir()
        write_file(staging / "folder" / "half", b"x")
        print("holding", flush=True)
        sys.stdin.read()
    """
)


@pytest.fixture
def holder(tmp_path):
    """A process that has begun to fill a directory, and waits until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "bundle"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.communicate()


@posix
def test_a_second_writer_is_told_who_is_writing(tmp_path, holder):
    with (
        pytest.raises(
            OutputBusyError, match=rf"process {holder.pid} on \S+ \(since 20..-..-.. ..:..:..\) is writing it"
        ),
        staged_directory(tmp_path / "bundle"),
    ):
        pytest.fail("was staged")
    holder.communicate("")
    assert holder.returncode == 0
    assert entries(tmp_path / "bundle") == ["folder"]
    with staged_directory(tmp_path / "bundle") as staging:
        write_file(staging / "file", b"x")
    assert entries(tmp_path / "bundle") == ["file"]


@posix
def test_another_target_is_not_busy(tmp_path, holder):
    with staged_directory(tmp_path / "other") as staging:
        write_file(staging / "file", b"x")
    assert entries(tmp_path / "other") == ["file"]


@posix
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not (tmp_path / "bundle").exists()
    assert entries(tmp_path) == [".bundle.partial"]
    with staged_directory(tmp_path / "bundle") as staging:
        assert entries(staging) == [".holder"]
        write_file(staging / "file", b"x")
    assert entries(tmp_path) == ["bundle"]
    assert entries(tmp_path / "bundle") == ["file"]


@posix
def test_an_interrupted_process_leaves_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGINT)
    holder.communicate()
    assert holder.returncode != 0
    assert entries(tmp_path) == []


@posix
def test_two_threads_of_one_process_exclude_each_other(tmp_path):
    with staged_directory(tmp_path / "bundle") as staging:
        write_file(staging / "file", b"x")
        with pytest.raises(OutputBusyError), staged_directory(tmp_path / "bundle"):
            pytest.fail("was staged")
    assert entries(tmp_path / "bundle") == ["file"]


@posix
def test_writers_of_one_target_in_turn_and_at_once_leave_a_whole_directory(tmp_path):
    """Eight threads replace the same directory again and again: each time whole, or refused as busy."""
    target = tmp_path / "bundle"
    failures = []

    def replace(writer):
        for turn in range(20):
            try:
                with staged_directory(target) as staging:
                    for number in range(3):
                        write_file(staging / f"{writer}-{turn}-{number}", b"x")
            except OutputBusyError:  # noqa: PERF203 - each turn is a try of its own
                continue
            except Exception as error:  # noqa: BLE001 - any other is what the test looks for
                failures.append(error)

    threads = [threading.Thread(target=replace, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(entries(target)) == 3
    assert len({name.rsplit("-", 1)[0] for name in entries(target)}) == 1
    assert entries(tmp_path) == ["bundle"]


# --- room beside a target ---------------------------------------------------------------------------------------------


def test_room_is_empty_beside_the_target_and_gone_afterwards(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (tmp_path / ".bundle.partial").mkdir()
    (tmp_path / ".bundle.partial" / "left").write_text("by a process that was killed")
    with files.room_beside(target, lambda: None) as room:
        assert [path.name for path in room.iterdir() if not path.name.startswith(".")] == []
        (room / "new").write_text("x")
        files.move_in(room, target, ["new"])
    assert entries(tmp_path) == ["bundle"]
    with contextlib.suppress(ZeroDivisionError), files.room_beside(target, lambda: None) as room:
        (room / "half").write_text("x")
        raise ZeroDivisionError
    assert entries(tmp_path) == ["bundle"]
    assert entries(target) == ["new"]


def test_who_is_not_ready_leaves_what_others_gathered(tmp_path):
    with contextlib.suppress(ZeroDivisionError), files.gathered_files(tmp_path / "bundle") as gathered:
        (gathered / "downloaded").write_text("x")
        raise ZeroDivisionError

    def not_ready():
        raise BundleNotFoundError("there is none")

    with pytest.raises(BundleNotFoundError), files.room_beside(tmp_path / "bundle", not_ready):
        pytest.fail("began")
    assert (tmp_path / ".bundle.partial" / "downloaded").read_text() == "x"
    with pytest.raises(BundleNotFoundError), files.room_beside(tmp_path / "other", not_ready):
        pytest.fail("began")
    assert entries(tmp_path) == [".bundle.partial"]


def test_files_move_to_where_they_were(tmp_path):
    for path in ("a", "b/c/d", "b/e"):
        (tmp_path / "from" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / path).write_text(path)
    (tmp_path / "to" / "b").mkdir(parents=True)
    files.move_in(tmp_path / "from", tmp_path / "to", ["b/c/d", "a"])
    assert (tmp_path / "to" / "b" / "c" / "d").read_text() == "b/c/d"
    assert entries(tmp_path / "to") == ["a", "b"]
    assert (tmp_path / "from" / "b" / "e").exists()


@posix
def test_files_move_along_no_link(tmp_path):
    (tmp_path / "from" / "b").mkdir(parents=True)
    (tmp_path / "from" / "b" / "c").write_text("new")
    (tmp_path / "to").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to" / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="b: is a link"):
        files.move_in(tmp_path / "from", tmp_path / "to", ["b/c"])
    assert entries(tmp_path / "elsewhere") == []
