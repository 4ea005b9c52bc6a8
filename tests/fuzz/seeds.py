"""What every run starts from: the vectors of the specification that are small."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tests.fuzz.bundles import MANIFEST, Parts

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
#: Tensors of more than a chunk take a hundred times as long as all others.
LARGE = frozenset({"chunks", "kinds-chunks", "unbroken-ranked"})
_MANY = 18  # a case takes as long as it has tensors
SMALL = sorted(path for path in (VECTORS / "valid").iterdir() if path.name not in LARGE)
assert SMALL, f"no vectors under {VECTORS}"


@cache
def bundles() -> list[Parts]:
    """Sound bundles, taken apart, those of few tensors several times; they are not to be changed."""
    found = []
    for case in SMALL:
        base = json.loads((case / "case.json").read_text())["base"]
        parts = Parts.of(case / "bundle", case / base if base else None)
        tensors = sum(len(table["tensors"]) for path, table in parts.documents.items() if path.endswith("task.json"))
        found += [parts] * (1 if tensors > _MANY else 8)
    return found


@cache
def jsons(name: str) -> list[bytes]:
    """JSON files of that name: of valid vectors, as they are and without white space, and of invalid ones."""
    found = {path.read_bytes() for path in sorted(VECTORS.rglob(name))}
    valid = [path.read_bytes() for path in sorted((VECTORS / "valid").rglob(name))]
    return sorted(found | {json.dumps(json.loads(raw), separators=(",", ":")).encode() for raw in valid})


@cache
def manifests() -> list[bytes]:
    """Manifests, sealed or not."""
    return jsons(MANIFEST)


@cache
def valid_manifests() -> list[bytes]:
    """Those of sound bundles."""
    return [(case / "bundle" / MANIFEST).read_bytes() for case in SMALL]


@cache
def headers() -> list[bytes]:
    """The first bytes of safetensors files, and whole small ones."""
    files = [path.read_bytes() for path in sorted(VECTORS.rglob("*.safetensors"))]
    return sorted({raw[: 8 + int.from_bytes(raw[:8], "little") + 4096] for raw in files if 8 <= len(raw) < 1 << 20})
