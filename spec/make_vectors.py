"""Write the vectors of the tallstore format, from a second implementation of it.

    python spec/make_vectors.py            writes spec/vectors/
    python spec/make_vectors.py --check    compares them byte for byte, and exits with 1 if a file differs

What is frozen (see ``freezing.py``) is never written with other bytes.

The bytes depend on no library's version. zstd frames are put together by hand (``second/frames.py``); a few that
libzstd wrote, with entropy coding and matches, are kept in hexadecimal, and zstandard only decodes them here, to prove
what they hold. What a vector is made of is described in ``spec/README.md``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import zstandard
from freezing import SPEC, broken, digest, digests
from second.bundles import dump, seal
from second.elements import CHUNK, array
from second.frames import frame, planes
from second.invalid import INVALID as INVALID_FIRST
from second.invalid_kinds import INVALID_KINDS
from second.shards import safetensors
from second.valid import LIBZSTD_FRAMES
from second.valid import VALID as VALID_FIRST
from second.valid_centre import VALID_CENTRE
from second.valid_grown import VALID_GROWN
from second.valid_kinds import VALID_KINDS

VECTORS = SPEC / "vectors"
VALID = VALID_FIRST | VALID_KINDS | VALID_CENTRE | VALID_GROWN
INVALID = INVALID_FIRST | INVALID_KINDS


def valid_case(name: str) -> dict[str, bytes]:
    """The files of a valid vector."""
    make = VALID[name]
    case = make()
    doc = (make.func if isinstance(make, partial) else make).__doc__ or ""
    files = {f"bundle/{path}": content for path, content in seal(case.draft).items()}
    suffix = ".zst" if case.zipped else ""
    expected = safetensors(case.draft.expected)
    files["expected.safetensors" + suffix] = frame(expected) if case.zipped else expected
    if case.base is not None:
        files["base.safetensors" + suffix] = frame(case.base) if case.zipped else case.base
    files["case.json"] = dump(
        {
            "description": doc.strip(),
            "rules": case.rules.split(),
            "base": None if case.base is None else "base.safetensors" + suffix,
            "expected": "expected.safetensors" + suffix,
            "not_fetched": case.not_fetched,
            "warns": case.warns,
        }
    )
    return files


def invalid_case(name: str) -> dict[str, bytes]:
    """The files of an invalid vector."""
    case = INVALID[name]
    rule = "-".join(name.split("-")[:2]).upper()
    draft = case.make()
    for change in case.changes:
        change(draft)
    files = {str(PurePosixPath("bundle") / path): content for path, content in seal(draft).items()}
    files = {path.replace("bundle/../", ""): content for path, content in files.items()}
    suffix = ".zst" if case.zipped else ""
    if case.base is not None:
        files["base.safetensors" + suffix] = frame(case.base) if case.zipped else case.base
    files["case.json"] = dump(
        {
            "description": f"Refused under {rule}: {case.problem}.",
            "rule": rule,
            "found_by": list(case.found_by),
            "problem": case.problem,
            "base": None if case.base is None else "base.safetensors" + suffix,
            "setup": draft.setup,
        }
    )
    return files


def corpus() -> dict[str, bytes]:
    """Every file under spec/vectors."""
    check_libzstd_frames()
    files = {f"valid/{name}/{path}": content for name in VALID for path, content in valid_case(name).items()}
    return files | {
        f"invalid/{name}/{path}": content for name in INVALID for path, content in invalid_case(name).items()
    }


def check_libzstd_frames() -> None:
    """Prove that the frames kept in hexadecimal, and the ones made by hand, hold what they should."""
    squares = bytes(i * i % 23 for i in range(600))
    ramp = planes(array("F32", (40,), (np.arange(40) - 20) * 0.125).raw, 4)
    decode = zstandard.ZstdDecompressor().decompress
    for name, content in (("level1", squares), ("level19", squares), ("planes", ramp)):
        if decode(bytes.fromhex(LIBZSTD_FRAMES[name])) != content:
            raise ValueError(f"frame {name} does not hold what it should")
    for content in (squares, ramp, bytes(CHUNK), b"x"):
        if decode(frame(content)) != content or decode(frame(content, window_log=20, checksum=True)) != content:
            raise ValueError("a frame made by hand does not decode")


def differences(files: Mapping[str, bytes], root: Path) -> Iterator[str]:
    """What differs between *files* and the directory *root*, a line each."""
    there = (
        {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} if root.exists() else set()
    )
    for path, content in files.items():
        if path not in there:
            yield f"{path} is missing"
        elif (found := (root / path).read_bytes()) != content:
            shared = min(len(found), len(content))
            at = next((i for i in range(shared) if found[i] != content[i]), shared)
            yield f"{path} differs from byte {at} on"
    yield from (f"{path} is stale: nothing makes it" for path in sorted(there - files.keys()))


def digests_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """The sha256 of every vector that *files* makes, and of all else as it is there."""
    cases: dict[str, dict[str, bytes]] = {}
    for path, content in files.items():
        kind, name, inner = path.split("/", 2)
        cases.setdefault(f"vectors/{kind}/{name}", {})[inner] = content
    others = {path: sha256 for path, sha256 in digests(SPEC).items() if not path.startswith("vectors/")}
    return others | {path: digest(case) for path, case in cases.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the vectors, or check them."""
    parser = argparse.ArgumentParser(
        description="Write the vectors of the tallstore format, from a second implementation."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    options = parser.parse_args(arguments)
    files = corpus()
    refused = [*broken(digests_of(files), SPEC), *(broken(digests(SPEC), SPEC) if options.check else ())]
    for line in dict.fromkeys(refused):
        print(f"spec/{line}", file=sys.stderr)
    if refused:
        print("what is frozen stays: mend second/ so that it makes the same bytes; nothing written", file=sys.stderr)
        return 1
    if options.check:
        found = list(differences(files, VECTORS))
        for line in found[:20]:
            print(f"spec/vectors/{line}", file=sys.stderr)
        if found:
            print(f"{len(found)} files of spec/vectors differ; run python spec/make_vectors.py", file=sys.stderr)
        return 1 if found else 0
    shutil.rmtree(VECTORS, ignore_errors=True)
    for path, content in files.items():
        place_at = VECTORS / path
        place_at.parent.mkdir(parents=True, exist_ok=True)
        place_at.write_bytes(content)
    print(f"{len(VALID)} valid and {len(INVALID)} invalid vectors, {sum(map(len, files.values())):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
