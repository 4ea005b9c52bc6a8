"""The JSON files of a bundle from bytes and to bytes: parsed strictly, with errors that carry rule and place."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import msgspec
from msgspec import Struct, structs

from tallstore.caller_warnings import NewerFormatWarning, warn
from tallstore.errors import FormatError, IntegrityError, UnsupportedVersionError
from tallstore.format.manifest import BaseTable, GroupTable, Manifest, TaskTable
from tallstore.format.quoting import key_place, quoted
from tallstore.format.versions import check_features, check_version, is_newer

MAX_JSON_NBYTES = 64 << 20
MAX_JSON_DEPTH = 32

_MAX_SHOWN_KEYS = 3
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Table = TypeVar("Table", Manifest, BaseTable, GroupTable, TaskTable)


def parse_manifest(raw: bytes, where: str, *, to_change: bool = False) -> Manifest:
    """Parse tallstore.json: its own hash, its version and its features first, then every field.

    Args:
        raw: the file.
        where: its name, for messages.
        to_change: whether it will be written anew, as `structs.replace` makes it: what would be lost is refused then,
            and the version stays what it is.

    Raises:
        UnsupportedVersionError: VER-1, VER-2; WRITE-5, it has keys of a newer version, and is to be changed.
        UnsupportedFeatureError: VER-4.
        IntegrityError: MAN-1, a byte was changed.
        FormatError: JSON-1 to JSON-4, VER-3, LIM-1.
    """
    _check_nbytes(raw, where)
    manifest = _as_written(raw, Manifest)
    document = _document(raw, where) if manifest is None else structs.asdict(manifest)
    newer_minor = _check_version(document, where)
    _check_own_hash(document, raw, where)
    _check_features_first(document, where)
    if manifest is not None:
        return manifest
    return _convert(document, Manifest, where, newer_minor=newer_minor, to_change=to_change)


def parse(raw: bytes, table: type[Table], where: str, *, newer_minor: bool = False, to_change: bool = False) -> Table:
    """Parse another JSON file of a bundle.

    Args:
        raw: the file.
        table: the type to parse into.
        where: the file's name, for messages.
        newer_minor: whether the manifest's version is a newer minor, whose unknown keys are ignored with a warning.
        to_change: as in `parse_manifest`.

    Raises:
        UnsupportedVersionError: WRITE-5, as in `parse_manifest`.
        UnsupportedFeatureError: VER-4, before anything else of the table is looked at.
        FormatError: JSON-1 to JSON-4, VER-3, LIM-1.
    """
    _check_nbytes(raw, where)
    parsed = _as_written(raw, table)
    document = _document(raw, where) if parsed is None else structs.asdict(parsed)
    _check_features_first(document, where)
    if parsed is not None:
        return parsed
    return _convert(document, table, where, newer_minor=newer_minor, to_change=to_change)


def _as_written(raw: bytes, table: type[Table]) -> Table | None:
    """What *raw* says, if it is byte for byte what this version writes for it; None where it must be looked at closely.

    What is written from a parsed table has no key twice, none that is unknown, no number that is none, no half of a
    surrogate pair, and is no deeper than its type: where it equals what was read, that has none of these either. This
    takes a fifth of the time of finding them one by one, which no bundle needs that nobody has edited.
    """
    try:
        parsed = msgspec.json.decode(raw, type=table)
        written = _as_it_is(parsed)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return None
    return parsed if written == raw else None


def is_newer_minor(manifest: Manifest) -> bool:
    """Whether *manifest* is of a newer minor version than this reader's."""
    return is_newer(manifest.format_version)


def _check_features_first(document: dict[str, Any], where: str) -> None:
    """A feature may bring keys and kinds of its own: it is what must be named, not they."""
    features = document.get("required_features")
    if isinstance(features, list | tuple):
        check_features(tuple(str(feature) for feature in features), where)


def _check_nbytes(raw: bytes, where: str) -> None:
    if len(raw) > MAX_JSON_NBYTES:
        raise FormatError("JSON-4", where, f"has {len(raw)} bytes, over the limit of {MAX_JSON_NBYTES}")


def _document(raw: bytes, where: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        document = _load(text, where)
    except UnicodeDecodeError as error:
        raise FormatError("JSON-1", where, f"is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise FormatError("JSON-1", where, f"is nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError as error:
        raise FormatError("JSON-1", where, f"is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise FormatError("JSON-1", where, "is not a JSON object")
    _check_depth(document, where)
    _check_text(document, text, where)
    return document


def _load(text: str, where: str) -> object:
    """Parse JSON, refusing what `json` lets pass: keys that stand twice, NaN, infinities, numbers as large as those."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise FormatError("JSON-2", where, f"has the key {quoted(twice)} twice in one object")
        return found

    def refuse(constant: str) -> NoReturn:
        raise FormatError("JSON-1", where, f"has {constant}, which is not JSON")

    def finite(digits: str) -> float:
        if math.isinf(number := float(digits)):
            raise FormatError("JSON-1", where, f"has {quoted(digits)}, a number beyond the range of float64")
        return number

    parsed: object = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    return parsed


def _check_depth(document: dict[str, Any], where: str) -> None:
    """Refuse deep nesting of objects and arrays; level by level, so that depth costs no recursion."""
    level: list[Any] = [document]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    if level:
        raise FormatError("JSON-1", where, f"is nested more than {MAX_JSON_DEPTH} deep")


def _check_text(document: dict[str, Any], text: str, where: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can escape but UTF-8 cannot hold."""
    if _ESCAPED_SURROGATE.search(text) is None:
        return
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FormatError("JSON-1", where, "escapes one half of a surrogate pair, which is no text") from None


def _check_version(document: dict[str, Any], where: str) -> bool:
    """Refuse what this reader does not read; True for a newer minor version."""
    if document.get("format") != "tallstore":
        raise FormatError("JSON-3", where, "is not the manifest of a tallstore bundle (its format is not 'tallstore')")
    return check_version(document.get("format_version"), where)


def _check_own_hash(document: dict[str, Any], raw: bytes, where: str) -> None:
    recorded = document.get("manifest_sha256")
    if not isinstance(recorded, str) or re.fullmatch("[0-9a-f]{64}", recorded) is None:
        raise FormatError("JSON-3", where, "has no manifest_sha256 of 64 hexadecimal digits")
    if own_sha256(raw, recorded) != recorded:
        raise IntegrityError("MAN-1", where, "was changed: its manifest_sha256 is not its own")


def own_sha256(raw: bytes, recorded: str) -> str | None:
    """The sha256 of *raw* with the one occurrence of *recorded* zeroed, or None where it does not occur once."""
    digits = recorded.encode()
    if raw.count(digits) != 1:
        return None
    return hashlib.sha256(raw.replace(digits, b"0" * len(digits))).hexdigest()


def _convert(document: dict[str, Any], table: type[Table], where: str, *, newer_minor: bool, to_change: bool) -> Table:
    parsed = _typed(document, table, where)
    unknown = list(_unknown_keys(document, parsed, "$"))
    if unknown and not newer_minor:
        raise FormatError("VER-3", where, f"has the unknown key {unknown[0]}")
    if unknown and to_change:
        problem = f"has {_several_keys(unknown)} of a newer version, lost if this version changed it; update tallstore"
        raise UnsupportedVersionError("WRITE-5", where, problem)
    if unknown:
        warn(f"{where}: ignores {_several_keys(unknown)} of a newer version", NewerFormatWarning)
    return parsed


def _typed(document: dict[str, Any], table: type[Table], where: str) -> Table:
    try:
        return msgspec.convert(document, table, strict=True)
    except msgspec.ValidationError as error:
        over_limit = re.search("of length <= [0-9]", str(error)) is not None
        raise FormatError("LIM-1" if over_limit else "JSON-3", where, str(error)) from None


def _several_keys(places: list[str]) -> str:
    if len(places) == 1:
        return f"the unknown key {places[0]}"
    more = ", …" if len(places) > _MAX_SHOWN_KEYS else ""
    return f"{len(places)} unknown keys ({', '.join(places[:_MAX_SHOWN_KEYS])}{more})"


def _unknown_keys(raw: object, parsed: object, place: str) -> Iterator[str]:
    if isinstance(parsed, Struct) and isinstance(raw, dict):
        known = {*parsed.__struct_encode_fields__, parsed.__struct_config__.tag_field}
        for key, value in raw.items():
            if key not in known:
                yield key_place(place, key)
            elif key in parsed.__struct_encode_fields__:
                yield from _unknown_keys(value, getattr(parsed, key), key_place(place, key))
    elif isinstance(parsed, dict) and isinstance(raw, dict):
        for key, value in parsed.items():
            yield from _unknown_keys(raw[key], value, key_place(place, key))
    elif isinstance(parsed, tuple) and isinstance(raw, list):
        for position, value in enumerate(parsed):
            if isinstance(value, Struct):
                yield from _unknown_keys(raw[position], value, f"{place}[{position}]")


# --- writing ----------------------------------------------------------------------------------------------------------


def serialise(table: BaseTable | GroupTable | TaskTable) -> bytes:
    """The bytes of a table: compact JSON, keys in the order of the type.

    Raises:
        FormatError: JSON-4, they are more than any reader takes.
    """
    raw = _as_it_is(table)
    _check_nbytes(raw, table.format)
    return raw


def serialise_manifest(manifest: Manifest) -> bytes:
    """The bytes of tallstore.json, for people to read, sealed with its own sha256 (whatever `manifest_sha256` said)."""
    raw = _as_it_is(structs.replace(manifest, manifest_sha256="0" * 64))
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)


def _as_it_is(table: Manifest | BaseTable | GroupTable | TaskTable) -> bytes:
    raw = msgspec.json.encode(table)
    return (msgspec.json.format(raw, indent=2) if isinstance(table, Manifest) else raw) + b"\n"
