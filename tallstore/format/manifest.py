"""The JSON files of a bundle as frozen types, so that nothing that reads one sees a dict.

One type a file: `Manifest`, `BaseTable`, `GroupTable`, `TaskTable`. `parsing` makes them from bytes, and bytes from
them; the JSON Schemas in ``spec/schema`` are generated from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from tallstore.format.dtypes import Dtype

FORMAT_VERSION = "1.0"

MAX_TASKS = 100_000
MAX_GROUPS = 100_000
MAX_GROUP_NUMBER = 9_999_999
MAX_TENSORS = 1_000_000
MAX_SHARDS = 99_999
MAX_RECORDS = 1 << 22
MAX_NUMEL = 1 << 40

# Patterns end in `$(?!\n)`: Python's `$` alone also matches before a line feed at the end, ECMAScript's does not.
# Beside control characters, what breaks a line or turns the writing direction: names must look like what they are.
CONTROL = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
GitOid = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}$(?!\n)")]
Xxh3 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]
Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
TaskName = Annotated[str, Meta(min_length=1, max_length=256, pattern=rf"^[^{CONTROL}]*$(?!\n)")]
TensorName = Annotated[str, Meta(min_length=1, max_length=1024, pattern=rf"^[^{CONTROL}]*$(?!\n)")]
Slug = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$(?!\n)")]
GroupId = Annotated[str, Meta(pattern=r"^g([0-9]{4}|[1-9][0-9]{4,6})$(?!\n)")]
NextGroup = Annotated[int, Meta(ge=1, le=MAX_GROUP_NUMBER + 1)]
_REPO_PART = "[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
REPO_ID = rf"(?!.*(?:\.\.|--)){_REPO_PART}(?:/{_REPO_PART})?"
RepoId = Annotated[str, Meta(pattern=rf"^{REPO_ID}$(?!\n)")]
Label = Annotated[str, Meta(max_length=256, pattern=rf"^[^{CONTROL}]*$(?!\n)")]
Shape = Annotated[tuple[Natural, ...], Meta(max_length=16)]
RowAxes = Natural
CodedDtype = Literal["F16", "BF16", "F32", "F64"]
SharedDtype = Literal["F32", "BF16", "F16", "I8", "LOG4"]
SparseDtype = Literal["F32", "BF16", "F16"]
Levels = Literal[3, 4, 8, 16]
Role = Literal["merged", "merged_lo", "centre"]
Integer = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Scalar = str | bool | Integer | float | None


class _Part(Struct, frozen=True, omit_defaults=True):
    """What all parts have in common; unknown keys are found by `_unknown_keys`, which knows the versions."""


# --- what several files use -------------------------------------------------------------------------------------------


class Method(_Part, frozen=True, kw_only=True):
    """How a group was fitted. For people: a reader does not need it."""

    name: Label
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
        metadata: the user's own, text by text.
    """

    name: TaskName
    slug: Slug
    group: GroupId
    parameters: Natural
    cosine: float | None
    gain: float | None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)


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
    """tallstore.json: what is in the bundle, and the hash of every file.

    Attributes:
        next_group: the number of the next group that is added; larger than that of every group there is or was.
    """

    format: Literal["tallstore"]
    format_version: str
    manifest_sha256: Sha256
    generator: Label
    required_features: tuple[str, ...]
    base: BasePin
    next_group: NextGroup
    groups: Annotated[tuple[GroupEntry, ...], Meta(max_length=MAX_GROUPS)]
    tasks: Annotated[tuple[TaskEntry, ...], Meta(max_length=MAX_TASKS)]
    files: tuple[FileEntry, ...]
    metadata: dict[str, str] = msgspec.field(default_factory=dict)


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


class TwoLevelCode(_ScaledCode, tag="two-level", frozen=True, kw_only=True):
    """base + gain * (bit ? merged : merged_lo)."""

    bits: Payload


class SignCode(_ScaledCode, tag="sign", frozen=True, kw_only=True):
    """base + gain * (bit ? 1 : -1)."""

    bits: Payload


class SparseCode(_ScaledCode, tag="sparse", frozen=True, kw_only=True):
    """base + gain * (bit ? the next of its own values : nothing).

    Attributes:
        count: bits that are set, and values that there are.
        unit: a power of two; times the values, it gives the task vector's own, which merges average.
        values: in the order of their bits; none where no bit is set.
    """

    bits: Payload
    count: Natural
    values_dtype: SparseDtype
    unit: float = 1.0
    values: Payload | None = None


class UniformCode(_ScaledCode, tag="uniform", frozen=True, kw_only=True):
    """base + gain * one of *levels* numbers, equally far apart and around 0."""

    fields: Payload
    levels: Levels


class SameCode(_Code, tag="same", frozen=True, kw_only=True):
    """Equal to the base."""


RowsCode = MaskCode | SignedCode | TwoLevelCode | SignCode | SparseCode | UniformCode | SameCode


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


class _CodedTensor(BasedTensor, frozen=True, kw_only=True):
    """A whole tensor under one code, whose fields stand behind the tensor's own."""

    gain: float | None = None
    gains: Payload | None = None
    row_axes: RowAxes = 1


class MaskTensor(_CodedTensor, tag="mask", frozen=True, kw_only=True):
    """base + gain * (bit ? merged : nothing)."""

    bits: Payload


class SignedTensor(_CodedTensor, tag="signed", frozen=True, kw_only=True):
    """base + gain * (+merged, -merged or nothing)."""

    fields: Payload


class TwoLevelTensor(_CodedTensor, tag="two-level", frozen=True, kw_only=True):
    """base + gain * (bit ? merged : merged_lo)."""

    bits: Payload


class SignTensor(_CodedTensor, tag="sign", frozen=True, kw_only=True):
    """base + gain * (bit ? 1 : -1)."""

    bits: Payload


class SparseTensor(_CodedTensor, tag="sparse", frozen=True, kw_only=True):
    """base + gain * (bit ? the next of its own values : nothing); the fields are those of `SparseCode`."""

    bits: Payload
    count: Natural
    values_dtype: SparseDtype
    unit: float = 1.0
    values: Payload | None = None


class UniformTensor(_CodedTensor, tag="uniform", frozen=True, kw_only=True):
    """base + gain * one of *levels* numbers, equally far apart and around 0."""

    fields: Payload
    levels: Levels


class SameTensor(BasedTensor, tag="same", frozen=True, kw_only=True):
    """Equal to the base."""


class ExtendedTensor(BasedTensor, tag="extended", frozen=True, kw_only=True):
    """Leading rows rebuilt on the base's, further rows stored whole."""

    rows: Natural
    leading: RowsCode
    further: Payload | None = None


class PrivateTensor(Whole, tag="private", frozen=True, kw_only=True):
    """Stored whole; no payload where it has no elements.

    Attributes:
        base: the base tensor that it descends from, where that has another name.
    """

    base: TensorName | None = None
    values: Payload | None = None


class AliasTensor(_Code, tag="alias", frozen=True, kw_only=True):
    """Tied to another tensor of the task."""

    name: TensorName
    of: TensorName


class DroppedTensor(_Code, tag="dropped", frozen=True, kw_only=True):
    """A tensor of the base that the expert does not have."""

    name: TensorName


# A code with its scale, of a whole tensor or of leading rows.
Mask = MaskCode | MaskTensor
Signed = SignedCode | SignedTensor
TwoLevel = TwoLevelCode | TwoLevelTensor
Sign = SignCode | SignTensor
Sparse = SparseCode | SparseTensor
Uniform = UniformCode | UniformTensor
ScaledCode = Mask | Signed | TwoLevel | Sign | Sparse | Uniform
CodedTensor = MaskTensor | SignedTensor | TwoLevelTensor | SignTensor | SparseTensor | UniformTensor
Tensor = CodedTensor | PrivateTensor | ExtendedTensor | SameTensor | AliasTensor | DroppedTensor


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
    """task.json: every tensor of one task, and where its bytes are.

    Attributes:
        chosen: parameters of the group's method that were chosen for this task alone. For people, like the method.
    """

    format: Literal["tallstore.task"]
    name: TaskName
    slug: Slug
    group: GroupId
    required_features: tuple[str, ...]
    shards: Annotated[tuple[Shard, ...], Meta(max_length=MAX_SHARDS)]
    tensors: Annotated[tuple[Tensor, ...], Meta(max_length=MAX_TENSORS)]
    files: tuple[CompanionFile, ...]
    chosen: dict[str, Scalar] = msgspec.field(default_factory=dict)
    fidelity: Fidelity
