"""`Auto`: which method each tensor gets, so that the whole is truest under a budget of bits."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tallstore import files
from tallstore.errors import OptionError
from tallstore.fit import Auto, Fit, LeastSquares, Method, Sign, SignedMask, TallMask, Uniform
from tallstore.format.manifest import SharedDtype
from tallstore.packing.job import Fitting, Job
from tallstore.packing.outcome import PackReport
from tallstore.packing.trial import TensorTrial, Trials

#: What may be chosen for a tensor.
CANDIDATES: tuple[Method, ...] = (
    *(SignedMask(threshold) for threshold in (0.0, 0.6, 0.9, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3)),
    *(SignedMask(threshold, scale="row") for threshold in (0.9, 1.5, 2.2)),
    TallMask(1.0),
    LeastSquares(2),
    Sign(),
    Sign(scale="tensor"),
    *(Uniform(3, threshold=threshold) for threshold in (None, 1.0, 1.5, 2.0, 2.5)),
    *(Uniform(3, scale="tensor", threshold=threshold) for threshold in (None, 1.0, 1.5, 2.0, 2.5)),
    Uniform(4),
    Uniform(8),
    Uniform(16),
)
_ATTEMPTS = 4  # the sample's sizes are not quite the whole's: a bundle over the budget is packed again


@dataclass(frozen=True)
class Choice:
    """One candidate for one tensor.

    Attributes:
        nbytes: what it costs.
        damage: the sum over the tasks of its ||R||^2 / ||tau||^2, the norm being that of the whole task vector.
    """

    nbytes: float
    damage: float


def choose(options: Sequence[Sequence[Choice]], budget: float) -> list[int] | None:
    """The candidate of each tensor, by position, of about the least total damage that fits into *budget* bytes.

    Each tensor's candidates on the convex hull of cost and damage are taken up in the order of damage saved a byte,
    which is best but for the last step; what is left is spent on single swaps. One candidate for all tensors, where
    that fits, is tried likewise: nothing of that kind is better than the result.

    Args:
        options: by tensor; each has the same candidates.
        budget: bytes.

    Returns:
        a position for each tensor; None where even the cheapest do not fit.
    """
    starts = [_along_hulls(options, budget)]
    starts += [[position] * len(options) for position in range(min(map(len, options), default=0))]
    fitting = [_spend(options, chosen, budget) for chosen in starts if chosen and _nbytes(options, chosen) <= budget]
    return min(fitting, key=lambda chosen: _damage(options, chosen), default=None)


def _along_hulls(options: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """From each tensor's cheapest candidate up its hull, steps in the order of damage saved a byte."""
    hulls = [_hull(candidates) for candidates in options]
    chosen = [hull[0] for hull in hulls]
    left = budget - _nbytes(options, chosen)
    steps = [
        (_saving(options[tensor], before, after), tensor, before, after)
        for tensor, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    ]
    for _, tensor, before, after in sorted(steps, key=lambda step: -step[0]):
        cost = options[tensor][after].nbytes - options[tensor][before].nbytes
        if chosen[tensor] == before and cost <= left:
            chosen[tensor] = after
            left -= cost
    return chosen


def _spend(options: Sequence[Sequence[Choice]], chosen: Sequence[int], budget: float) -> list[int]:
    """Swap one tensor's candidate after the other, as long as what saves most damage still fits."""
    chosen = list(chosen)
    left = budget - _nbytes(options, chosen)
    for tensor in sorted(range(len(options)), key=lambda place: -options[place][chosen[place]].damage):
        current = options[tensor][chosen[tensor]]
        fits = [place for place, found in enumerate(options[tensor]) if found.nbytes - current.nbytes <= left]
        chosen[tensor] = min(fits, key=lambda place: options[tensor][place].damage)
        left -= options[tensor][chosen[tensor]].nbytes - current.nbytes
    return chosen


def _nbytes(options: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    return sum(candidates[place].nbytes for candidates, place in zip(options, chosen, strict=True))


def _damage(options: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    return sum(candidates[place].damage for candidates, place in zip(options, chosen, strict=True))


def _hull(candidates: Sequence[Choice]) -> list[int]:
    """Positions on the lower convex hull of cost and damage, from the cheapest on."""
    order = sorted(range(len(candidates)), key=lambda place: (candidates[place].nbytes, candidates[place].damage))
    hull: list[int] = []
    for place in order:
        if hull and candidates[place].damage >= candidates[hull[-1]].damage:
            continue
        while len(hull) > 1 and _saving(candidates, hull[-2], hull[-1]) <= _saving(candidates, hull[-1], place):
            hull.pop()
        if hull and candidates[hull[-1]].nbytes == candidates[place].nbytes:
            hull.pop()
        hull.append(place)
    return hull


def _saving(candidates: Sequence[Choice], before: int, after: int) -> float:
    """Damage saved a byte."""
    cost = candidates[after].nbytes - candidates[before].nbytes
    return (candidates[before].damage - candidates[after].damage) / cost if cost else float("inf")


def choices(trials: Sequence[Mapping[str, TensorTrial]]) -> dict[str, list[Choice]]:
    """What each candidate would do to each tensor, from its trials; in the order of the candidates."""
    energies: dict[str, dict[str, float]] = {}  # ||tau||^2 by tensor and task: a task that was stored whole has it too
    for trial in trials:
        for name, tensor in trial.items():
            for task, sums in tensor.sums.items():
                energies.setdefault(name, {}).setdefault(task, sums.task_vector)
    norms: dict[str, float] = {}
    for by_task in energies.values():
        for task, energy in by_task.items():
            norms[task] = norms.get(task, 0.0) + energy
    found = {}
    for name in dict.fromkeys(name for trial in trials for name in trial):
        found[name] = [_choice(trial[name], energies.get(name, {}), norms) for trial in trials]
    return found


def _choice(tensor: TensorTrial, energies: Mapping[str, float], norms: Mapping[str, float]) -> Choice:
    damage = 0.0
    for task, energy in energies.items():
        sums = tensor.sums.get(task)
        damage += (energy if sums is None else sums.reconstruction) / norms[task]
    return Choice(tensor.nbytes, damage)


def write(
    job: Job,
    method: Auto,
    root: Path,
    place: Path,
    *,
    embed: bool,
    calibrated: Callable[[Fitting], Fitting] | None = None,
    executor: Executor | None = None,
) -> PackReport:
    """Choose and write the bundle into the empty directory *root*; *place* is what messages call it.

    What keeps the budget is *calibrated* and written again, if that is asked for. Trials are made here, and tensors
    packed on *executor* where there is one.

    Raises:
        OptionError: the budget cannot be kept.
    """
    prepared = [(job.prepare(candidate), candidate.merged_dtype) for candidate in CANDIDATES]
    trials = Trials(job)
    found = [
        trials.run(Fitting.uniform(candidate, fit, dtype))
        for candidate, (fit, dtype) in zip(CANDIDATES, prepared, strict=True)
    ]
    options = choices([trial.tensors for trial in found])
    numel = sum(max(trial.tensors[name].numel for trial in found) for name in options)
    framing = max(trial.framing_nbytes for trial in found)
    budget = method.max_bits / 8 * numel - framing
    for _ in range(_ATTEMPTS):
        chosen = choose(list(options.values()), budget)
        if chosen is None:
            break
        fits: dict[str, tuple[Fit, SharedDtype]] = defaultdict(lambda: prepared[0])
        fits.update({name: prepared[position] for name, position in zip(options, chosen, strict=True)})
        fitting = Fitting(method, fits.__getitem__, "by tensor")
        report = _written(job, fitting, root, place, embed=embed, executor=executor)
        if calibrated is not None and _mean_bits(report) <= method.max_bits:
            report = _written(job, calibrated(fitting), root, place, embed=embed, executor=executor)
        bits = _mean_bits(report)
        if bits <= method.max_bits:
            return report
        budget -= 1.02 * (bits - method.max_bits) / 8 * numel
    least = framing + sum(min(choice.nbytes for choice in candidates) for candidates in options.values())
    bits = 1.02 * 8 * least / max(1, numel)
    raise OptionError(f"Auto: max_bits={method.max_bits:g} cannot be kept here; give at least {bits:.2f}")


def _written(
    job: Job, fitting: Fitting, root: Path, place: Path, *, embed: bool, executor: Executor | None
) -> PackReport:
    """The report of a bundle that takes the place of what is in *root*."""
    with files.writing(place):
        for directory in ("base", "files", "groups", "tasks"):  # a staged directory has a file of its own, which stays
            shutil.rmtree(root / directory, ignore_errors=True)
        report, _ = job.write(root, fitting, embed=embed, executor=executor)
    return report


def _mean_bits(report: PackReport) -> float:
    bits = [task.bits for task in report.tasks if task.bits is not None]
    return sum(bits) / len(bits) if bits else 0.0
