"""What is published: a wheel with the package alone, and an sdist from which it can be built and tested."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest

import tallstore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "spec" / "vectors" / "valid" / "worked-example" / "bundle"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@dataclass(frozen=True)
class Built:
    """The two files of a release; the wheel was built from the sdist."""

    wheel: Path
    sdist: Path

    @property
    def metadata(self) -> Message:
        """The wheel's METADATA."""
        with zipfile.ZipFile(self.wheel) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(wheel.read(name))


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command, which must succeed, and return what it printed."""
    result = subprocess.run(
        [str(part) for part in command],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", "COLUMNS": "120", **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def files_below(*places: str) -> Iterator[str]:
    """Files of the project, as they lie here, relative to its root."""
    for place in places:
        for path in sorted((ROOT / place).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A folder with nothing but the wheel's content; what it depends on is this environment's."""
    target = tmp_path_factory.mktemp("installed") / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(*pip, "--target", target, built.wheel, cwd=target.parent)
    return target


def test_an_index_would_take_both(built):
    run(sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist, cwd=built.wheel.parent)


def test_the_metadata_say_what_the_project_is(built):
    metadata = built.metadata
    assert (metadata["Name"], metadata["Version"]) == ("tallstore", tallstore.__version__)
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = set(metadata.get_all("Classifier", ()))
    assert {f"Programming Language :: Python :: {version}" for version in PYTHONS} <= classifiers
    assert "Typing :: Typed" in classifiers
    assert metadata["Metadata-Version"] == "2.4"
    assert metadata.get_payload(decode=True).decode("utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == set(files_below("tallstore"))
    assert "tallstore/py.typed" in names


def test_the_sdist_holds_what_building_and_testing_need(built):
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(files_below("tallstore", "tests", "spec", "benchmarks", "examples")) <= names
    assert {
        "Makefile",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "pyproject.toml",
    } <= names


def test_the_installed_wheel_runs(built, installed, tmp_path):
    place = "import tallstore; print(tallstore.__file__)"
    assert Path(run(sys.executable, "-c", place, cwd=tmp_path, PYTHONPATH=str(installed)).strip()) == (
        installed / "tallstore" / "__init__.py"
    )
    for program in ([sys.executable, "-m", "tallstore"], [installed / "bin" / "tallstore"]):
        printed = run(*program, "--version", cwd=tmp_path, PYTHONPATH=str(installed))
        assert printed == f"tallstore {tallstore.__version__}\n"
    verified = run(sys.executable, "-m", "tallstore", "verify", BUNDLE, cwd=tmp_path, PYTHONPATH=str(installed))
    assert verified.startswith("no problems: ")


def test_the_sdist_passes_its_tests(built, tmp_path):
    """Those of the format, which read every vector, and the drift checks."""
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    pytest_options = ("-q", "-p", "no:cacheprovider", "tests/conformance", "tests/unit/test_layout.py")
    assert " passed" in run(sys.executable, "-m", "pytest", *pytest_options, cwd=root)
    for script in ("make_vectors.py", "make_schema.py"):
        run(sys.executable, root / "spec" / script, "--check", cwd=root, PYTHONPATH=str(root))
