"""Bundles whose JSON files were edited as text and sealed again: what a newer version may write, or an enemy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tallstore.format import layout

VECTORS = Path(__file__).parents[1] / "spec" / "vectors" / "valid"

Json = dict[str, Any]
Edit = Callable[[Json], None]

# Objects whose keys are names of the user's: `method.parameters`, `fidelity.estimates`, `chosen`, `metadata`.
FREE = {"parameters", "estimates", "chosen", "metadata"}


def resealed(source: Path, target: Path, edits: dict[str, Edit] | None = None, version: str | None = None) -> Path:
    """A copy of the bundle *source* with its JSON files edited, by path, and every hash that follows mended."""
    shutil.copytree(source, target)
    manifest = json.loads((target / layout.MANIFEST).read_bytes())
    listed = {entry["path"]: entry for entry in manifest["files"]}
    for path, edit in (edits or {}).items():
        if path == layout.MANIFEST:
            continue
        document = json.loads((target / path).read_bytes())
        edit(document)
        raw = json.dumps(document).encode()
        (target / path).write_bytes(raw)
        listed[path] |= {
            "size": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "git_oid": hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest(),  # noqa: S324 - as git does
        }
    if version is not None:
        manifest["format_version"] = version
    (edits or {}).get(layout.MANIFEST, lambda _: None)(manifest)
    write_manifest(target, manifest)
    return target


def write_manifest(root: Path, manifest: Json) -> None:
    """Write tallstore.json with its own hash."""
    raw = json.dumps(manifest | {"manifest_sha256": "0" * 64}).encode()
    (root / layout.MANIFEST).write_bytes(raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode()))


def tables(root: Path) -> list[str]:
    """The paths of a bundle's JSON files, the manifest's first."""
    found = [path.relative_to(root).as_posix() for path in root.rglob("*.json")]
    return sorted(
        (
            path
            for path in found
            if path in {layout.MANIFEST, layout.BASE_TABLE} or path.endswith(("/group.json", "/task.json"))
        ),
        key=lambda path: (path != layout.MANIFEST, path),
    )


def objects(document: Json, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every object whose keys are the format's."""
    if isinstance(document, dict):
        if not place or place[-1] not in FREE:
            yield place
        for key, value in document.items():
            yield from objects(value, (*place, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from objects(value, (*place, number))


def at(document: Json, place: tuple[str | int, ...]) -> Json:
    """The object at a place."""
    found: Any = document
    for step in place:
        found = found[step]
    return found


def with_key(place: tuple[str | int, ...], key: str = "from-the-future", value: object = 1) -> Edit:
    """Put a key into the object at a place."""
    return lambda document: at(document, place).update({key: value})


def with_keys_everywhere(document: Json) -> None:
    """Put keys of every type into every object."""
    for number, place in enumerate(list(objects(document))):
        at(document, place)["from-the-future"] = [None, True, -1.5, "text", {"deep": [{}]}, ["list"]][number % 6]


def with_feature(name: str) -> Edit:
    """Require a feature."""
    return lambda document: document.update({"required_features": [name]})
