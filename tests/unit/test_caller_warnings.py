"""A warning shows the user's line, however deep in the package its cause was found."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from tallstore.format import layout
from tallstore.format.manifest import CompanionFile, FileEntry
from tests.bundle_builder import Bundle, Group, Task

ROOT = Path(__file__).parents[2]
NEWER = ROOT / "spec" / "vectors" / "valid" / "newer-minor" / "bundle"

# A draft's reader reads nothing that is newer.
RELEASED = "from tallstore.format import versions; versions.FORMAT_VERSION = '1.0'"
OPEN = "bundle = tallstore.open_bundle(path)"
READ = "weights = bundle.state_dict(bundle.tasks[0])"
EXPORT = "done = export(bundle, bundle.tasks[0], path + '-out')"


@pytest.fixture
def with_code(tmp_path):
    """A bundle that carries a file which an export leaves out."""
    base = {"w": torch.ones(3)}
    group = Group(tmp_path / "bundle", base)
    task = Task(group, "t")
    task.same("w")
    empty, git_oid = hashlib.sha256(b"").hexdigest(), hashlib.sha1(b"blob 0\0").hexdigest()  # noqa: S324 - as git does
    task.companions.append(CompanionFile(name="modeling.py", size=0, sha256=empty))
    path = tmp_path / "bundle" / layout.companion_path(empty)
    path.parent.mkdir()
    path.touch()

    def list_it(manifest):
        entry = FileEntry(path=layout.companion_path(empty), size=0, sha256=empty, git_oid=git_oid)
        return msgspec.structs.replace(
            manifest, files=tuple(sorted([*manifest.files, entry], key=lambda file: file.path))
        )

    return Bundle(tmp_path / "bundle", base, [group], [task], edit_manifest=list_it).seal()


def warnings_of(tmp_path: Path, path: Path, first: str = "") -> list[tuple[str, str]]:
    """What a script of the user's that does all of it warns of: where and what, and the line that is shown."""
    script = tmp_path / "mine.py"
    script.write_text(
        f"import tallstore; {first}\nfrom tallstore.exporting import export\npath = {str(path)!r}\n"
        f"{OPEN}\n{READ}\n{EXPORT}\n"
    )
    run = subprocess.run(
        [sys.executable, script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    lines = run.stderr.replace(str(script), "mine.py").splitlines()
    return list(zip(lines[::2], map(str.strip, lines[1::2]), strict=True))


def test_an_unknown_key_of_a_newer_bundle(tmp_path):
    bundle = tmp_path / "bundle"
    bundle.symlink_to(NEWER)
    found = warnings_of(tmp_path, bundle, RELEASED)
    opened = [where for where, line in found if line == OPEN]
    read = [where for where, line in found if line == READ]
    assert opened
    assert all(
        where.startswith("mine.py:4: NewerFormatWarning: tallstore.json: ignores 2 unknown keys ") for where in opened
    )
    assert read
    assert all(where.startswith("mine.py:5: NewerFormatWarning: ") for where in read)
    assert any("tasks/" in where for where in read)


def test_a_file_that_an_export_leaves_out(tmp_path, with_code):
    ((where, line),) = warnings_of(tmp_path, with_code)
    assert where.startswith("mine.py:6: UserWarning: left out the companion file 'modeling.py'")
    assert line == EXPORT
