"""A base and its experts, opened: set a method to work on them, and write a bundle of what comes out."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from tallstore.packing.outcome import PackReport, report
from tallstore.packing.plan import Expert, counts_for_the_trim, is_private, parts_by_base_name
from tallstore.packing.stack import coded_stack, trimmable_chunks
from tallstore.packing.stack_fit import Advance

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
    """

    private: tuple[str, ...] = ()
    base_ref: HubRef | None = None
    compress: bool = True
    estimates: bool = True


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
    ) -> None:
        self.base, self.experts, self.pool = base, experts, pool
        self._options, self._meter = options, meter
        self._parts = parts_by_base_name(base, experts, options.private)

    def over(self, base: Checkpoint, experts: tuple[Expert, ...]) -> Job:
        """The same job over other weights of the same names; nobody is told how far it has come."""
        options = replace(self._options, estimates=False)
        return Job(base, experts, options, meter=Meter(None, [0]), pool=self.pool)

    def prepare(self, method: Method) -> Fit:
        """*method* at work on these experts."""
        streams = {
            expert.task: functools.partial(self._task_vector_chunks, position)
            for position, expert in enumerate(self.experts)
        }
        fit = prepare(method, Inputs(streams, self._tiles, self.pool.map))
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

    def _tiles(self) -> Iterator[Tile]:
        """Every tile that will be coded."""
        for base_name, parts in self._parts.items():
            stack = coded_stack(self.base, base_name, parts)
            if stack is not None:
                yield from map(stack.tile, stack.spans)
            self._meter.advance(sum(part.spec.nbytes for part in parts))

    @functools.cached_property
    def _table(self) -> tables.BaseTable:
        return assemble.base_table(self.base)

    def write(
        self, root: Path, fitting: Fitting, *, embed: bool, given: Checkpoint | None = None
    ) -> tuple[PackReport, GroupPacker]:
        """Write the whole bundle into the empty directory *root*.

        Args:
            root: the bundle's directory.
            fitting: the method at work.
            embed: put the base into the bundle.
            given: somebody else's merged model, for the methods that have one.

        Returns:
            what was written, for people and tensor by tensor.
        """
        options = self._options
        group = GroupPacker(
            self.base,
            self.experts,
            root,
            fits=fitting.fits,
            factors=fitting.factors,
            given=given,
            compress=options.compress,
            estimates=options.estimates,
            pool=self.pool,
        )
        written = assemble.write_base(self.base, self._table, root, embed=embed)
        self._pack_tensors(group)
        method = assemble.recorded_method(fitting.method)
        written |= assemble.write_group(group, method, root)
        entries, packed = [], []
        for task in group.tasks.values():
            name = task.expert.task
            table, task_files = assemble.write_task(
                task, group.id, root, score=fitting.scores.get(name), chosen=fitting.chosen(name)
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

    def _pack_tensors(self, group: GroupPacker) -> None:
        for base_name, parts in self._parts.items():
            share = _Share(sum(part.spec.nbytes for part in parts), self._meter.advance)
            group.pack_tensor(base_name, parts, share.advance)
            share.end()
        for task in group.tasks.values():
            for name, counterpart in task.expert.base_names.items():
                if counterpart is None:
                    private = is_private(name, self._options.private)
                    task.store_private(name, "asked for by private=" if private else "the base does not have it")
                    self._meter.advance(task.expert.checkpoint.spec(name).nbytes)
        self._meter.end_phase()


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
