"""What is in a bundle, read from its tables alone: sizes, methods, fidelity, kinds of tensors. Decodes nothing, needs no torch."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tallstore import layout
from tallstore.bundle_files import BundleFiles, Task
from tallstore.dtypes import TensorSpec
from tallstore.errors import UnsupportedFeatureError
from tallstore.manifest import (
    AliasTensor,
    BasedTensor,
    CompanionFile,
    DroppedTensor,
    Estimate,
    ExtendedTensor,
    GroupEntry,
    MaskTensor,
    SameCode,
    Scalar,
    SignedTensor,
    TaskEntry,
    TaskTable,
    Tensor,
    Whole,
)
from tallstore.payloads import Shape, Stored, leading_shape, tensor_payloads
from tallstore.shards import LocalFile, ShardReader

_CODED_KINDS = frozenset({"mask", "signed"})
_WHOLE_KIND = "private"
_SAME_KIND = "same"
_COMPANIONS = layout.companion_path("")  # their directory, as a prefix


@dataclass(frozen=True)
class BaseSummary:
    """The base that the experts are rebuilt on.

    Attributes:
        repo_id, revision: where readers get it; None where it is not said.
        embedded: whether it is in the bundle.
        tensors: how many it has, ties counted once.
        parameters: their elements.
        checkpoint_nbytes: their bytes in a plain checkpoint.
    """

    repo_id: str | None
    revision: str | None
    embedded: bool
    tensors: int
    parameters: int
    checkpoint_nbytes: int


@dataclass(frozen=True)
class GroupSummary:
    """Tasks that share vectors.

    Attributes:
        id, method, parameters: as its table says.
        merged_dtypes: of its vectors, sorted; None where none of its tasks is here, or this version does not read it.
        tasks: how many it has.
        nbytes: its files.
    """

    id: str
    method: str
    parameters: Mapping[str, Scalar | list[Scalar]]
    merged_dtypes: tuple[str, ...] | None
    tasks: int
    nbytes: int


@dataclass(frozen=True)
class TaskSummary:
    """One task.

    Attributes:
        name, slug, group: as in the manifest.
        parameters: elements of its tensors, ties counted once.
        nbytes: its own files, companions not counted.
        cosine, gain: of the reconstruction, over what is coded; None where nothing is.
        fetched: whether its files are here. What stands below is None where they are not.
        unreadable: the feature that this version lacks, in a sentence; None for a task that it reads.
        checkpoint_nbytes: its tensors in a plain checkpoint.
        bits: a coded parameter costs, its share of the shared vectors included; None where nothing is coded.
        score: what the user's own evaluation gave when it was packed.
        kinds: how many tensors are of each kind.
    """

    name: str
    slug: str
    group: str
    parameters: int
    nbytes: int
    cosine: float | None
    gain: float | None
    fetched: bool
    unreadable: str | None = None
    checkpoint_nbytes: int | None = None
    bits: float | None = None
    score: float | None = None
    kinds: Mapping[str, int] | None = None

    @property
    def coded(self) -> int:
        """Tensors that are coded over the base."""
        return sum(count for kind, count in (self.kinds or {}).items() if kind in _CODED_KINDS)

    @property
    def same(self) -> int:
        """Tensors that are the base's own."""
        return (self.kinds or {}).get(_SAME_KIND, 0)

    @property
    def whole(self) -> int:
        """Tensors that are stored whole."""
        return (self.kinds or {}).get(_WHOLE_KIND, 0)

    @property
    def other(self) -> int:
        """Tensors that are tied, extended or dropped."""
        return sum((self.kinds or {}).values()) - self.coded - self.same - self.whole


@dataclass(frozen=True)
class BundleSummary:
    """A bundle. Sizes are those that the manifest lists, whether the files are here or not.

    Attributes:
        path: its directory.
        format_version, generator: as in the manifest.
        base, groups, tasks: what it is made of.
        nbytes: all files.
        base_nbytes: the embedded base and the table of its hashes.
        companions_nbytes: configs, tokenizers and the like, each once however many tasks have it.
    """

    path: Path
    format_version: str
    generator: str
    base: BaseSummary
    groups: tuple[GroupSummary, ...]
    tasks: tuple[TaskSummary, ...]
    nbytes: int
    base_nbytes: int
    companions_nbytes: int

    @property
    def shared_nbytes(self) -> int:
        """Files of the groups."""
        return sum(group.nbytes for group in self.groups)

    @property
    def tasks_nbytes(self) -> int:
        """Files of the tasks."""
        return sum(task.nbytes for task in self.tasks)

    @property
    def weighed(self) -> tuple[TaskSummary, ...]:
        """The tasks whose checkpoints' size is known: `ratio` is about them."""
        return tuple(task for task in self.tasks if task.checkpoint_nbytes is not None)

    @property
    def checkpoints_nbytes(self) -> int:
        """The `weighed` tasks as plain checkpoints, with the base's where the bundle has it too."""
        base_nbytes = self.base.checkpoint_nbytes if self.base.embedded else 0
        return base_nbytes + sum(task.checkpoint_nbytes or 0 for task in self.weighed)

    @property
    def ratio(self) -> float | None:
        """How many times smaller the bundle is than `checkpoints_nbytes`; None where no task is weighed."""
        weighed = self.weighed
        others = self.tasks_nbytes - sum(task.nbytes for task in weighed)
        return self.checkpoints_nbytes / max(1, self.nbytes - others) if weighed else None

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON types."""
        return asdict(self) | {
            "path": str(self.path),
            "shared_nbytes": self.shared_nbytes,
            "tasks_nbytes": self.tasks_nbytes,
            "checkpoints_nbytes": self.checkpoints_nbytes,
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a task.

    Attributes:
        name, kind: as in task.json.
        dtype, shape: of the expert's tensor; None for one that the expert does not have.
        base: the base tensor that it is rebuilt on; None where there is none.
        tied_to: the tensor that it is an alias of.
        rows: leading rows that are rebuilt on the base, of a tensor that was extended.
        gain: of its code; None where it has none, or one a row.
        nbytes: its payloads in the task's files, padding included; None where those are not here.
    """

    name: str
    kind: str
    dtype: str | None
    shape: Shape | None
    base: str | None
    tied_to: str | None
    rows: int | None
    gain: float | None
    nbytes: int | None


@dataclass(frozen=True)
class TaskDetails:
    """One task, tensor by tensor.

    Attributes:
        path: the bundle's directory.
        task: what the bundle's summary says of it.
        method: its group's.
        tensors: in the order of its table.
        files: its companions.
        estimates: what other fits would reach, by name.
    """

    path: Path
    task: TaskSummary
    method: str
    tensors: tuple[TensorSummary, ...]
    files: tuple[CompanionFile, ...]
    estimates: Mapping[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """The details as plain JSON types."""
        return {
            "path": str(self.path),
            "task": asdict(self.task),
            "method": self.method,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "files": [{"name": file.name, "sha256": file.sha256, "size": file.size} for file in self.files],
            "estimates": {
                name: {"cosine": estimate.cosine, "bits": estimate.bits} for name, estimate in self.estimates.items()
            },
        }


@dataclass(frozen=True)
class Presence:
    """Which of a bundle's files are here.

    Attributes:
        files: how many, the manifest among them.
        nbytes: their bytes.
        not_fetched: tasks that lack some of theirs.
    """

    files: int
    nbytes: int
    not_fetched: tuple[str, ...]


def summarise(path: Path) -> BundleSummary:
    """Sum up the bundle at *path*: reads and checks its tables, opens no shard.

    A task whose files are not here, or that needs a newer version, does not hide the others.

    Raises:
        BundleNotFoundError: there is no bundle at *path*.
        FormatError: a table is damaged or breaks a rule.
    """
    files = BundleFiles(path)
    sizes = _Sizes(files)
    members = Counter(task.group for task in files.manifest.tasks)
    here = {task.group for task in files.manifest.tasks if files.is_fetched(task.name)}
    groups = tuple(
        _summarise_group(files, group, members[group.id], sizes, fetched=group.id in here)
        for group in files.manifest.groups
    )
    share = {group.id: group.nbytes / max(1, group.tasks) for group in groups}
    return BundleSummary(
        path=path,
        format_version=files.manifest.format_version,
        generator=files.manifest.generator,
        base=_summarise_base(files),
        groups=groups,
        tasks=tuple(_summarise_task(files, task, sizes, share[task.group]) for task in files.manifest.tasks),
        nbytes=sum(file.size for file in files.manifest.files),
        base_nbytes=sizes.of(layout.BASE_DIRECTORY) + files.files[layout.BASE_TABLE].size,
        companions_nbytes=sum(file.size for file in files.manifest.files if file.path.startswith(_COMPANIONS)),
    )


def detail(path: Path, name: str) -> TaskDetails:
    """What one task of the bundle at *path* is made of: reads its tables, and the headers and indexes of its shards.

    Raises:
        BundleNotFoundError: there is no bundle at *path*.
        UnknownTaskError: it has no task of that name.
        NotFetchedError: the task's table is not here.
        FormatError: a table or a shard's header is damaged or breaks a rule.
    """
    files = BundleFiles(path)
    task = files.task(name)
    sizes = _Sizes(files)
    members = sum(entry.group == task.entry.group for entry in files.manifest.tasks)
    share = sizes.of(layout.group_directory(task.entry.group)) / members
    stored = _stored_nbytes(files, task)
    return TaskDetails(
        path=path,
        task=_summarise_task(files, task.entry, sizes, share),
        method=next(group.method.name for group in files.manifest.groups if group.id == task.entry.group),
        tensors=tuple(_summarise_tensor(tensor, stored) for tensor in task.table.tensors),
        files=task.table.files,
        estimates=task.table.fidelity.estimates,
    )


def presence(path: Path) -> Presence:
    """Which files of the bundle at *path* are here; reads the manifest.

    Raises:
        BundleNotFoundError: there is no bundle at *path*.
        FormatError: its manifest breaks a rule.
    """
    files = BundleFiles(path)
    here = [file.size for file in files.manifest.files if (path / file.path).is_file()]
    return Presence(
        files=1 + len(here),
        nbytes=(path / layout.MANIFEST).stat().st_size + sum(here),
        not_fetched=tuple(task.name for task in files.manifest.tasks if not files.is_fetched(task.name)),
    )


class _Sizes:
    """Bytes of the listed files, by the directory that they are in."""

    def __init__(self, files: BundleFiles) -> None:
        self._by_directory: dict[str, dict[str, int]] = defaultdict(dict)
        for file in files.manifest.files:
            directory, _, name = file.path.rpartition("/")
            self._by_directory[directory][name] = file.size

    def of(self, directory: str, names: Iterable[str] | None = None) -> int:
        """Bytes of a directory's files, or of those with *names*."""
        found = self._by_directory.get(directory, {})
        return sum(found.values() if names is None else (found[name] for name in names))


def _summarise_base(files: BundleFiles) -> BaseSummary:
    specs = [TensorSpec(tensor.dtype, tensor.shape) for tensor in files.base.values() if tensor.alias_of is None]
    pin = files.manifest.base
    return BaseSummary(
        repo_id=pin.repo_id,
        revision=pin.revision,
        embedded=pin.embedded,
        tensors=len(specs),
        parameters=sum(spec.numel for spec in specs),
        checkpoint_nbytes=sum(spec.nbytes for spec in specs),
    )


def _summarise_group(
    files: BundleFiles, entry: GroupEntry, tasks: int, sizes: _Sizes, *, fetched: bool
) -> GroupSummary:
    merged_dtypes = None
    if fetched:
        with contextlib.suppress(UnsupportedFeatureError):
            merged_dtypes = tuple(sorted({vector.dtype for vector in files.group(entry.id).vectors.values()}))
    return GroupSummary(
        id=entry.id,
        method=entry.method.name,
        parameters=entry.method.parameters,
        merged_dtypes=merged_dtypes,
        tasks=tasks,
        nbytes=sizes.of(layout.group_directory(entry.id)),
    )


def _summarise_task(files: BundleFiles, entry: TaskEntry, sizes: _Sizes, share: float) -> TaskSummary:
    """Sum up one task; *share* is its part of its group's files."""
    directory = layout.task_directory(entry.slug)
    known: dict[str, Any] = {
        "name": entry.name,
        "slug": entry.slug,
        "group": entry.group,
        "parameters": entry.parameters,
        "nbytes": sizes.of(directory),
        "cosine": entry.cosine,
        "gain": entry.gain,
        "fetched": files.is_fetched(entry.name),
    }
    if not known["fetched"]:
        return TaskSummary(**known)
    try:
        table = files.task(entry.name).table
    except UnsupportedFeatureError as error:
        return TaskSummary(**known, unreadable=str(error))
    coded_numel = sum(map(_coded_numel, table.tensors))
    # Codes and whole tensors are in shards of their own.
    coded_nbytes = sizes.of(directory, {shard.file for shard in table.shards if shard.file.startswith("mask-")})
    return TaskSummary(
        **known,
        checkpoint_nbytes=_checkpoint_nbytes(table),
        bits=8 * (coded_nbytes + share) / coded_numel if coded_numel else None,
        score=table.fidelity.score,
        kinds=dict(sorted(Counter(map(_kind, table.tensors)).items())),
    )


def _kind(tensor: Tensor) -> str:
    return str(tensor.__struct_config__.tag)


def _checkpoint_nbytes(table: TaskTable) -> int:
    return sum(TensorSpec(tensor.dtype, tensor.shape).nbytes for tensor in table.tensors if isinstance(tensor, Whole))


def _coded_numel(tensor: Tensor) -> int:
    match tensor:
        case MaskTensor() | SignedTensor():
            return math.prod(tensor.shape)
        case ExtendedTensor() if not isinstance(tensor.leading, SameCode):
            return math.prod(leading_shape(tensor))
        case _:
            return 0


def _summarise_tensor(tensor: Tensor, stored: Mapping[str, int | None]) -> TensorSummary:
    code = tensor.leading if isinstance(tensor, ExtendedTensor) else tensor
    return TensorSummary(
        name=tensor.name,
        kind=_kind(tensor),
        dtype=tensor.dtype if isinstance(tensor, Whole) else None,
        shape=tensor.shape if isinstance(tensor, Whole) else None,
        base=tensor.base_name if isinstance(tensor, BasedTensor) else None,
        tied_to=tensor.of if isinstance(tensor, AliasTensor) else None,
        rows=tensor.rows if isinstance(tensor, ExtendedTensor) else None,
        gain=getattr(code, "gain", None),
        nbytes=0 if isinstance(tensor, AliasTensor | DroppedTensor) else stored[tensor.name],
    )


def _stored_nbytes(files: BundleFiles, task: Task) -> dict[str, int | None]:
    """Bytes of each tensor's payloads in the task's shards; None where one of its shards is not here."""
    headers: list[Mapping[str, int] | None] = []
    for shard in task.shards:
        path = f"{task.directory}/{shard.file}"
        try:
            file = LocalFile(layout.resolve(files.root, path), path)
        except FileNotFoundError:
            headers.append(None)
            continue
        try:
            header = ShardReader(file, shard).header
        finally:
            file.close()
        headers.append({key: entry.stop - entry.start for key, entry in header.tensors.items()})
    found: dict[str, int | None] = {}
    for tensor in task.table.tensors:
        sizes = [_payload_nbytes(stored, headers[stored.payload.shard]) for stored in tensor_payloads(tensor)]
        known = [size for size in sizes if size is not None]
        found[tensor.name] = sum(known) if len(known) == len(sizes) else None
    return found


def _payload_nbytes(stored: Stored, header: Mapping[str, int] | None) -> int | None:
    if stored.payload.codec == "pooled":
        return stored.encoding.nbytes(stored.numel)  # before the pool as a whole is compressed
    return None if header is None else header.get(stored.key)
