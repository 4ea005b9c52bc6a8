"""Gains that are tuned on what the weights do: a bundle is packed on scratch, and its tasks' factors learned from it.

What learns them is the caller's (`tallstore.Calibration`); here is what it works on, and what comes of it.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tallstore import files
from tallstore.checkpoints import Checkpoint
from tallstore.errors import OptionError
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded, coded_part
from tallstore.loading.coded import open_coded
from tallstore.loading.decode import deltas
from tallstore.loading.expert import Expert
from tallstore.loading.pinned_base import PinnedBase
from tallstore.meter import Meter
from tallstore.packing.job import Fitting, Job

#: A task's state dict with its coded tensors at given factors: float32 [count]. Gradients flow back to the factors.
WeightsAt = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Tuned:
    """What came of tuning one task.

    Attributes:
        factors: one a coded tensor.
        before, after: the loss with factors of 1, and with these.
    """

    factors: tuple[float, ...]
    before: float
    after: float


@runtime_checkable
class Calibrate(Protocol):
    """What packing asks of a calibration."""

    @property
    def steps(self) -> int:
        """How often it tries other factors, a task."""

    def tune(self, task: str, weights_at: WeightsAt, count: int, after_step: Callable[[], None]) -> Tuned:
        """The factors of a task's *count* coded tensors; *after_step* is to be called after each step."""


def check_calibration(calibrate: object) -> None:
    """Refuse what is none.

    Raises:
        OptionError: naming it.
    """
    if calibrate is not None and not isinstance(calibrate, Calibrate):
        raise OptionError(f"calibrate is {calibrate!r}; give tallstore.Calibration(loss)")


@dataclass(frozen=True, eq=False)
class _Adjustable:
    """A coded tensor of an expert, or the leading rows of one.

    Attributes:
        origin: the base, and the centre where the tensor moves: float32, or the base's float64; 1-D.
        move: what the task adds at factor one: float32, 1-D.
        further: the further rows of an extended tensor, in its own dtype, 1-D.
        dtype, shape: of the whole tensor.
    """

    origin: Tensor
    move: Tensor
    further: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]

    def at(self, factor: Tensor) -> Tensor:
        """The whole tensor, its move taken *factor* times."""
        moved = (self.origin + factor * self.move).to(self.dtype)
        whole = torch.cat([moved, self.further]) if self.further.numel() else moved
        return whole.view(self.shape)


class AdjustableExpert:
    """A packed expert in memory, as a function of one factor a coded tensor.

    Memory: of a coded parameter 8 bytes, of all others their own; and what a call makes.

    Attributes:
        names: of the coded tensors, in the order of their factors.
    """

    def __init__(self, task: Task, bundle: BundleFiles, base: PinnedBase) -> None:
        expert = Expert(task, bundle, base)
        self._carriers = {name: expert.carrier(name) for name in expert.names}
        self._adjustable: dict[str, _Adjustable] = {}
        self._fixed: dict[str, Tensor] = {}
        for name in dict.fromkeys(self._carriers.values()):
            coded = coded_part(task.tensor(name))
            if coded is None:
                self._fixed[name] = expert.tensor(name)
            else:
                self._adjustable[name] = _adjustable(expert, coded, bundle, base)
        self.names = tuple(self._adjustable)

    def __call__(self, factors: Tensor) -> dict[str, Tensor]:
        """The state dict; tied names have one tensor."""
        moved = {
            name: adjustable.at(factor)
            for (name, adjustable), factor in zip(self._adjustable.items(), factors.unbind(), strict=True)
        }
        carried = {**self._fixed, **moved}
        return {name: carried[carrier] for name, carrier in self._carriers.items()}


def _adjustable(expert: Expert, coded: Coded, bundle: BundleFiles, base: PinnedBase) -> _Adjustable:
    elements = open_coded(bundle, expert.task, base, coded)
    origins, moves = [], []
    for start in range(0, coded.numel, CHUNK_NUMEL):
        stop = min(start + CHUNK_NUMEL, coded.numel)
        move = deltas(elements.sides(start, stop), start, stop)
        own = base.read(coded.base_name, start, stop)
        origin = own if own.dtype is torch.float64 else own.float()
        if elements.centre is not None:
            origin = torch.where(
                move == 0, origin, origin + elements.centre.chunk(start).everywhere(0, stop - start, start)
            )
        origins.append(origin)
        moves.append(move)
    whole = expert.task.tensor(coded.name)
    further = expert.elements(coded.name, coded.numel, expert.spec(coded.name).numel)
    return _Adjustable(torch.cat(origins), torch.cat(moves), further, further.dtype, whole.shape)


class Calibrator:
    """Calibrates what a job's methods made.

    Attributes:
        advice: of the last calibration: a line for each task that it did not help.
    """

    def __init__(self, job: Job, calibrate: Calibrate, meter: Meter, given: Checkpoint | None) -> None:
        self._job, self._calibrate, self._meter, self._given = job, calibrate, meter, given
        self.advice: tuple[str, ...] = ()

    def __call__(self, fitting: Fitting) -> Fitting:
        """The same fitting with each task's factors. Packs it once more, in scratch space.

        Scores that were measured before are dropped: they are of other weights.

        Raises:
            OptionError: the loss of a task is no finite number, or not differentiable.
        """
        with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch:
            root = Path(scratch)
            with files.writing(root):
                self._job.write(root, fitting, embed=False, given=self._given)
            with contextlib.closing(BundleFiles(root)) as bundle:
                base = PinnedBase(bundle.base, lambda: self._job.base, "never")
                factors, lines = self._tune_tasks(bundle, base)
        self.advice = tuple(lines)
        self._meter.end_phase()
        return replace(fitting, factors=factors, scores={})

    def _tune_tasks(self, bundle: BundleFiles, base: PinnedBase) -> tuple[Mapping[tuple[str, str], float], list[str]]:
        factors: dict[tuple[str, str], float] = {}
        lines = []
        for expert in self._job.experts:
            task = expert.task
            adjustable = AdjustableExpert(bundle.task(task), bundle, base)
            if not adjustable.names:
                continue
            after_step = functools.partial(self._meter.advance, expert.nbytes)
            tuned = self._calibrate.tune(task, adjustable, len(adjustable.names), after_step)
            if tuned.after < tuned.before:
                factors.update(
                    {(task, name): factor for name, factor in zip(adjustable.names, tuned.factors, strict=True)}
                )
            else:
                lines.append(
                    f"calibrate: the loss of task {task!r} did not fall ({tuned.before:.4g}, then {tuned.after:.4g});"
                    " its gains are those of the fit"
                )
        return factors, lines
