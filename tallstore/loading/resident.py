"""What a switcher keeps in memory: decoded payloads of tasks and their groups, and the base as it was read."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar, cast
from weakref import finalize

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tallstore import forking
from tallstore.checkpoints.watched import WatchedFiles
from tallstore.format.bits import Bytes
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL, chunk_count, chunk_spans
from tallstore.format.manifest import Role, Whole
from tallstore.format.owners import Owner, Task
from tallstore.format.payloads import Coded, Stored, coded_part, tensor_payloads, vector_step_of, vector_values_of
from tallstore.format.shard_reader import PayloadReader
from tallstore.loading.pinned_base import PinnedBase

#: A mapping of a file takes one of the system's, of which Linux gives a process 65,530.
_MAX_HELD_CHUNKS: Final = 1 << 14
#: Python keeps a descriptor for each: so much of what a process may have open is for mappings.
_DESCRIPTORS_SHARE: Final = 4

Opened = TypeVar("Opened")
_Scales = tuple[NDArray[np.float32], int]


@dataclass(frozen=True)
class _ResidentPayload(PayloadReader):
    """Chunks that were checked and decoded before."""

    chunks: tuple[Bytes, ...] = ()
    ranks: tuple[int, ...] = ()

    def chunk(self, index: int) -> Bytes:
        return self.chunks[index]

    def rank(self, index: int) -> int:
        return self.ranks[index]


@dataclass
class _Resident:
    """Payloads of one group or task, by their keys; and of a task the scales that were made of them.

    Attributes:
        complete: tensors of a task of which everything is here.
        nbytes: of the decoded chunks.
        opened: what was made of the payloads of a task's tensors, by their names and uses.
    """

    payloads: dict[str, _ResidentPayload] = field(default_factory=dict)
    scales: dict[tuple[str, Role | None], _Scales] = field(default_factory=dict)
    steps: dict[tuple[str, Role], _Scales | None] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    nbytes: int = 0
    opened: dict[tuple[str, Hashable], object] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=forking.lock)


class ResidentFiles(BundleFiles):
    """A bundle's files, of which what was asked to stay is answered from memory; several threads may use them.

    What tasks have of their own is bounded: the tasks that were used last stay. The vectors that they share stay as
    long as one of their tasks does, beside the bound.
    """

    def __init__(self, files: BundleFiles, limit_nbytes: int) -> None:
        """Keep nothing yet.

        Args:
            files: whose tables, open shards and count of bytes are used.
            limit_nbytes: of tasks that are not kept for another reason.
        """
        vars(self).update(vars(files))
        self._limit = limit_nbytes
        self._resident_groups: dict[str, _Resident] = {}
        self._resident_tasks = OrderedDict[str, tuple[Task, _Resident]]()  # by name, the one used last at the end
        self._kept = Counter[str]()
        self._residency = forking.lock()

    @property
    def resident_tasks(self) -> tuple[str, ...]:
        """Tasks with something in memory, the one that was used last at the end."""
        with self._residency:
            return tuple(self._resident_tasks)

    @property
    def tasks_nbytes(self) -> int:
        """Bytes of what tasks have of their own."""
        with self._residency:
            return sum(resident.nbytes for _, resident in self._resident_tasks.values())

    @property
    def groups_nbytes(self) -> int:
        """Bytes of the vectors that they share."""
        with self._residency:
            return sum(resident.nbytes for resident in self._resident_groups.values())

    @contextlib.contextmanager
    def keep(self, *names: str | None) -> Iterator[None]:
        """A block in which these tasks stay, whatever the bound; None stands for no task."""
        held = [name for name in names if name is not None]
        with self._residency:
            self._kept.update(held)
        try:
            yield
        finally:
            with self._residency:
                self._kept.subtract(held)
                self._evict()

    def hold(self, task: Task, names: Iterable[str]) -> None:
        """Have all payloads in memory that *names* of a task are made of, checked; reads those that are not.

        Raises:
            TallstoreError: as `payload`, `PayloadReader.chunk` and `scales`.
        """
        name, names = task.entry.name, list(names)
        self.bring([task], names)
        with self.keep(name):
            with self._residency:
                _, own = self._resident_tasks.setdefault(name, (task, _Resident()))
                self._resident_tasks.move_to_end(name)
                shared = self._resident_groups.setdefault(task.group.directory, _Resident())
            for tensor in map(task.tensor, names):
                if tensor.name not in own.complete:
                    self._hold(task, tensor, own, shared)
                    own.complete.add(tensor.name)

    def is_complete(self, task: Task, name: str) -> bool:
        """Whether everything is here that a tensor of *task* is made of, the base left out."""
        resident = self._resident(task)
        return resident is not None and name in resident.complete

    def opened(self, task: Task, name: str, use: Hashable, make: Callable[[], Opened]) -> Opened:
        """What *make* gives for a tensor of *task* and this *use* of it; kept with what is held of the task."""
        resident = self._resident(task)
        if resident is None or name not in resident.complete:
            return make()
        found = resident.opened.get((name, use))
        if found is None:
            found = resident.opened[name, use] = make()
        return cast("Opened", found)

    def payload(self, owner: Owner, stored: Stored) -> PayloadReader:
        """As `BundleFiles.payload`; from memory where it is held there."""
        resident = self._resident(owner)
        found = None if resident is None else resident.payloads.get(stored.key)
        return super().payload(owner, stored) if found is None else found

    def scales(self, task: Task, coded: Coded, role: Role | None = None) -> _Scales:
        """As `BundleFiles.scales`; kept with what is held of the task."""
        resident = self._resident(task)
        if resident is None:
            return super().scales(task, coded, role)
        if (coded.name, role) not in resident.scales:
            resident.scales[coded.name, role] = super().scales(task, coded, role)
        return resident.scales[coded.name, role]

    def steps(self, task: Task, coded: Coded, role: Role) -> _Scales | None:
        """As `BundleFiles.steps`; kept with what is held of the task."""
        resident = self._resident(task)
        if resident is None:
            return super().steps(task, coded, role)
        if (coded.name, role) not in resident.steps:
            resident.steps[coded.name, role] = super().steps(task, coded, role)
        return resident.steps[coded.name, role]

    def _hold(self, task: Task, tensor: Whole, own: _Resident, shared: _Resident) -> None:
        for stored in tensor_payloads(tensor):
            self._read(task, stored, own)
        coded = coded_part(tensor)
        if coded is None:
            return
        for stored in _shared_payloads(task, coded):
            self._read(task.group, stored, shared)
        for role in coded.roles or (None,):
            self.scales(task, coded, role)

    def _resident(self, owner: Owner) -> _Resident | None:
        if not isinstance(owner, Task):
            return self._resident_groups.get(owner.directory)
        found = self._resident_tasks.get(owner.entry.name)
        return None if found is None else found[1]

    def _read(self, owner: Owner, stored: Stored, resident: _Resident) -> None:
        if stored.key in resident.payloads:
            return
        with resident.lock:  # who comes second finds what the first has read
            if stored.key not in resident.payloads:
                payload = _resident_payload(super().payload(owner, stored), stored)
                resident.payloads[stored.key] = payload
                resident.nbytes += sum(chunk.nbytes for chunk in payload.chunks)

    def _evict(self) -> None:
        """Forget tasks that are beyond the bound, and groups without a task; the caller has the lock."""
        sizes = {name: resident.nbytes for name, (_, resident) in self._resident_tasks.items()}
        total = sum(sizes.values())
        for name, nbytes in sizes.items():
            if total > self._limit and not self._kept[name]:
                del self._resident_tasks[name]
                total -= nbytes
        used = {task.group.directory for task, _ in self._resident_tasks.values()}
        for directory in self._resident_groups.keys() - used:
            del self._resident_groups[directory]


class ResidentBase(PinnedBase):
    """The base, whose tensors stay where they were read: mapped files in the system's cache, state dicts in memory."""

    def __init__(self, base: PinnedBase, *, keep: bool) -> None:
        """Read nothing yet.

        Args:
            base: that is read.
            keep: what was read. Where every read is to be checked, nothing may be kept.
        """
        self._source, self._keep = base, keep
        self._held: dict[tuple[str, int], Tensor] = {}
        self._complete: set[str] = set()
        self._files = WatchedFiles(())  # that chunks were read of
        finalize(self, _mappings.give_back, self._held)

    def hold(self, name: str, numel: int) -> None:
        """Read a tensor of *numel* elements, checked, and keep it.

        Raises:
            BaseMismatchError, InputError: as `read`.
        """
        if name in self._complete:
            return
        self._source.name_of(name)  # of a tensor without elements nothing is read, and yet it must be there (BASE-1)
        if not self._held:
            self._files = self._source.watch()
        for index, span in enumerate(chunk_spans(numel)):
            chunk = self._source.read(name, *span, mapped=self._keep)
            if self._keep and (name, index) not in self._held and _mappings.take():
                self._held[name, index] = chunk
        if self._keep:
            self._complete.add(name)

    def check(self) -> None:
        """Refuse a base that somebody wrote to since it was read: it is mapped, and not what was verified any more.

        Raises:
            DamagedCheckpointError: somebody did.
        """
        self._files.check()

    def holds(self, name: str, start: int) -> bool:
        """Whether the chunk that element *start* lies in stays where it was read."""
        return (name, start // CHUNK_NUMEL) in self._held

    def name_of(self, name: str) -> str:
        """As `PinnedBase.name_of`."""
        return self._source.name_of(name)

    def read(self, name: str, start: int, stop: int, *, mapped: bool = False) -> Tensor:
        """As `PinnedBase.read`; what is held is mapped in any case."""
        chunk = self._held.get((name, start // CHUNK_NUMEL))
        if chunk is None:
            return self._source.read(name, start, stop, mapped=mapped)
        first = start // CHUNK_NUMEL * CHUNK_NUMEL
        return chunk if stop - start == chunk.numel() else chunk[start - first : stop - first]

    @property
    def nbytes_read(self) -> int:
        """As `PinnedBase.nbytes_read`."""
        return self._source.nbytes_read

    @property
    def directory(self) -> Path | None:
        """As `PinnedBase.directory`."""
        return self._source.directory

    def close(self) -> None:
        """Forget what was kept; the base itself is its bundle's to close."""
        _mappings.give_back(self._held)
        self._complete = set()


def _shared_payloads(task: Task, coded: Coded) -> Iterator[Stored]:
    """What a coded tensor takes of its group."""
    roles: tuple[Role, ...] = (*coded.roles, "centre")
    shape = task.base[coded.base_name].shape
    for role in roles:
        vector = task.group.vectors.get((coded.base_name, role))
        if vector is not None:
            yield vector_values_of(vector, shape)
            step = vector_step_of(vector, shape)
            if step is not None:
                yield step


def _resident_payload(reader: PayloadReader, stored: Stored) -> _ResidentPayload:
    count = chunk_count(stored.numel)
    chunks = tuple(_writable(reader.chunk(index)) for index in range(count))
    ranks = () if stored.set_count is None else tuple(map(reader.rank, range(count)))
    return _ResidentPayload(reader.numel, reader.encoding, reader.where, chunks.__getitem__, None, chunks, ranks)


def _writable(chunk: Bytes) -> Bytes:
    """In memory that torch can take as it is: of read-only arrays, every reader would make copies."""
    return chunk if chunk.flags.writeable else chunk.copy()


class _Mappings:
    """How many chunks this process holds, for all of its models; those beyond are read anew at each switch."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = forking.lock()

    def take(self) -> bool:
        """Whether one more may be held."""
        with self._lock:
            is_free = self._count < _most_held()
            self._count += is_free
            return is_free

    def give_back(self, held: dict[tuple[str, int], Tensor]) -> None:
        """Let go of all that are in *held*."""
        with self._lock:
            self._count -= len(held)
        held.clear()


_mappings: Final = _Mappings()


def _most_held() -> int:
    """How many chunks may be held."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return _MAX_HELD_CHUNKS
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_HELD_CHUNKS if descriptors < 0 else min(_MAX_HELD_CHUNKS, descriptors // _DESCRIPTORS_SHARE)
