"""A base and its experts, opened: set a method to work on them, and write a bundle of what comes out."""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from tallstore.checkpoints import Checkpoint, HubRef
from tallstore.fit import Emr, Fit, Inputs, Localize, Method, TallMask, Tile, prepare
from tallstore.format import manifest as tables
from tallstore.format.dtypes import itemsize
from tallstore.format.manifest import SharedDtype
from tallstore.meter import Meter
from tallstore.packing import assemble
from tallstore.packing.group import GroupPacker
from tallstore.packing.in_order import in_order
from tallstore.packing.outcome import PackReport, report
from tallstore.packing.plan import Expert, Part, counts_for_the_trim, is_private, parts_by_base_name
from tallstore.packing.stack import coded_stack, trimmable_chunks
from tallstore.packing.stack_fit import Advance
from tallstore.packing.unit import Unit, UnitTensor

_UNIT_NUMEL = 1 << 22  # elements of a unit of work, over all its tasks; a tensor of more is large

#: By base tensor: what codes it, and the dtype of its shared vectors.
Fits = Callable[[str], tuple[Fit, SharedDtype]]


@dataclass(frozen=True)
class Options:
    """What does not depend on the method.

    Attributes:
        private: glob patterns of tensors to store whole.
        base_ref: where readers get the base.
        compress: whether payloads are compressed where that makes them smaller.
        estimates: whether to estimate what other fits would reach.
        group: the number of the group that is written.
        taken: slugs of the tasks that the bundle has in other groups.
    """

    private: tuple[str, ...] = ()
    base_ref: HubRef | None = None
    compress: bool = True
    estimates: bool = True
    group: int = 1
    taken: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fitting:
    """A method at work on a job's experts.

    Attributes:
        method: what was chosen, for the tables and the report.
        fits: its fits.
        merged_dtype: of the shared vectors, for the report.
        chosen: by task, the parameters that are its own.
        scores: the user's, by task, where they are known already.
        factors: by task and tensor of the expert, what its gains are multiplied by; 1 where there is none.
    """

    method: Method
    fits: Fits
    merged_dtype: str
    chosen: Callable[[str], Mapping[str, float]] = lambda _: {}
    scores: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def uniform(
        cls, method: Method, fit: Fit, dtype: SharedDtype, scores: Mapping[str, float] = MappingProxyType({})
    ) -> Fitting:
        """One fit for every tensor."""
        return cls(method, lambda _: (fit, dtype), dtype, fit.chosen, scores)


class Job:
    """The inputs, opened; can be fitted and written more than once."""

    def __init__(
        self,
        base: Checkpoint,
        experts: tuple[Expert, ...],
        options: Options,
        *,
        meter: Meter,
        pool: ThreadPoolExecutor,
        table: tables.BaseTable | None = None,
    ) -> None:
        """Take what is opened; *table* is base.json, where there is one already: it is made otherwise."""
        self._given_table = table
        self.base, self.experts, self.pool = base, experts, pool
        self._options, self._meter = options, meter
        self._parts = parts_by_base_name(base, experts, options.private)

    def over(self, base: Checkpoint, experts: tuple[Expert, ...]) -> Job:
        """The same job over other weights of the same names; nobody is told how far it has come."""
        options = replace(self._options, estimates=False)
        return Job(base, experts, options, meter=Meter(None, [0]), pool=self.pool)

    @property
    def coded_by_all(self) -> list[str]:
        """Base tensors that every expert has in a form that can be coded."""
        return [
            name
            for name, parts in self._parts.items()
            if len(parts) == len(self.experts) and all(part.whole_because is None for part in parts)
        ]

    def prepare(self, method: Method) -> Fit:
        """*method* at work on these experts."""
        streams = {
            expert.task: functools.partial(self._task_vector_chunks, position)
            for position, expert in enumerate(self.experts)
        }
        tensors = [functools.partial(self._tiles, base_name) for base_name in self._parts]
        fit = prepare(method, Inputs(streams, tensors, self.pool.map))
        if passes_before(method):
            self._meter.end_phase()
        return fit

    def _task_vector_chunks(self, position: int) -> Iterator[Tensor]:
        """One expert's whole task vector: every floating-point tensor that the base has too, but the private ones."""
        task = self.experts[position].task
        for base_name, parts in self._parts.items():
            for part in parts:
                if part.expert.task == task and counts_for_the_trim(part, self._options.private):
                    for chunk in trimmable_chunks(self.base, base_name, part):
                        yield chunk
                        self._meter.advance(chunk.numel() * itemsize(part.spec.dtype))

    def _tiles(self, base_name: str) -> Iterator[Tile]:
        """Every tile of one base tensor that will be coded."""
        parts = self._parts[base_name]
        stack = coded_stack(self.base, base_name, parts)
        if stack is not None:
            yield from map(stack.tile, stack.spans)
        self._meter.advance(sum(part.spec.nbytes for part in parts))

    @functools.cached_property
    def _table(self) -> tables.BaseTable:
        return self._given_table or assemble.base_table(self.base)

    def write(
        self,
        root: Path,
        fitting: Fitting,
        *,
        embed: bool,
        given: Checkpoint | None = None,
        executor: Executor | None = None,
    ) -> tuple[PackReport, GroupPacker]:
        """Write the whole bundle into the empty directory *root*.

        Args:
            root: the bundle's directory.
            fitting: the method at work.
            embed: put the base into the bundle.
            given: somebody else's merged model, for the methods that have one.
            executor: somebody's, to pack the tensors; None takes the job's own threads. The bundle is the same.

        Returns:
            what was written, for people and tensor by tensor.
        """
        options = self._options
        group = GroupPacker(
            self.base,
            self.experts,
            root,
            factors=fitting.factors,
            given=given,
            compress=options.compress,
            estimates=options.estimates,
            run=self.pool.map,
            number=options.group,
            taken=options.taken,
        )
        written = assemble.write_base(self.base, self._table, root, embed=embed)
        # Whoever gave the directory removes it after an error, when no interrupted unit is writing there any more.
        scratch = Path(tempfile.mkdtemp(prefix=".units-", dir=root))
        self._pack_tensors(group, fitting, given, scratch, executor)
        shutil.rmtree(scratch)  # of each unit, the group has removed the file; workers that died left others
        self._store_unknown(group)
        self._meter.end_phase()
        method = assemble.recorded_method(fitting.method)
        written |= assemble.write_group(group, method, root)
        entries, packed = [], []
        finished = self.pool.map(lambda task: task.writer.finish(), group.tasks.values())
        for task, (shards, by_name) in zip(group.tasks.values(), finished, strict=True):
            name = task.expert.task
            table, task_files = assemble.write_task(
                task, group.id, root, shards, by_name, score=fitting.scores.get(name), chosen=fitting.chosen(name)
            )
            written |= task_files
            numel = assemble.parameters(task.expert.checkpoint)
            entries.append(assemble.task_entry(table, numel))
            packed.append((task, table))
        pin = assemble.pin(self.base, options.base_ref, embed=embed)
        groups = (tables.GroupEntry(id=group.id, method=method),)
        manifest = assemble.write_manifest(root, pin, groups, tuple(entries), written)
        made = report(
            self.base,
            root,
            manifest,
            packed,
            method=fitting.method,
            dtype=fitting.merged_dtype,
        )
        return made, group

    def _pack_tensors(
        self, group: GroupPacker, fitting: Fitting, given: Checkpoint | None, scratch: Path, executor: Executor | None
    ) -> None:
        """Every tensor that the base has, in order: small ones in units, large ones here, tile by tile on all threads.

        Somebody's executor gets the large ones too, each a unit.
        """
        files = (scratch / f"{number:06d}" for number in itertools.count())
        work = (
            names[0] if is_large and executor is None else self._unit(names, fitting, given, next(files))
            for names, is_large in _batches(self._parts)
        )
        with contextlib.closing(in_order(work, self.pool, executor)) as steps:
            for step in steps:
                if isinstance(step, str):
                    parts = self._parts[step]
                    share = _Share(sum(part.spec.nbytes for part in parts), self._meter.advance)
                    group.pack(step, parts, *fitting.fits(step), share.advance)
                    share.end()
                else:
                    group.add(step)
                    self._meter.advance(step.nbytes)

    def _unit(self, names: Sequence[str], fitting: Fitting, given: Checkpoint | None, file: Path) -> Unit:
        """The work on some tensors of the base, and no more than it needs."""
        held: dict[str, list[str]] = {}
        for name in names:
            for part in self._parts[name]:
                held.setdefault(part.expert.task, []).append(part.name)
        experts = {
            expert.task: Expert(
                expert.task,
                expert.checkpoint.part(held[expert.task]),
                {},
                {name: expert.base_names[name] for name in held[expert.task]},
                (),
            )
            for expert in self.experts
            if expert.task in held
        }
        tensors = []
        for name in names:
            parts = tuple(replace(part, expert=experts[part.expert.task]) for part in self._parts[name])
            tensors.append(UnitTensor(name, parts, *fitting.fits(name)))
        keys = {(task, name) for task, own in held.items() for name in own}
        if given is not None:  # a checkpoint has at least one tensor
            given = given.part([name for name in names if name in given.names] or given.names[:1])
        return Unit(
            base=self.base.part(names),
            given=given,
            experts=tuple(experts.values()),
            tensors=tuple(tensors),
            file=file,
            factors={key: factor for key, factor in fitting.factors.items() if key in keys},
            estimates=self._options.estimates,
            compress=self._options.compress,
        )

    def _store_unknown(self, group: GroupPacker) -> None:
        """The tensors that the base does not have."""
        for task in group.tasks.values():
            for name, counterpart in task.expert.base_names.items():
                if counterpart is None:
                    private = is_private(name, self._options.private)
                    task.store_private(name, "asked for by private=" if private else "the base does not have it")
                    self._meter.advance(task.expert.checkpoint.spec(name).nbytes)


def _batches(parts: Mapping[str, Sequence[Part]]) -> Iterator[tuple[list[str], bool]]:
    """Base tensors in their order, a few small ones or one large one at a time; whether it is a large one."""
    batch: list[str] = []
    filled = 0
    for name, of in parts.items():
        numel = sum(part.spec.numel for part in of)
        if batch and filled + numel > _UNIT_NUMEL:
            yield batch, False
            batch, filled = [], 0
        if numel > _UNIT_NUMEL:
            yield [name], True
        else:
            batch.append(name)
            filled += numel
    if batch:
        yield batch, False


class _Share:
    """What one tensor is of the whole: bytes as they come along, and all that are left when it is done."""

    def __init__(self, nbytes: int, tell: Advance) -> None:
        self._left, self._tell = nbytes, tell
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        """So many more bytes are done; never more than there are. Threads may share it."""
        with self._lock:
            told = min(nbytes, self._left)
            self._left -= told
        self._tell(told)

    def end(self) -> None:
        """It is done, whatever was told."""
        self.advance(self._left)


def passes_before(method: Method) -> int:
    """How often a method reads every task vector before it is at work: for a trim over all of it, or for a rescaler."""
    match method:
        case TallMask(merge="ties") | Localize(masks=None):
            return 2
        case Emr(gain="published"):
            return 1
        case _:
            return 0
