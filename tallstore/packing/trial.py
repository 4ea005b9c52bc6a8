"""Trials: a method packed on a sample of every tensor, by the packer itself, and what that says of the whole."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tallstore.checkpoints import Checkpoint
from tallstore.files import hash_file
from tallstore.fit import Fit, Method
from tallstore.format.dtypes import chunk_count
from tallstore.packing.companions import companions_of, reading
from tallstore.packing.fidelity import Sums
from tallstore.packing.group import GroupPacker
from tallstore.packing.job import Fitting, Job
from tallstore.packing.outcome import PackReport
from tallstore.packing.plan import Expert
from tallstore.packing.sampling import THIN, SampledCheckpoint, Stride, stride_of

_HASH_NBYTES = 35  # of a chunk of the base, in base.json
_CARRIED_NBYTES = 120  # of a companion file, in task.json
_LISTED_NBYTES = 240  # of a file, in the manifest
_THIN_NUMEL = 1 << 17
_THIN_SHARE = 32


@dataclass(frozen=True)
class TensorTrial:
    """One base tensor under one method, as predicted for the whole of it.

    Attributes:
        numel: elements that were to be coded, over all tasks.
        nbytes: of all tasks' codes, of what the fit failed on and is stored whole, and of the shared vectors.
        sums: by task, over the reconstruction; none of what is stored whole.
    """

    numel: float
    nbytes: float
    sums: Mapping[str, Sums]


@dataclass(frozen=True)
class Trial:
    """One method, as predicted.

    Attributes:
        tensors: by base tensor, those that could be coded.
        bundle_nbytes: of all files, the base by reference.
        framing_nbytes: of the files of codes and shared vectors, all but their payloads.
    """

    tensors: Mapping[str, TensorTrial]
    bundle_nbytes: float
    framing_nbytes: float

    @property
    def bits(self) -> float | None:
        """What a parameter that was to be coded costs (see `tallstore.inspecting.cost`); None where there is none."""
        numel = sum(tensor.numel for tensor in self.tensors.values())
        nbytes = self.framing_nbytes + sum(tensor.nbytes for tensor in self.tensors.values())
        return 8 * nbytes / numel if numel else None

    def sums(self, task: str) -> Sums:
        """Of one task."""
        return sum((tensor.sums.get(task, Sums()) for tensor in self.tensors.values()), Sums())


class Trials:
    """Packs samples of a job's inputs."""

    def __init__(self, job: Job, *, thin: bool = False) -> None:
        """Sample every tensor.

        Args:
            job: the inputs.
            thin: take a thirty-second of an expert at most, or 2^17 elements if that is more, of tensors that all
                experts have coded; what comes of it is true of those tensors alone.
        """
        self._job = job
        self._strides = {name: stride_of(job.base.spec(name), THIN if thin else None) for name in job.base.names}
        names = _few(job, self._strides) if thin else None
        experts = tuple(_sampled(expert, self._strides, names) for expert in job.experts)
        self._companions_nbytes = _companions_nbytes(job.experts)
        self._sampled = job.over(SampledCheckpoint(job.base, self._strides, names), experts)

    def prepare(self, method: Method) -> Fit:
        """*method* at work on the samples as if they were all there is: near enough, without reading the rest."""
        return self._sampled.prepare(method)

    def run(self, fitting: Fitting, given: Checkpoint | None = None) -> Trial:
        """Pack the samples with *fitting*, which was prepared on the whole inputs.

        Args:
            fitting: the method at work.
            given: somebody else's merged model, for the methods that have one.
        """
        if given is not None:
            given = SampledCheckpoint(given, {name: self._strides.get(name) for name in given.names})
        with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch:
            report, group = self._sampled.write(Path(scratch), fitting, embed=False, given=given)
        return self._predict(report, group)

    def _predict(self, report: PackReport, group: GroupPacker) -> Trial:
        """Scale every tensor's part up to its whole; all else of the bundle is the same."""
        base, sampled = self._job.base, self._sampled.base
        found: dict[str, _Sum] = defaultdict(_Sum)
        rest = float(report.bundle_nbytes + self._companions_nbytes)
        framing = 0.0
        for name, nbytes in group.vector_nbytes.items():
            rest -= nbytes
            framing -= nbytes
            found[name].nbytes += nbytes * _ratio(base, sampled, name)
        for whole, part, task, packed in zip(
            self._job.experts, self._sampled.experts, group.tasks.values(), report.tasks, strict=True
        ):
            framing += (packed.bits or 0.0) / 8 * packed.coded_numel
            for name, coded in task.coded.items():
                ratio = _ratio(whole.checkpoint, part.checkpoint, name)
                of = found[whole.base_names[name] or name]
                of.numel += coded.numel * ratio
                of.nbytes += coded.nbytes * ratio
                of.sums[whole.task] = coded.sums * ratio
                rest -= coded.nbytes
                framing -= coded.nbytes
            for stored in task.whole:
                scaled = stored.nbytes * _ratio(whole.checkpoint, part.checkpoint, stored.tensor)
                rest += scaled - stored.nbytes
                if stored.degenerate:
                    of = found[whole.base_names[stored.tensor] or stored.tensor]
                    of.numel += whole.checkpoint.spec(stored.tensor).numel
                    of.nbytes += scaled
                    rest -= scaled
                    framing -= stored.nbytes
        chunks = sum(
            chunk_count(base.spec(name).numel) - chunk_count(sampled.spec(name).numel) for name in sampled.names
        )
        tensors = {name: TensorTrial(of.numel, of.nbytes, of.sums) for name, of in found.items()}
        coded_nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return Trial(tensors, rest + coded_nbytes + _HASH_NBYTES * chunks, framing)


def _companions_nbytes(experts: Sequence[Expert]) -> int:
    """What companion files take, each content once, and about what the tables say of them: the same in every trial."""
    sizes: dict[str, int] = {}
    nbytes = 0
    for expert in experts:
        for path in companions_of(expert.checkpoint, expert.where).values():
            with reading(path, expert.where):
                file = hash_file(path)
            sizes[file.sha256] = file.size
            nbytes += _CARRIED_NBYTES
    return nbytes + sum(sizes.values()) + _LISTED_NBYTES * len(sizes)


@dataclass
class _Sum:
    """A `TensorTrial` that is being added up."""

    numel: float = 0.0
    nbytes: float = 0.0
    sums: dict[str, Sums] = field(default_factory=dict)


def _ratio(whole: Checkpoint, part: Checkpoint, name: str) -> float:
    return whole.spec(name).numel / max(1, part.spec(name).numel)


def _few(job: Job, strides: Mapping[str, Stride | None]) -> list[str]:
    """Base tensors that stand for the others: so many that their samples keep within what a thin trial may take."""

    def numel(name: str) -> int:
        spec, stride = job.base.spec(name), strides[name]
        return spec.numel if stride is None else math.prod(stride.sample(spec).shape)

    names = job.coded_by_all
    budget = max(_THIN_NUMEL, sum(job.base.spec(name).numel for name in names) // _THIN_SHARE)
    affordable = [name for name in names if numel(name) <= budget] or sorted(names, key=numel)[:1]
    return affordable[:: max(1, math.ceil(sum(map(numel, affordable)) / budget))]


def _sampled(expert: Expert, strides: Mapping[str, Stride | None], names: Collection[str] | None) -> Expert:
    """The expert's tensors in the samples of their base tensors; those that the base does not have by themselves.

    With *names*, those of these base tensors alone.
    """
    if names is not None:
        base_names = {name: base_name for name, base_name in expert.base_names.items() if base_name in names}
        expert = replace(expert, aliases={}, base_names=base_names, dropped=())
    own: dict[str, Stride | None] = {}
    for name, base_name in expert.base_names.items():
        spec = expert.checkpoint.spec(name)
        stride = stride_of(spec) if base_name is None else strides[base_name]
        fits = stride is not None and len(spec.shape) > 0 and spec.numel == spec.shape[0] * stride.unit
        own[name] = stride if fits else None
    shown = None if names is None else own.keys()
    return replace(expert, checkpoint=SampledCheckpoint(expert.checkpoint, own, shown))
