"""leftovers: what the Hub's client left in its cache when it was killed goes, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tallstore.hub.leftovers import remove_leftovers

COMMIT = "c" * 40


@pytest.fixture
def repository(tmp_path):
    """One of the cache, with what belongs there."""
    root = tmp_path / "models--user--experts"
    for path in (
        "snapshots/" + COMMIT + "/tallstore.json",
        "blobs/" + "a" * 40,
        "refs/main",
        "refs/pr/1",
        "refs/v1.tmp",
    ):
        write(root / path)
    return root


def write(path: Path, content: str = COMMIT, *, minutes_ago: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return age(path, minutes_ago)


def age(path: Path, minutes: int) -> Path:
    then = time.time() - 60 * minutes
    os.utime(path, (then, then))
    return path


def files(repository: Path) -> set[str]:
    return {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}


def left(repository: Path) -> set[str]:
    remove_leftovers(repository / "snapshots" / COMMIT)
    return files(repository)


def test_what_was_made_for_a_moment_goes_when_the_moment_is_over(repository):
    there = files(repository)
    for minutes in (0, 2):
        write(repository / "blobs" / "tmp_0123", "", minutes_ago=minutes)
        age(write(repository / "tmp0123_abc" / "dummy_file_src", "").parent, minutes)
        write(repository / "refs" / "main.0123abcd.tmp", minutes_ago=minutes)
        write(repository / "refs" / "pr" / "1.0123abcd.tmp", minutes_ago=minutes)
        assert len(left(repository) - there) == (0 if minutes else 4)
    assert left(repository) == there


def test_what_is_not_empty_is_no_probe(repository):
    write(repository / "blobs" / "tmp_0123", "weights")
    assert "blobs/tmp_0123" in left(repository)


def test_pieces_stay_while_somebody_downloads(repository):
    there = files(repository)
    write(repository / "blobs" / f"{'b' * 40}.0123.incomplete", minutes_ago=0)
    locks = repository.parent / ".locks" / repository.name
    locks.mkdir(parents=True)
    with FileLock(locks / f"{'b' * 40}.lock"):
        assert len(left(repository) - there) == 1
    assert left(repository) == there
