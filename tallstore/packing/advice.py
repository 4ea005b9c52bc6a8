"""What would serve these experts better than the method they were packed with, a line each.

A vector that many tasks share carries the crosstalk of all of them: at some number of tasks, masks over it are less
true than each task's signs, which share nothing. Signs of a share p of the weights take p bits and have sqrt(p) times
their cosine: so much is asked of a method of less than a bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tallstore.fit import Emr, LeastSquares, Method, SignedMask, TallMask, described
from tallstore.format.manifest import SharedDtype
from tallstore.packing.job import Fitting, Job
from tallstore.packing.outcome import PackedTask
from tallstore.packing.trial import Trials

_NOTABLE: Final = 0.02  # of a cosine: less is within what a sample, or methods of other forms, differ by
_FEWEST: Final = 4  # tasks, of which there may be two groups
# Below it, no fit of benchmarks/RESULTS.md kept 98 % of the predictions of any experts; most lost far more.
_LOW_COSINE: Final = 0.5
_ESTIMATED: Final = {"signed": "SignedMask()", "sign": "Sign(scale='tensor')"}
_LARGEST_GROUP: Final = 64
_HOW: Final = "pack the first group, then tallstore.add each of the others"


@dataclass(frozen=True)
class Fidelity:
    """What a method comes to on some tasks, on average.

    Attributes:
        cosine: of the coded tensors.
        bits: that one of their elements costs.
    """

    cosine: float
    bits: float

    def is_below(self, signs: Fidelity, by: float = 0.0) -> bool:
        """Whether this is less true than signs alone of no more bits, by more than *by*."""
        return self.cosine < signs.cosine * math.sqrt(min(1.0, self.bits / signs.bits)) - by

    def beats(self, other: Fidelity) -> bool:
        """Whether this is no larger and no less true."""
        return self.bits <= other.bits and self.cosine >= other.cosine

    def __str__(self) -> str:
        """For messages."""
        return f"{self.cosine:.3f} at {self.bits:.2f}"


@dataclass(frozen=True)
class Groups:
    """Fewer tasks to a shared vector.

    Attributes:
        count, size: so many groups of so many tasks, about.
        fidelity: as predicted from the first of them.
    """

    count: int
    size: int
    fidelity: Fidelity

    def __str__(self) -> str:
        """What comes of it."""
        return f"{self.count} groups of {self.size} tasks, about {self.fidelity}"


def mean(values: Iterable[tuple[float | None, float | None]]) -> Fidelity | None:
    """Of cosine and bits by task; tasks of which nothing is coded are left out. None where that are all."""
    coded = [(cosine, bits) for cosine, bits in values if cosine is not None and bits is not None]
    if not coded:
        return None
    return Fidelity(*(math.fsum(column) / len(coded) for column in zip(*coded, strict=True)))


def _wears_out(method: Method, count: int) -> bool:
    """Whether what *count* tasks share under a method serves each of them less than if they were fewer."""
    return isinstance(method, TallMask | Emr | LeastSquares) and count >= _FEWEST


def in_groups(job: Job, method: Method, dtype: SharedDtype, signs: Fidelity) -> Groups | None:
    """The largest groups, of 2, 4, 8, … tasks, in which a method is no less true than *signs*; None without any.

    Cost:
        Trials of 2, 4, 8, … tasks until one fails, of 64 or half of them at most: each packs a thirty-second of an
        expert at most, or 2^17 elements if that is more. Nothing else is read.
    """
    if isinstance(method, TallMask) and (method.given is not None or len(method.lambdas) > 1):
        return None
    found = None
    size = 2
    with contextlib.suppress(OSError):  # no room for scratch: what is packed does not need advice
        while size <= min(_LARGEST_GROUP, len(job.experts) // 2):
            fidelity = _predicted(job.over(job.base, job.experts[:size]), method, dtype)
            if fidelity is None or fidelity.is_below(signs):
                break
            found = Groups(len(job.experts) // size, size, fidelity)
            size *= 2
    return found


def _predicted(job: Job, method: Method, dtype: SharedDtype) -> Fidelity | None:
    """On a thin sample; None where the experts have no tensor in common that can be coded."""
    if not job.coded_by_all:
        return None
    trials = Trials(job, thin=True)
    trial = trials.run(Fitting.uniform(method, trials.prepare(method), dtype))
    return mean((trial.sums(expert.task).cosine, trial.bits) for expert in job.experts)


def advise(job: Job, method: Method, dtype: SharedDtype, tasks: Sequence[PackedTask]) -> tuple[str, ...]:
    """What to say of a pack: which tasks are no fine-tunes, and what would serve the others better.

    Args:
        job: what was packed.
        method: how.
        dtype: of the shared vectors.
        tasks: what came of it.
    """
    same = [task.name for task in tasks if not task.coded_numel and not task.whole]
    slips = [f"task {name!r} equals the base in every tensor; leave it out if it is the base" for name in same]
    return (*slips, *_better(job, method, dtype, tasks))


def _better(job: Job, method: Method, dtype: SharedDtype, tasks: Sequence[PackedTask]) -> tuple[str, ...]:
    """A line at most."""
    measured = [task for task in tasks if task.cosine is not None and "sign" in task.estimates]
    here = mean((task.cosine, task.bits) for task in measured)
    if here is None:
        return ()
    signs, signed = (
        mean((found.cosine, found.bits) for task in measured if (found := task.estimates.get(name)) is not None)
        for name in ("sign", "signed")
    )
    if signs is not None and _wears_out(method, len(tasks)) and here.is_below(signs, _NOTABLE):
        what = f"cosine {here} bits a parameter, against {signs}"
        worn = f"over {len(tasks)} tasks, {method.name} is less true than signs alone: {what}"
        return (f"{worn}; {_instead(in_groups(job, method, dtype, signs), signed, signs)}",)
    if isinstance(method, SignedMask) or signed is None or signed.bits >= here.bits or signed.cosine <= here.cosine:
        return _where_little_is_left(measured)
    theirs = f"{signed.bits:.2f} bits a parameter at cosine {signed.cosine:.3f}"
    return (
        f"SignedMask() would be smaller and truer here: about {theirs}, against {here.bits:.2f} at {here.cosine:.3f}",
    )


def _where_little_is_left(measured: Sequence[PackedTask]) -> tuple[str, ...]:
    """A line on the least true of *measured*, if little of its move is left.

    A higher cosine promises nothing by itself: how much error a network bears, its weights do not tell.
    """
    low = [(task.cosine, task) for task in measured if task.cosine is not None and task.cosine < _LOW_COSINE]
    if not low:
        return ()
    cosine, task = min(low, key=lambda pair: pair[0])
    more = f" (and {len(low) - 1} more)" if len(low) > 1 else ""
    name, other = max(task.estimates.items(), key=lambda pair: pair[1].cosine)
    advice = "compare() finds a truer method"
    if other.cosine > cosine and name in _ESTIMATED:
        advice = f"{_ESTIMATED[name]} would reach about {other.cosine:.2f} at {other.bits:.2f} bits a parameter"
    return (f"task {task.name!r}{more}: at cosine {cosine:.2f} predictions probably change; {advice}",)


def advise_among(
    job: Job, compared: Sequence[tuple[Method, Fidelity | None]], signs: Callable[[], Fidelity | None]
) -> tuple[str, ...]:
    """What to say of several methods beside each other; a line at most.

    Args:
        job: the inputs.
        compared: methods, and what they come to.
        signs: tells what signs alone come to; asked where that matters.
    """
    rows = [(method, found) for method, found in compared if found is not None and _wears_out(method, len(job.experts))]
    alone = signs() if rows else None
    if alone is None:
        return ()
    worn = [method for method, found in rows if found.is_below(alone, _NOTABLE)]
    if not worn:
        return ()
    grouped = [(method, in_groups(job, method, method.merged_dtype, alone)) for method in worn]
    ways = [f"{described(method)} in {groups}" for method, groups in _front(grouped)]
    line = f"over {len(job.experts)} tasks, these are less true than signs alone (cosine {alone} bits a parameter)"
    instead = f"; truer would be {', '.join(ways)}: {_HOW}" if ways else ""
    return (f"{line}: {', '.join(map(described, worn))}{instead}",)


def _front(grouped: Iterable[tuple[Method, Groups | None]]) -> list[tuple[Method, Groups]]:
    """Methods in groups that no other beats."""
    found = [(method, groups) for method, groups in grouped if groups is not None]
    return [
        (method, groups)
        for method, groups in found
        if not any(other is not groups and other.fidelity.beats(groups.fidelity) for _, other in found)
    ]


def _instead(groups: Groups | None, signed: Fidelity | None, signs: Fidelity) -> str:
    """What to take instead: what needs no groups, groups, or either where neither is both smaller and truer."""
    if signed is not None and signed.is_below(signs):
        signed = None
    if groups is not None and signed is not None:
        if signed.beats(groups.fidelity):
            groups = None
        elif groups.fidelity.beats(signed):
            signed = None
    ways = [] if signed is None else [f"SignedMask(), about {signed}"]
    ways += [] if groups is None else [f"{groups}: {_HOW}"]
    return f"take {', or '.join(ways) or 'Sign()'}"
