"""What is in a bundle, read from its tables alone: sizes, methods, fidelity, kinds of tensors.

Nothing is decoded, and neither torch nor numpy is needed: importing them would take longer than the rest. The tables
are parsed strictly and their hashes compared; whether they agree with each other is for `verify`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tallstore.errors import BundleNotFoundError, FormatError, IntegrityError, UnsupportedFeatureError
from tallstore.format import layout
from tallstore.format.dtypes import TensorSpec
from tallstore.format.manifest import (
    BaseTable,
    GroupEntry,
    GroupTable,
    Scalar,
    TaskEntry,
    TaskTable,
    Tensor,
    Whole,
)
from tallstore.format.parsing import MAX_JSON_NBYTES, Table, is_newer_minor, parse, parse_manifest
from tallstore.inspecting.cost import Costs

_CODED_KINDS = frozenset({"mask", "signed", "two-level", "sign", "sparse", "uniform"})
_WHOLE_KIND = "private"
_SAME_KIND = "same"
_COMPANIONS = layout.companion_path("")  # their directory, as a prefix


@dataclass(frozen=True)
class BaseSummary:
    """The base that the experts are rebuilt on.

    Attributes:
        repo_id, revision: where readers get it; None where it is not said.
        embedded: whether it is in the bundle.
        tensors: how many it has, ties counted once; None, as what stands below, where its table is not here.
        parameters: their elements.
        checkpoint_nbytes: their bytes in a plain checkpoint.
    """

    repo_id: str | None
    revision: str | None
    embedded: bool
    tensors: int | None = None
    parameters: int | None = None
    checkpoint_nbytes: int | None = None


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
        unreadable: what this version lacks to read it, in a sentence; None for a task that it reads.
        checkpoint_nbytes: its tensors in a plain checkpoint.
        bits: a parameter costs that was to be coded (see `tallstore.inspecting.cost`); None where there is none.
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
        """Tensors that are extended, tied or dropped."""
        return sum((self.kinds or {}).values()) - self.coded - self.same - self.whole


@dataclass(frozen=True)
class BundleSummary:
    """A bundle. Sizes are those that the manifest lists, whether the files are here or not, and its own.

    Attributes:
        path: its directory.
        where: what to call it: the directory, or the id on the Hub and the commit.
        format_version, generator: as in the manifest.
        base, groups, tasks: what it is made of.
        nbytes: all files.
        base_nbytes: the embedded base and the table of its hashes.
        companions_nbytes: configs, tokenizers and the like, each once however many tasks have it.
    """

    path: Path
    where: str
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
        base_nbytes = self.base.checkpoint_nbytes if self.base.embedded else None
        return (base_nbytes or 0) + sum(task.checkpoint_nbytes or 0 for task in self.weighed)

    @property
    def weighed_nbytes(self) -> int:
        """The bundle without the tasks that are not `weighed`: what stands against `checkpoints_nbytes`."""
        return self.nbytes - self.tasks_nbytes + sum(task.nbytes for task in self.weighed)

    @property
    def ratio(self) -> float | None:
        """How many times smaller the bundle is than `checkpoints_nbytes`; None where no task is weighed."""
        return self.checkpoints_nbytes / max(1, self.weighed_nbytes) if self.weighed else None

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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return asdict(self)


def summarise(path: Path, on_hub: str | None = None) -> BundleSummary:
    """Sum up the bundle at *path*: reads its tables, opens no shard.

    A task whose files are not here, or that needs a newer version, does not hide the others.

    Args:
        path: its directory.
        on_hub: its id and commit, where *path* is a snapshot in the Hub's cache: base.json need not be there.

    Raises:
        BundleNotFoundError: there is no bundle at *path*.
        FormatError: a table is damaged, or breaks a rule.
    """
    tables = Tables(path)
    manifest = tables.manifest
    here = {task.group for task in manifest.tasks if tables.is_fetched(task)}
    too_new: dict[str, str] = {}
    groups = tuple(_summarise_group(tables, group, too_new, fetched=group.id in here) for group in manifest.groups)
    return BundleSummary(
        path=path,
        where=on_hub or str(path),
        format_version=manifest.format_version,
        generator=manifest.generator,
        base=_summarise_base(tables, needed=on_hub is None),
        groups=groups,
        tasks=tuple(_find_task(tables, task, too_new.get(task.group)) for task in manifest.tasks),
        nbytes=tables.manifest_nbytes + sum(file.size for file in manifest.files),
        base_nbytes=tables.nbytes(layout.BASE_DIRECTORY) + tables.nbytes("", [layout.BASE_TABLE]),
        companions_nbytes=sum(file.size for file in manifest.files if file.path.startswith(_COMPANIONS)),
    )


def presence(path: Path) -> Presence:
    """Which files of the bundle at *path* are here; reads the manifest.

    Raises:
        BundleNotFoundError: there is no bundle at *path*.
        FormatError: its manifest breaks a rule.
    """
    tables = Tables(path)
    here = [file.size for file in tables.manifest.files if layout.is_here(path, file.path)]
    return Presence(
        files=1 + len(here),
        nbytes=tables.manifest_nbytes + sum(here),
        not_fetched=tuple(task.name for task in tables.manifest.tasks if not tables.is_fetched(task)),
    )


class Tables:
    """The tables of a bundle, each parsed when it is asked for, and the sizes of its files.

    Attributes:
        manifest: tallstore.json.
        manifest_nbytes: its size.
        costs: what its files are for.
    """

    def __init__(self, root: Path) -> None:
        """Read the manifest.

        Raises:
            BundleNotFoundError: there is none.
            FormatError: it is damaged, or breaks a rule.
        """
        self._root = root
        try:
            raw = layout.read_bounded(root, layout.MANIFEST, MAX_JSON_NBYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleNotFoundError(f"{root}: there is no bundle (no {layout.MANIFEST}); check the path") from None
        self.manifest = parse_manifest(raw, layout.MANIFEST)
        self.manifest_nbytes = len(raw)
        self.costs = Costs(self.manifest)
        self._files = {file.path: file for file in self.manifest.files}
        self._sizes: dict[str, dict[str, int]] = defaultdict(dict)
        for file in self.manifest.files:
            directory, _, name = file.path.rpartition("/")
            self._sizes[directory][name] = file.size

    def read(self, path: str, table: type[Table]) -> Table:
        """Read another table.

        Raises:
            FormatError: it is not listed or not here, damaged, or breaks a rule.
        """
        listed = self._files.get(path)
        if listed is None:
            raise FormatError("MAN-5", layout.MANIFEST, f"{path} is not among the files that the manifest lists")
        try:
            raw = layout.read_bounded(self._root, path, MAX_JSON_NBYTES)
        except FileNotFoundError:
            raise FormatError("FILE-4", path, f"is missing from {self._root}; fetch the bundle again") from None
        if hashlib.sha256(raw).hexdigest() != listed.sha256:
            raise IntegrityError("FILE-2", path, "changed since it was written; fetch the file again")
        return parse(raw, table, path, newer_minor=is_newer_minor(self.manifest))

    def nbytes(self, directory: str, names: Iterable[str] | None = None) -> int:
        """Bytes of a directory's listed files, or of those of them with *names*."""
        sizes = self._sizes.get(directory, {})
        return sum(sizes.values()) if names is None else sum(sizes.get(name, 0) for name in names)

    def is_fetched(self, task: TaskEntry) -> bool:
        """Whether all files of a task are here."""
        directory = layout.task_directory(task.slug)
        return all(self.is_here(f"{directory}/{name}") for name in self._sizes.get(directory, ()))

    def is_here(self, path: str) -> bool:
        """Whether a listed file is here."""
        return layout.is_here(self._root, path)


def _summarise_base(tables: Tables, *, needed: bool) -> BaseSummary:
    pin = tables.manifest.base
    if not needed and not tables.is_here(layout.BASE_TABLE):
        return BaseSummary(pin.repo_id, pin.revision, pin.embedded)
    table = tables.read(layout.BASE_TABLE, BaseTable)
    specs = [TensorSpec(tensor.dtype, tensor.shape) for tensor in table.tensors if tensor.alias_of is None]
    return BaseSummary(
        repo_id=pin.repo_id,
        revision=pin.revision,
        embedded=pin.embedded,
        tensors=len(specs),
        parameters=sum(spec.numel for spec in specs),
        checkpoint_nbytes=sum(spec.nbytes for spec in specs),
    )


def _summarise_group(tables: Tables, entry: GroupEntry, too_new: dict[str, str], *, fetched: bool) -> GroupSummary:
    """Sum up one group; where its table needs a newer version, *too_new* learns why."""
    merged_dtypes = None
    if fetched:
        try:
            vectors = tables.read(layout.group_table(entry.id), GroupTable).vectors
            merged_dtypes = tuple(sorted({vector.dtype for vector in vectors}))
        except UnsupportedFeatureError as error:
            too_new[entry.id] = str(error)
    return GroupSummary(
        id=entry.id,
        method=entry.method.name,
        parameters=entry.method.parameters,
        merged_dtypes=merged_dtypes,
        tasks=sum(task.group == entry.id for task in tables.manifest.tasks),
        nbytes=tables.nbytes(layout.group_directory(entry.id)),
    )


def _find_task(tables: Tables, entry: TaskEntry, unreadable: str | None) -> TaskSummary:
    """Sum up one task; *unreadable* says why its group cannot be read."""
    table = None
    fetched = tables.is_fetched(entry)
    if fetched and unreadable is None:
        try:
            table = tables.read(layout.task_table(entry.slug), TaskTable)
        except UnsupportedFeatureError as error:
            unreadable = str(error)
    return summarise_task(tables, entry, table, fetched=fetched, unreadable=unreadable)


def summarise_task(
    tables: Tables,
    entry: TaskEntry,
    table: TaskTable | None,
    *,
    fetched: bool,
    unreadable: str | None = None,
) -> TaskSummary:
    """Sum up one task.

    Args:
        tables: of the bundle.
        entry: the manifest's for the task.
        table: its task.json; None where it is not here, or cannot be read.
        fetched: whether its files are here.
        unreadable: why its table cannot be read.
    """
    known: dict[str, Any] = {
        "name": entry.name,
        "slug": entry.slug,
        "group": entry.group,
        "parameters": entry.parameters,
        "nbytes": tables.nbytes(layout.task_directory(entry.slug)),
        "cosine": entry.cosine,
        "gain": entry.gain,
        "fetched": fetched,
        "unreadable": unreadable,
    }
    if table is None:
        return TaskSummary(**known)
    return TaskSummary(
        **known,
        checkpoint_nbytes=_checkpoint_nbytes(table),
        bits=tables.costs.bits(table),
        score=table.fidelity.score,
        kinds=dict(sorted(Counter(map(kind_of, table.tensors)).items())),
    )


def kind_of(tensor: Tensor) -> str:
    """The tensor's kind, as task.json names it."""
    return str(tensor.__struct_config__.tag)


def _checkpoint_nbytes(table: TaskTable) -> int:
    return sum(TensorSpec(tensor.dtype, tensor.shape).nbytes for tensor in table.tensors if isinstance(tensor, Whole))
