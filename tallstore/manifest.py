"""The JSON files of a bundle as frozen types: parsed strictly once, so that nothing downstream sees a dict.

One type a file (`Manifest`, `BaseTable`, `GroupTable`, `TaskTable`), and `parse` and `serialise` for all of them. The
JSON Schemas in ``spec/schema`` are generated from these types.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta, Struct

from tallstore.dtypes import Dtype
from tallstore.errors import FormatError, IntegrityError, UnsupportedFeatureError, UnsupportedVersionError

FORMAT_VERSION = "1.0-draft"
#: Features that this reader has. Every one may stand in `required_features`.
FEATURES: frozenset[str] = frozenset()

MAX_JSON_NBYTES = 64 << 20
MAX_JSON_DEPTH = 32
MAX_TASKS = 100_000
MAX_TENSORS = 1_000_000
MAX_SHARDS = 99_999
MAX_NUMEL = 1 << 40

_MAX_SHOWN_TEXT = 80
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# Patterns end in `$(?!\n)`: Python's `$` alone also matches before a line feed at the end, ECMAScript's does not.
_CONTROL = r"\u0000-\u001f\u007f-\u009f"
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
GitOid = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}$(?!\n)")]
Xxh3 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]
Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
TaskName = Annotated[str, Meta(min_length=1, max_length=256, pattern=rf"^[^{_CONTROL}]*$(?!\n)")]
TensorName = Annotated[str, Meta(min_length=1, max_length=1024, pattern=rf"^[^{_CONTROL}]*$(?!\n)")]
Slug = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$(?!\n)")]
GroupId = Annotated[str, Meta(pattern=r"^g[0-9]{4}$(?!\n)")]
RepoId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,96}(/[A-Za-z0-9_.-]{1,96})?$(?!\n)")]
Shape = Annotated[tuple[Natural, ...], Meta(max_length=16)]
RowAxes = Annotated[int, Meta(ge=0, le=16)]
CodedDtype = Literal["F16", "BF16", "F32", "F64"]
SharedDtype = Literal["F32", "BF16", "F16", "I8", "LOG4"]
Role = Literal["merged", "merged_lo", "centre"]
Scalar = str | bool | int | float | None


class _Part(Struct, frozen=True, omit_defaults=True):
    """What all parts have in common; unknown keys are found by `_unknown_keys`, which knows the versions."""


# --- what several files use -------------------------------------------------------------------------------------------


class Method(_Part, frozen=True, kw_only=True):
    """How a group was fitted. For people: a reader does not need it."""

    name: str
    parameters: dict[str, Scalar | list[Scalar]]


class Pool(_Part, frozen=True, kw_only=True):
    """The payload of a shard that many small ones share; its elements are bytes."""

    nbytes: Natural
    codec: Literal["raw", "zstd"]
    at: Natural


class Shard(_Part, frozen=True, kw_only=True):
    """One safetensors file, with the hashes of what stands before and behind its payloads."""

    file: str
    header_xxh3: Xxh3
    index_xxh3: Xxh3
    pool: Pool | None = None


class Payload(_Part, frozen=True, kw_only=True):
    """Where the bytes of one tensor are.

    Attributes:
        shard: position in the file's list of shards.
        codec: how each chunk is stored.
        at: the payload's first record in the shard's index; for ``pooled``, its first byte in the shard's pool.
    """

    shard: Natural
    codec: Literal["raw", "zstd", "planes-zstd", "pooled"]
    at: Natural


# --- tallstore.json ---------------------------------------------------------------------------------------------------


class BasePin(_Part, frozen=True, kw_only=True):
    """Which base the experts are rebuilt on. Its hashes are in base.json."""

    repo_id: RepoId | None
    revision: GitOid | None
    embedded: bool


class GroupEntry(_Part, frozen=True, kw_only=True):
    """A group as the manifest lists it."""

    id: GroupId
    method: Method


class TaskEntry(_Part, frozen=True, kw_only=True):
    """A task as the manifest lists it.

    Attributes:
        parameters: elements of all the task's tensors.
        cosine: between the task vector and its reconstruction, over all coded tensors; None where nothing is coded.
        gain: the reconstruction's projection on the task vector, as a share of it; 1 is the whole way.
    """

    name: TaskName
    slug: Slug
    group: GroupId
    parameters: Natural
    cosine: float | None
    gain: float | None


class FileEntry(_Part, frozen=True, kw_only=True):
    """A file of the bundle.

    Attributes:
        path: relative, with forward slashes.
        size: in bytes.
        sha256: the Hub's LFS object id.
        git_oid: the git blob id, for files that the Hub keeps in git.
    """

    path: str
    size: Natural
    sha256: Sha256
    git_oid: GitOid | None


class Manifest(_Part, frozen=True, kw_only=True):
    """tallstore.json: what is in the bundle, and the hash of every file."""

    format: Literal["tallstore"]
    format_version: str
    manifest_sha256: Sha256
    generator: str
    required_features: tuple[str, ...]
    base: BasePin
    groups: Annotated[tuple[GroupEntry, ...], Meta(max_length=9_999)]
    tasks: Annotated[tuple[TaskEntry, ...], Meta(max_length=MAX_TASKS)]
    files: tuple[FileEntry, ...]


# --- base.json --------------------------------------------------------------------------------------------------------


class BaseTensor(_Part, frozen=True, kw_only=True):
    """A tensor of the base: dtype, shape, and the hash of each chunk's bytes; or the name of the one it is tied to."""

    name: TensorName
    dtype: Dtype
    shape: Shape
    chunks: tuple[Xxh3, ...]
    alias_of: TensorName | None = None


class BaseTable(_Part, frozen=True, kw_only=True):
    """base.json: what the base must be."""

    format: Literal["tallstore.base"]
    tensors: Annotated[tuple[BaseTensor, ...], Meta(max_length=MAX_TENSORS)]


# --- groups/<id>/group.json -------------------------------------------------------------------------------------------


class Vector(_Part, frozen=True, kw_only=True):
    """A shared vector: one value for each element of a base tensor, with a step a row for I8 and LOG4."""

    tensor: TensorName
    role: Role
    dtype: SharedDtype
    row_axes: RowAxes = 1
    values: Payload
    step: Payload | None = None


class GroupTable(_Part, frozen=True, kw_only=True):
    """group.json: the vectors that the tasks of a group share."""

    format: Literal["tallstore.group"]
    id: GroupId
    required_features: tuple[str, ...]
    method: Method
    shards: Annotated[tuple[Shard, ...], Meta(max_length=MAX_SHARDS)]
    vectors: Annotated[tuple[Vector, ...], Meta(max_length=MAX_TENSORS)]


# --- tasks/<slug>/task.json -------------------------------------------------------------------------------------------


class _Code(_Part, tag_field="kind", frozen=True, kw_only=True):
    """How a tensor, or its leading rows, are stored."""


class _ScaledCode(_Code, frozen=True, kw_only=True):
    """A code with either one gain, or a gain a row."""

    gain: float | None = None
    gains: Payload | None = None
    row_axes: RowAxes = 1


class MaskCode(_ScaledCode, tag="mask", frozen=True, kw_only=True):
    """base + gain * (bit ? merged : nothing)."""

    bits: Payload


class SignedCode(_ScaledCode, tag="signed", frozen=True, kw_only=True):
    """base + gain * (+merged, -merged or nothing)."""

    fields: Payload


class SameCode(_Code, tag="same", frozen=True, kw_only=True):
    """Equal to the base."""


RowsCode = MaskCode | SignedCode | SameCode


class Whole(_Code, frozen=True, kw_only=True):
    """A tensor of the expert: its own name, dtype and shape."""

    name: TensorName
    dtype: Dtype
    shape: Shape


class BasedTensor(Whole, frozen=True, kw_only=True):
    """A tensor that is rebuilt on the base's.

    Attributes:
        base: the base tensor's name, where it is not this one's.
    """

    base: TensorName | None = None

    @property
    def base_name(self) -> str:
        """Name of the base tensor."""
        return self.name if self.base is None else self.base


class _ScaledTensor(BasedTensor, frozen=True, kw_only=True):
    """A whole tensor under one code; the same fields as `_ScaledCode`, behind the tensor's own."""

    gain: float | None = None
    gains: Payload | None = None
    row_axes: RowAxes = 1


class MaskTensor(_ScaledTensor, tag="mask", frozen=True, kw_only=True):
    """base + gain * (bit ? merged : nothing)."""

    bits: Payload


class SignedTensor(_ScaledTensor, tag="signed", frozen=True, kw_only=True):
    """base + gain * (+merged, -merged or nothing)."""

    fields: Payload


class SameTensor(BasedTensor, tag="same", frozen=True, kw_only=True):
    """Equal to the base."""


class ExtendedTensor(BasedTensor, tag="extended", frozen=True, kw_only=True):
    """Leading rows rebuilt on the base's, further rows stored whole."""

    rows: Natural
    leading: RowsCode
    further: Payload | None = None


class PrivateTensor(Whole, tag="private", frozen=True, kw_only=True):
    """Stored whole; no payload where it has no elements."""

    values: Payload | None = None


class AliasTensor(_Code, tag="alias", frozen=True, kw_only=True):
    """Tied to another tensor of the task."""

    name: TensorName
    of: TensorName


class DroppedTensor(_Code, tag="dropped", frozen=True, kw_only=True):
    """A tensor of the base that the expert does not have."""

    name: TensorName


CodedTensor = MaskTensor | SignedTensor
ScaledCode = MaskCode | SignedCode | MaskTensor | SignedTensor
Tensor = MaskTensor | SignedTensor | PrivateTensor | ExtendedTensor | SameTensor | AliasTensor | DroppedTensor


class CompanionFile(_Part, frozen=True, kw_only=True):
    """A file that belongs to the expert (its config, its tokenizer), stored once under its sha256."""

    name: str
    sha256: Sha256
    size: Natural


class Estimate(_Part, frozen=True, kw_only=True):
    """What another fit of the same task would reach.

    Attributes:
        cosine: as in the manifest's entry.
        bits: a parameter an expert, its share of the shared vector included.
    """

    cosine: float
    bits: float


class Fidelity(_Part, frozen=True, kw_only=True):
    """How near the reconstruction is to the expert, after the final rounding.

    Attributes:
        cosine, gain: as in the manifest's entry.
        score: the user's own, where `evaluate` was given.
        estimates: by fit.
    """

    cosine: float | None
    gain: float | None
    score: float | None = None
    estimates: dict[str, Estimate]


class TaskTable(_Part, frozen=True, kw_only=True):
    """task.json: every tensor of one task, and where its bytes are."""

    format: Literal["tallstore.task"]
    name: TaskName
    slug: Slug
    group: GroupId
    required_features: tuple[str, ...]
    shards: Annotated[tuple[Shard, ...], Meta(max_length=MAX_SHARDS)]
    tensors: Annotated[tuple[Tensor, ...], Meta(max_length=MAX_TENSORS)]
    files: tuple[CompanionFile, ...]
    fidelity: Fidelity


# --- reading ----------------------------------------------------------------------------------------------------------

Table = TypeVar("Table", Manifest, BaseTable, GroupTable, TaskTable)


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Parse tallstore.json: its own hash, its version and its features first, then every field.

    Raises:
        UnsupportedVersionError: VER-1, VER-2.
        UnsupportedFeatureError: VER-4.
        IntegrityError: MAN-1, a byte was changed.
        FormatError: JSON-1 to JSON-4, VER-3, LIM-1.
    """
    document = _document(raw, where)
    newer_minor = _check_version(document, where)
    _check_own_hash(document, raw, where)
    _check_features_first(document, where)
    return _convert(document, Manifest, where, newer_minor=newer_minor)


def parse(raw: bytes, table: type[Table], where: str, *, newer_minor: bool = False) -> Table:
    """Parse another JSON file of a bundle.

    Args:
        raw: the file.
        table: the type to parse into.
        where: the file's name, for messages.
        newer_minor: whether the manifest's version is a newer minor, whose unknown keys are ignored with a warning.

    Raises:
        UnsupportedFeatureError: VER-4, before anything else of the table is looked at.
        FormatError: JSON-1 to JSON-4, VER-3, LIM-1.
    """
    document = _document(raw, where)
    _check_features_first(document, where)
    return _convert(document, table, where, newer_minor=newer_minor)


def is_newer_minor(manifest: Manifest) -> bool:
    """Whether *manifest* is of a newer minor version than this reader's."""
    return _version(manifest.format_version, "") > _version(FORMAT_VERSION, "")


def check_features(required: tuple[str, ...], where: str) -> None:
    """Refuse, by name, the first required feature that this reader does not have (VER-4)."""
    for feature in required:
        if feature not in FEATURES:
            raise UnsupportedFeatureError(
                "VER-4", where, f"requires the feature {feature!r}, which this reader does not have; update tallstore"
            )


def _check_features_first(document: dict[str, Any], where: str) -> None:
    """A feature may bring keys and kinds of its own: it is what must be named, not they."""
    features = document.get("required_features")
    if isinstance(features, list):
        check_features(tuple(str(feature) for feature in features), where)


def _document(raw: bytes, where: str) -> dict[str, Any]:
    if len(raw) > MAX_JSON_NBYTES:
        raise FormatError("JSON-4", where, f"has {len(raw)} bytes, over the limit of {MAX_JSON_NBYTES}")
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
            raise FormatError("JSON-2", where, f"has the key {_quoted(twice)} twice in one object")
        return found

    def refuse(constant: str) -> NoReturn:
        raise FormatError("JSON-1", where, f"has {constant}, which is not JSON")

    def finite(digits: str) -> float:
        if math.isinf(number := float(digits)):
            raise FormatError("JSON-1", where, f"has {_quoted(digits)}, a number beyond the range of float64")
        return number

    parsed: object = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    return parsed


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= _MAX_SHOWN_TEXT else f"{text[:_MAX_SHOWN_TEXT]!r}…"


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


def _version(text: object, where: str) -> tuple[int, int]:
    found = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})(-draft)?", text) if isinstance(text, str) else None
    if found is None:
        raise UnsupportedVersionError("VER-1", where, f"format_version is {str(text)[:40]!r}, which is no version")
    return int(found[1]), int(found[2])


def _check_version(document: dict[str, Any], where: str) -> bool:
    """Refuse what this reader does not read; True for a newer minor version."""
    if document.get("format") != "tallstore":
        raise FormatError("JSON-3", where, "is not the manifest of a tallstore bundle (its format is not 'tallstore')")
    text = document.get("format_version")
    version, reader = _version(text, where), _version(FORMAT_VERSION, where)
    if version[0] != reader[0]:
        raise UnsupportedVersionError("VER-1", where, f"format_version is {text}, this reader reads {reader[0]}.x")
    if str(text).endswith("-draft") and text != FORMAT_VERSION:
        raise UnsupportedVersionError("VER-2", where, f"format_version is {text}, this reader reads {FORMAT_VERSION}")
    return version > reader


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


def _convert(document: dict[str, Any], table: type[Table], where: str, *, newer_minor: bool) -> Table:
    try:
        parsed = msgspec.convert(document, table, strict=True)
    except msgspec.ValidationError as error:
        over_limit = re.search("(of length|`) <= [0-9]", str(error)) is not None
        raise FormatError("LIM-1" if over_limit else "JSON-3", where, str(error)) from None
    for place in _unknown_keys(document, parsed, "$"):
        if not newer_minor:
            raise FormatError("VER-3", where, f"has the unknown key {place}")
        warnings.warn(f"{where}: ignores the unknown key {place} of a newer version", stacklevel=2)
    return parsed


def _unknown_keys(raw: object, parsed: object, place: str) -> Iterator[str]:
    if isinstance(parsed, Struct) and isinstance(raw, dict):
        known = {*parsed.__struct_encode_fields__, parsed.__struct_config__.tag_field}
        for key, value in raw.items():
            if key not in known:
                yield f"{place}.{key}"
            elif key in parsed.__struct_encode_fields__:
                yield from _unknown_keys(value, getattr(parsed, key), f"{place}.{key}")
    elif isinstance(parsed, Mapping) and isinstance(raw, dict):
        for key, value in parsed.items():
            yield from _unknown_keys(raw[key], value, f"{place}.{key}")
    elif isinstance(parsed, tuple | list) and isinstance(raw, list):
        for position, value in enumerate(parsed):
            if isinstance(value, Struct | Mapping):
                yield from _unknown_keys(raw[position], value, f"{place}[{position}]")


# --- writing ----------------------------------------------------------------------------------------------------------


def serialise(table: BaseTable | GroupTable | TaskTable) -> bytes:
    """The bytes of a table: compact JSON, keys in the order of the type."""
    return msgspec.json.encode(table) + b"\n"


def serialise_manifest(manifest: Manifest) -> bytes:
    """The bytes of tallstore.json, for people to read, sealed with its own sha256 (whatever `manifest_sha256` said)."""
    zeroed = msgspec.structs.replace(manifest, manifest_sha256="0" * 64)
    raw = msgspec.json.format(msgspec.json.encode(zeroed), indent=2) + b"\n"
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)
