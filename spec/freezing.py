"""Freeze the vectors and schemas of a version, and its bundles in the tests: from then on, none changes or goes.

    python spec/freezing.py            writes frozen-1.0.txt, once
    python spec/freezing.py --check    compares what is there with every such list; exits with 1 if something differs

A list has a line for each vector and schema, its sha256 first: of a schema, the file's; of a vector, and of the bundles
of the first release, that of what

    find . -type f | LC_ALL=C sort | xargs sha256sum

prints in its directory. Vectors that no list names may be added, and changed until a list names them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from second.shards import FORMAT_VERSION

SPEC = Path(__file__).resolve().parent
RELEASE = "tests/data/first-release"
_KINDS = ("valid", "invalid")


def lists(spec: Path) -> list[Path]:
    """The lists of all versions that are frozen."""
    return sorted(spec.glob("frozen-*.txt"))


def digest(files: Mapping[str, bytes]) -> str:
    """The sha256 of a directory, of its files by path."""
    lines = [f"{hashlib.sha256(files[path]).hexdigest()}  ./{path}\n" for path in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digests(spec: Path) -> dict[str, str]:
    """What is there: the sha256 of schemas and vectors by path in *spec*, and of the first release's bundles."""
    schemas = {f"schema/{path.name}": path.read_bytes() for path in (spec / "schema").glob("*.json")}
    found = {path: hashlib.sha256(content).hexdigest() for path, content in schemas.items()}
    for kind in _KINDS:
        for case in (spec / "vectors" / kind).iterdir():
            found[f"vectors/{kind}/{case.name}"] = digest(_contents(case))
    if (release := spec.parent / RELEASE).is_dir():
        found[RELEASE] = digest(_contents(release))
    return found


def _contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def parsed(text: str) -> dict[str, str]:
    """A list: sha256 by path."""
    rows = [line.split("  ", 1) for line in text.splitlines()]
    return {path: sha256 for sha256, path in rows}


def written(found: Mapping[str, str]) -> str:
    """A list as it is written."""
    return "".join(f"{found[path]}  {path}\n" for path in sorted(found))


def broken(found: Mapping[str, str], spec: Path) -> Iterator[str]:
    """What of the frozen vectors and schemas is not in *found* as it was, a line each."""
    for page in lists(spec):
        version = page.stem.removeprefix("frozen-")
        for path, sha256 in parsed(page.read_text(encoding="utf-8")).items():
            if path not in found:
                yield f"{path} is missing, and frozen since {version}: put it back"
            elif found[path] != sha256:
                yield f"{path} is other than it was frozen in {version}: put it back, and add another beside it"


def main(arguments: Sequence[str] | None = None, spec: Path = SPEC, version: str = FORMAT_VERSION) -> int:
    """Write the list of a version, or check all; the exit code."""
    parser = argparse.ArgumentParser(description="Freeze the vectors and schemas of a version of the tallstore format.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something frozen differs")
    options = parser.parse_args(arguments)
    found = digests(spec)
    problems = list(broken(found, spec))
    page = spec / f"frozen-{version}.txt"
    if not options.check and version.endswith("-draft"):
        problems.append(f"{version} is a draft, which is not frozen: give second/shards.py the version first")
    elif not options.check and page.exists():
        problems.append(f"{page.name} is there: a version is frozen once")
    for line in problems:
        print(line, file=sys.stderr)
    if problems or options.check:
        return 1 if problems else 0
    page.write_text(written(found), encoding="utf-8", newline="\n")
    print(f"froze {len(found)} vectors and schemas of {version} in {page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
