"""What is frozen stays: every vector and schema of a released version is, byte for byte, what it was."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tallstore.format.manifest import FORMAT_VERSION

SPEC = Path(__file__).parents[2] / "spec"
CASES = ("valid/worked-example", "valid/companions", "invalid/ver-1-major")


@pytest.fixture
def freezing(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEC))
    return importlib.import_module("freezing")


@pytest.fixture
def spec(tmp_path):
    """A specification with a few vectors."""
    root = tmp_path / "spec"
    shutil.copytree(SPEC / "schema", root / "schema")
    for case in CASES:
        shutil.copytree(SPEC / "vectors" / case, root / "vectors" / case)
    return root


def test_what_is_frozen_is_as_it_was(freezing):
    assert list(freezing.broken(freezing.digests(SPEC), SPEC)) == []


def test_a_released_version_is_frozen(freezing):
    assert FORMAT_VERSION.endswith("-draft") or SPEC / f"frozen-{FORMAT_VERSION}.txt" in freezing.lists(SPEC)


def test_a_frozen_version_has_all_its_vectors_and_schemas(freezing):
    for page in freezing.lists(SPEC):
        listed = freezing.parsed(page.read_text(encoding="utf-8"))
        assert len(listed) > 400
        assert {f"schema/{name}.schema.json" for name in ("base", "group", "tallstore", "task")} <= listed.keys()


def test_freezing_lists_every_vector_and_schema(freezing, spec, capsys):
    assert freezing.main([], spec, "1.0") == 0
    assert capsys.readouterr().out == "froze 7 vectors and schemas of 1.0 in frozen-1.0.txt\n"
    lines = (spec / "frozen-1.0.txt").read_text().splitlines()
    assert [line[66:] for line in lines] == sorted(
        [
            *(f"schema/{path.name}" for path in (spec / "schema").iterdir()),
            *(f"vectors/{case}" for case in CASES),
        ]
    )
    assert freezing.main(["--check"], spec, "1.0") == 0


def test_a_version_is_frozen_once(freezing, spec, capsys):
    freezing.main([], spec, "1.0")
    before = (spec / "frozen-1.0.txt").read_bytes()
    shutil.copytree(SPEC / "vectors" / "valid" / "rows", spec / "vectors" / "valid" / "rows")
    assert freezing.main([], spec, "1.0") == 1
    assert "frozen-1.0.txt is there: a version is frozen once" in capsys.readouterr().err
    assert (spec / "frozen-1.0.txt").read_bytes() == before
    assert freezing.main([], spec, "1.1") == 0
    assert len((spec / "frozen-1.1.txt").read_text().splitlines()) == 8


def test_a_draft_is_not_frozen(freezing, spec, capsys):
    assert freezing.main([], spec, "1.0-draft") == 1
    assert "1.0-draft is a draft, which is not frozen" in capsys.readouterr().err
    assert freezing.lists(spec) == []


def edit(spec):
    place = spec / "vectors" / "valid" / "companions" / "bundle" / "README.md"
    place.write_bytes(place.read_bytes() + b"\n")


def rename(spec):
    place = spec / "vectors" / "valid" / "companions" / "bundle" / "README.md"
    place.rename(place.with_name("readme.md"))


CHANGES = {
    "edited": (edit, "vectors/valid/companions is other than it was frozen in 1.0: put it back, and add another"),
    "renamed": (rename, "vectors/valid/companions is other than it was frozen in 1.0"),
    "grown": (
        lambda spec: (spec / "vectors/valid/companions/more").touch(),
        "vectors/valid/companions is other than it was frozen in 1.0",
    ),
    "removed": (
        lambda spec: shutil.rmtree(spec / "vectors/invalid/ver-1-major"),
        "vectors/invalid/ver-1-major is missing, and frozen since 1.0: put it back",
    ),
    "schema": (
        lambda spec: (spec / "schema/task.schema.json").write_text("{}"),
        "schema/task.schema.json is other than it was frozen in 1.0",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_or_went_is_named(what, freezing, spec, capsys):
    freezing.main([], spec, "1.0")
    change, problem = CHANGES[what]
    change(spec)
    assert freezing.main(["--check"], spec, "1.1") == 1
    assert problem in capsys.readouterr().err


def test_the_first_releases_bundles_are_frozen_with_them(freezing, spec, capsys):
    release = spec.parent / "tests" / "data" / "first-release"
    release.mkdir(parents=True)
    (release / "weights.json").write_text("{}")
    freezing.main([], spec, "1.0")
    (release / "weights.json").write_text("{ }")
    assert freezing.main(["--check"], spec, "1.0") == 1
    assert "tests/data/first-release is other than it was frozen in 1.0" in capsys.readouterr().err


def test_vectors_may_be_added(freezing, spec):
    freezing.main([], spec, "1.0")
    shutil.copytree(SPEC / "vectors" / "valid" / "rows", spec / "vectors" / "valid" / "rows")
    assert freezing.main(["--check"], spec, "1.0") == 0


def test_the_shell_gives_the_same_sha256(freezing, spec):
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not there")
    case = spec / "vectors" / "valid" / "companions"
    lines = subprocess.run(  # noqa: S602 - what the script's page says
        "find . -type f | LC_ALL=C sort | xargs sha256sum",  # noqa: S607
        shell=True,
        cwd=case,
        check=True,
        capture_output=True,
    ).stdout
    assert freezing.digests(spec)["vectors/valid/companions"] == hashlib.sha256(lines).hexdigest()


def test_the_script_that_writes_vectors_leaves_frozen_ones_alone(freezing, spec, monkeypatch, capsys):
    maker = importlib.import_module("make_vectors")
    monkeypatch.setattr(maker, "SPEC", spec)
    monkeypatch.setattr(maker, "VECTORS", spec / "vectors")
    files = {
        f"{case}/{file.relative_to(SPEC / 'vectors' / case).as_posix()}": file.read_bytes()
        for case in CASES
        for file in (SPEC / "vectors" / case).rglob("*")
        if file.is_file()
    }
    freezing.main([], spec, "1.0")
    capsys.readouterr()
    monkeypatch.setattr(maker, "corpus", lambda: files)
    assert maker.main(["--check"]) == 0
    assert maker.main([]) == 0
    other = files | {"valid/companions/bundle/README.md": b"other"}
    for made in (other, {path: content for path, content in files.items() if not path.startswith("invalid/")}):
        monkeypatch.setattr(maker, "corpus", lambda made=made: made)
        for arguments in ([], ["--check"]):
            assert maker.main(arguments) == 1
            assert "mend second/ so that it makes the same bytes; nothing written" in capsys.readouterr().err
    assert list(freezing.broken(freezing.digests(spec), spec)) == []
