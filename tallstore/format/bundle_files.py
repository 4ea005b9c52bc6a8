"""The files of a bundle on disk, without torch: tables parsed and checked once, shards opened when they are needed."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tallstore import forking
from tallstore.errors import BundleNotFoundError, FormatError, IntegrityError, UnknownTaskError
from tallstore.forking import cached_property
from tallstore.format import layout
from tallstore.format.absence import Absence
from tallstore.format.manifest import (
    BaseTable,
    CompanionFile,
    GroupTable,
    Role,
    Shard,
    TaskEntry,
    TaskTable,
)
from tallstore.format.owners import Group, Owner, Task, payloads, table_paths, whole_tensors
from tallstore.format.parsing import MAX_JSON_NBYTES, Table, is_newer_minor, parse, parse_manifest
from tallstore.format.payloads import (
    BaseTensors,
    Coded,
    Stored,
    base_tensors,
    gains_of,
    group_vectors,
    row_count,
    vector_step_of,
)
from tallstore.format.r13 import in_range, row_scales
from tallstore.format.recent import Recent
from tallstore.format.shard_reader import LocalFile, PayloadReader, RangeFile, ShardReader, Verify
from tallstore.format.source import Source
from tallstore.format.tables import (
    check_base,
    check_base_weights,
    check_embedded_base,
    check_group,
    check_manifest,
    check_task,
    refuse,
)

# A process may hold about a thousand files open, a bundle may have more: the ones used last stay open.
_MAX_OPEN_SHARDS = 64
_MAX_TABLES = 256


class BundleFiles:
    """One bundle's files; several threads may use them.

    Attributes:
        root: the bundle's directory.
        where: what messages call the bundle.
        manifest: tallstore.json.
        files: what the manifest lists, by path.
    """

    def __init__(self, root: Path, verify: Verify = "first-read", source: Source | None = None) -> None:
        """Read and check the manifest, and nothing else.

        Args:
            root: the bundle's directory, with the manifest in it.
            verify: when the hash of a chunk is compared.
            source: brings files that are not there when they are needed.

        Raises:
            BundleNotFoundError: there is none.
            FormatError: it breaks a rule.
        """
        self.root, self._verify, self._source = root, verify, source
        self.where = str(root) if source is None else source.where
        self._nbytes_read = _Count()
        try:
            raw = layout.read_bounded(root, layout.MANIFEST, MAX_JSON_NBYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleNotFoundError(f"{root}: there is no bundle (no {layout.MANIFEST}); check the path") from None
        self._nbytes_read.add(len(raw))
        self.manifest = parse_manifest(raw, layout.MANIFEST)
        refuse(check_manifest(self.manifest))
        self.files = {file.path: file for file in self.manifest.files}
        self._absence = Absence(root, self.where, self.manifest, raw)
        self._entries = {task.name: task for task in self.manifest.tasks}
        self._groups = Recent[str, Group](_MAX_TABLES)
        self._tasks = Recent[str, Task](_MAX_TABLES)
        self._shards = Recent[str, ShardReader](_MAX_OPEN_SHARDS)
        self._far = Counter[str]()  # of shards that stay where they are, bytes that were read

    @property
    def opened_as(self) -> tuple[str, str | None]:
        """What to open in order to have the same in another process: a path, or an id on the Hub and its commit."""
        return (str(self.root.absolute()), None) if self._source is None else self._source.opened_as

    @property
    def nbytes_read(self) -> int:
        """Bytes that were read from the bundle's files, those of an embedded base left out."""
        return self._nbytes_read.total

    def close(self) -> None:
        """Close every shard that is not being read; a later read opens it again."""
        self._shards.clear()

    # --- tables ---

    @cached_property
    def base(self) -> BaseTensors:
        """The tensors of base.json.

        Raises:
            FormatError: it is missing, changed, or breaks a rule.
        """
        table = self._read_table(layout.BASE_TABLE, BaseTable)
        refuse(check_base(table))
        return base_tensors(table)

    def entry(self, name: str) -> TaskEntry:
        """The manifest's entry of a task.

        Raises:
            UnknownTaskError: there is none.
        """
        if name not in self._entries:
            raise UnknownTaskError(self.where, "task", name, self._entries)
        return self._entries[name]

    def is_fetched(self, name: str) -> bool:
        """Whether the files of a task are here.

        Raises:
            UnknownTaskError: there is no such task.
        """
        directory = layout.task_directory(self.entry(name).slug)
        return all(layout.is_here(self.root, path) for path in self._paths[directory])

    def group(self, group_id: str) -> Group:
        """A group's table.

        Raises:
            FormatError: it is missing, changed, or breaks a rule.
        """
        return self._groups.get(group_id, lambda: self._open_group(group_id))

    def task(self, name: str) -> Task:
        """A task's table.

        Raises:
            UnknownTaskError: there is no such task.
            NotFetchedError: its table is not here.
            FormatError: its table, its group's or the base's is missing, changed, or breaks a rule.
        """
        entry = self.entry(name)
        return self._tasks.get(name, lambda: self._open_task(entry))

    def tables_of(self, names: Iterable[str]) -> list[Task]:
        """The tables of several tasks, which come together where they have to be brought.

        Raises:
            TallstoreError: as `task`.
        """
        entries = [self.entry(name) for name in names]
        self._bring_tables(path for entry in entries for path in table_paths(entry))
        return [self.task(entry.name) for entry in entries]

    def _open_group(self, group_id: str) -> Group:
        table = self._read_table(layout.group_table(group_id), GroupTable)
        entry = next(group for group in self.manifest.groups if group.id == group_id)
        refuse(check_group(table, entry, self.base, self.files))
        return Group(layout.group_directory(group_id), table.shards, group_vectors(table))

    def _open_task(self, entry: TaskEntry) -> Task:
        self._bring_tables(table_paths(entry))
        table = self._read_table(layout.task_table(entry.slug), TaskTable)
        group = self.group(entry.group)
        refuse(check_task(table, entry, self.base, group.vectors, self.files))
        directory = layout.task_directory(entry.slug)
        return Task(directory, table.shards, entry, table, group, self.base, whole_tensors(table))

    def _read_table(self, path: str, table: type[Table]) -> Table:
        entry = self.files[path]
        self._bring_tables([path])
        try:
            raw = layout.read_bounded(self.root, path, MAX_JSON_NBYTES)
        except FileNotFoundError:
            raise self._absence.missing(path) from None
        self._nbytes_read.add(len(raw))
        self._absence.check_size(entry, len(raw))
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            error = IntegrityError("FILE-2", path, "changed since it was written; fetch the file again")
            raise self._absence.other(error, path)
        return parse(raw, table, path, newer_minor=is_newer_minor(self.manifest))

    # --- shards ---

    @property
    def brings(self) -> bool:
        """Whether what is not here comes when it is needed."""
        return self._source is not None

    def bring(
        self,
        tasks: Iterable[Task],
        names: Iterable[str] | None = None,
        *,
        shared: bool = True,
        ranges: bool = False,
    ) -> None:
        """Have the shards here that are about to be read: they come at the same time, where they have to be brought.

        Nobody must call this: what is read brings itself, one shard after the other.

        Args:
            tasks: whose shards.
            names: of the tensors that will be read; all of them by default.
            shared: whether the vectors are read, too, that the tasks share with others.
            ranges: whether a shard may stay where it is, of which little will be read.

        Raises:
            TallstoreError: as `Source.fetch`.
        """
        if self._source is None:
            return
        wanted = None if names is None else list(names)
        nbytes = Counter[str]()
        for task in tasks:
            for path, stored in payloads(task, wanted, shared=shared):
                nbytes[path] += stored.encoding.nbytes(stored.numel)
        self._bring(path for path in nbytes if not (ranges and self._leave(self._source, path, nbytes[path])))

    def _leave(self, source: Source, path: str, nbytes: int) -> bool:
        """Whether to leave a shard where it is, of which *nbytes* will be read beside what was before."""
        if layout.is_here(self.root, path):
            return False
        is_left = source.is_better_read_there(self.files[path], self._far[path] + nbytes)
        if is_left:
            self._far[path] += nbytes
        return is_left

    def payload(self, owner: Owner, stored: Stored) -> PayloadReader:
        """The chunks of a payload of *owner*; opens its shard.

        Raises:
            NotFetchedError: the shard is a task's, and not here.
            FormatError: it is a group's and not here, or header or index break a rule.
        """
        shard, path = owner.shards[stored.payload.shard], owner.path(stored.payload.shard)
        if path in self._far and not layout.is_here(self.root, path):
            reader = self._shards.get(f"{path}, far away", lambda: self._open_far(path, shard))
        else:
            reader = self._shards.get(path, lambda: self._open_shard(path, shard))
        return reader.payload(stored.key, stored.payload, stored.encoding, stored.numel, stored.set_count)

    def scales(self, task: Task, coded: Coded, role: Role | None = None) -> tuple[NDArray[np.float32], int]:
        """The scales of a coded tensor, or of the leading rows of an extended one (REC-4).

        Args:
            task: whose tensor it is.
            coded: the tensor.
            role: of the vector that the values are of; None where they are of none.

        Returns:
            float32 scales, one or one a row, and the elements of a row.

        Raises:
            FormatError: NUM-3, one is above 2^60; or as `payload`.
        """
        gains = np.array([coded.code.gain or 0.0], np.float32)
        by_row = gains_of(coded)
        if by_row is not None:
            gains = self.payload(task, by_row).all().view("<f4")
        stepped = None if role is None else self.steps(task, coded, role)
        if stepped is None:
            return gains, coded.numel // gains.size
        steps, row_length = stepped
        scales = row_scales(gains, steps)
        if not in_range(scales).all():
            where = f"{layout.task_table(task.entry.slug)}, tensor {coded.name!r}"
            raise FormatError("NUM-3", where, "a row's gain times its step is above 2^60")
        return scales, row_length

    def steps(self, task: Task, coded: Coded, role: Role) -> tuple[NDArray[np.float32], int] | None:
        """The steps of a vector for a coded tensor, or for the leading rows of an extended one; None without steps.

        Returns:
            float32 steps, one a row, and the elements of a row.

        Raises:
            FormatError: as `payload`.
        """
        vector = task.group.vector(coded.base_name, role)
        step = vector_step_of(vector, task.base[coded.base_name].shape)
        if step is None:
            return None
        rows = row_count(coded.shape, vector.row_axes)
        return self.payload(task.group, step).all().view("<f4")[:rows], coded.numel // rows

    def _open_shard(self, path: str, shard: Shard) -> ShardReader:
        self._bring([path])
        try:
            file = LocalFile(layout.resolve(self.root, path), path, self._nbytes_read.add)
        except FileNotFoundError:
            raise self._absence.missing(path) from None
        return self._open_reader(file, path, shard, self._verify)

    def _open_far(self, path: str, shard: Shard) -> ShardReader:
        """A shard that stays where it is. What comes over a wire is always verified."""
        if self._source is None:
            raise AssertionError("a shard that is far away, of a bundle that is not")
        file = self._source.read_there(self.files[path], self._nbytes_read.add)
        return self._open_reader(file, path, shard, "first-read" if self._verify == "never" else self._verify)

    def _open_reader(self, file: RangeFile, path: str, shard: Shard, verify: Verify) -> ShardReader:
        try:
            self._absence.check_size(self.files[path], file.nbytes)
            reader = ShardReader(file, shard, verify)
        except FormatError as error:
            file.close()
            raise self._absence.other(error, path) from None
        except BaseException:
            file.close()
            raise
        # Closed when nothing reads it any more, be it that it was forgotten while a thread was at it.
        weakref.finalize(reader, file.close)
        return reader

    # --- files ---

    @cached_property
    def _paths(self) -> Mapping[str, list[str]]:
        """Listed paths by directory."""
        paths = defaultdict[str, list[str]](list)
        for path in self.files:
            paths[path.rpartition("/")[0]].append(path)
        return paths

    def embedded_base(self) -> Path:
        """The directory of the embedded base, whose files are all here, with their sizes.

        Raises:
            FormatError: MAN-5, BASE-4, FILE-4, FILE-1 or PATH-2.
        """
        refuse(check_embedded_base(self.manifest))
        refuse(check_base_weights(self.manifest))
        self._bring(self._paths[layout.BASE_DIRECTORY])
        for path in self._paths[layout.BASE_DIRECTORY]:
            try:
                with layout.readable(path):
                    size = layout.resolve(self.root, path).stat().st_size
            except FileNotFoundError:
                raise self._absence.missing(path) from None
            self._absence.check_size(self.files[path], size)
        return self.root / layout.BASE_DIRECTORY

    def companion(self, task: Task, file: CompanionFile) -> Path:
        """A companion file of a task, with its size.

        Raises:
            NotFetchedError: it is not here.
            FormatError: PATH-2 or FILE-1.
        """
        path = layout.companion_path(file.sha256)
        self._bring(layout.companion_path(each.sha256) for each in task.table.files)
        try:
            place = layout.resolve(self.root, path)
            with layout.readable(path):
                size = place.stat().st_size
        except FileNotFoundError:
            raise self._absence.missing_companion(path, file.name, task.entry.name) from None
        self._absence.check_size(self.files[path], size)
        return place

    def _bring_tables(self, paths: Iterable[str]) -> None:
        """As `_bring`, unless a table is larger than it can be."""
        if self._source is None:
            return
        wanted = list(paths)
        for path in wanted:
            if self.files[path].size > MAX_JSON_NBYTES:
                raise FormatError("JSON-4", path, f"is over the limit of {MAX_JSON_NBYTES} bytes")
        self._bring(wanted)

    def _bring(self, paths: Iterable[str]) -> None:
        """Have files in their places, if there is where to get them."""
        if self._source is not None:
            self._source.fetch([self.files[path] for path in dict.fromkeys(paths)])


class _Count:
    """A number that several threads add to."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = forking.lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.total += number
