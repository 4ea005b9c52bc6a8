"""Which versions of the format a reader reads, and which features it has."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from tallstore.errors import UnsupportedFeatureError, UnsupportedVersionError
from tallstore.format.manifest import FORMAT_VERSION
from tallstore.format.quoting import quoted

#: Features that this reader has. Every one may stand in `required_features`.
FEATURES: frozenset[str] = frozenset()

_VERSION: Final = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})(-draft)?")


class _Version(NamedTuple):
    major: int
    minor: int
    is_draft: bool


def check_version(text: object, where: str) -> bool:
    """Refuse a `format_version` that this reader does not read.

    Args:
        text: what the manifest gives.
        where: the file, for messages.

    Returns:
        Whether it is of a newer minor, whose unknown keys are ignored.

    Raises:
        UnsupportedVersionError: VER-1, no version, or of another major; VER-2, another draft, or this reader is one.
    """
    found, reader = _parsed(text), _own()
    if found is None:
        raise UnsupportedVersionError("VER-1", where, f"format_version is {str(text)[:40]!r}, which is no version")
    if found.major != reader.major:
        advice = "update tallstore" if found.major > reader.major else "pack the bundle again"
        problem = f"format_version is {text}, this reader reads {reader.major}.x; {advice}"
        raise UnsupportedVersionError("VER-1", where, problem)
    if found.is_draft and text != FORMAT_VERSION:
        problem = f"format_version is {text}, a draft; this reader reads {FORMAT_VERSION}; pack the bundle again"
        raise UnsupportedVersionError("VER-2", where, problem)
    if reader.is_draft and not found.is_draft and found.minor >= reader.minor:
        problem = f"format_version is {text}, this reader is of the draft {FORMAT_VERSION}; update tallstore"
        raise UnsupportedVersionError("VER-2", where, problem)
    return is_newer(str(text))


def is_newer(text: str) -> bool:
    """Whether a version that was checked is of a newer minor than this reader's."""
    found = _parsed(text)
    return found is not None and found.minor > _own().minor


def check_features(required: tuple[str, ...], where: str) -> None:
    """Refuse, by name, the first required feature that this reader does not have.

    Raises:
        UnsupportedFeatureError: VER-4.
    """
    for feature in required:
        if feature not in FEATURES:
            problem = f"requires the feature {quoted(feature)}, which this reader does not have; update tallstore"
            raise UnsupportedFeatureError("VER-4", where, problem)


def _parsed(text: object) -> _Version | None:
    found = _VERSION.fullmatch(text) if isinstance(text, str) else None
    return None if found is None else _Version(int(found[1]), int(found[2]), found[3] is not None)


def _own() -> _Version:
    own = _parsed(FORMAT_VERSION)
    if own is None:
        raise AssertionError(f"{FORMAT_VERSION} is no version")
    return own
