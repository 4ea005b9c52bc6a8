"""Where the directory of a bundle was pulled from, which it remembers in a hidden file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

#: Outside the bundle's integrity, as all that is in hidden directories at its top (FILE-3).
ORIGIN: Final = ".cache/tallstore/origin.json"

_MAX_NBYTES: Final = 4096
_REPO_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,96}/[A-Za-z0-9_.-]{1,96}")


class Origin(Struct, frozen=True):
    """A repository on the Hub, the commit that was pulled last, and the hash of its manifest in itself."""

    repo_id: str
    sha: str
    manifest_sha256: str


def read_origin(root: Path) -> Origin | None:
    """Where the bundle in *root* was pulled from; None where that is not known."""
    place = root / ORIGIN
    try:
        if not place.is_file():  # a pipe would be waited for
            return None
        with place.open("rb") as file:
            origin = msgspec.json.decode(file.read(_MAX_NBYTES), type=Origin)
    except (OSError, ValueError, RecursionError):  # ValueError: msgspec's own, and UnicodeDecodeError
        return None
    return origin if _REPO_ID.fullmatch(origin.repo_id) else None


def serialise_origin(origin: Origin) -> bytes:
    """The bytes of the file."""
    return msgspec.json.encode(origin) + b"\n"
