"""`compare`: what each method would make of the same experts, predicted on a sample of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tallstore.checkpoints import Checkpoint, CheckpointSource, open_checkpoint
from tallstore.errors import OptionError
from tallstore.fit import Auto, Emr, LeastSquares, Localize, Method, Sign, SignedMask, TallMask, Uniform, described
from tallstore.loading import parallel
from tallstore.meter import Meter, Progress
from tallstore.notebook import html_table, number
from tallstore.packing.arguments import check_arguments, open_expert, open_merged
from tallstore.packing.job import Fitting, Job, Options
from tallstore.packing.packer import pack
from tallstore.packing.plan import name_experts
from tallstore.packing.recipe import Evaluate, patterns
from tallstore.packing.trial import Trials
from tallstore.sizes import readable

#: Compared unless others are asked for.
METHODS: tuple[Method, ...] = (
    *(SignedMask(threshold) for threshold in (0.8, 1.2, 1.6, 2.0)),
    *(SignedMask(threshold, scale="row") for threshold in (1.2, 1.6)),
    TallMask(),
    TallMask(merge="ties"),
    TallMask.published(),
    Emr(),
    LeastSquares(1),
    LeastSquares(2),
    Sign(),
    Uniform(3, scale="tensor"),
    Uniform(3, threshold=1.0),
    Uniform(4),
    Uniform(8),
    Localize(0.05),
)


@dataclass(frozen=True)
class Compared:
    """One method.

    Attributes:
        method: it.
        bundle_nbytes: of all files, the base by reference.
        bits: a coded parameter of an expert costs, its share of the shared vectors included; None where none is coded.
        cosine, gain: by task, over the coded tensors; None where none is coded.
        score: the user's own, by task, on full weights; empty without `evaluate`.
        is_best: no other method here is both smaller and truer.
        measured: packed whole, not predicted.
    """

    method: Method
    bundle_nbytes: int
    bits: float | None
    cosine: Mapping[str, float | None]
    gain: Mapping[str, float | None]
    score: Mapping[str, float] = field(default_factory=dict)
    is_best: bool = False
    measured: bool = False

    @property
    def mean_cosine(self) -> float:
        """Over the tasks; 1 for those of which nothing is coded."""
        return sum(1.0 if value is None else value for value in self.cosine.values()) / max(1, len(self.cosine))

    @property
    def mean_score(self) -> float | None:
        """Over the tasks; None without scores."""
        return sum(self.score.values()) / len(self.score) if self.score else None


@dataclass(frozen=True)
class Comparison:
    """Methods side by side.

    Attributes:
        rows: in the order that was asked for.
        checkpoints_nbytes: the experts as plain checkpoints.
    """

    rows: tuple[Compared, ...]
    checkpoints_nbytes: int

    @property
    def best(self) -> tuple[Compared, ...]:
        """The Pareto front, from the smallest on."""
        return tuple(sorted((row for row in self.rows if row.is_best), key=lambda row: row.bundle_nbytes))

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON types."""
        rows = [
            {
                "method": described(row.method),
                "name": row.method.name,
                "parameters": row.method.parameters,
                "bundle_nbytes": row.bundle_nbytes,
                "bits": row.bits,
                "cosine": dict(row.cosine),
                "gain": dict(row.gain),
                "score": dict(row.score),
                "is_best": row.is_best,
                "measured": row.measured,
            }
            for row in self.rows
        ]
        return {"checkpoints_nbytes": self.checkpoints_nbytes, "rows": rows}

    def __str__(self) -> str:
        """A line a method; a star on those that no other beats."""
        lines = [f"{readable(self.checkpoints_nbytes)} of checkpoints; * no other is both smaller and truer"]
        for row in self.rows:
            star = "*" if row.is_best else " "
            bits = "" if row.bits is None else f"{row.bits:.2f} bits, "
            score = "" if row.mean_score is None else f", score {row.mean_score:.4g}"
            size = readable(row.bundle_nbytes)
            lines.append(f"{star} {described(row.method)}: {size}, {bits}cosine {row.mean_cosine:.4f}{score}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks: those that no other beats bear a star."""
        has_scores = any(row.score for row in self.rows)
        headings = ("method", "size", "bits", "mean cosine", *(["mean score"] if has_scores else []))
        rows = [
            (
                f"{'* ' if row.is_best else ''}{described(row.method)}",
                readable(row.bundle_nbytes),
                number(row.bits, 2),
                number(row.mean_cosine, 4),
                *([number(row.mean_score, 4)] if has_scores else []),
            )
            for row in self.rows
        ]
        fact = f"{readable(self.checkpoints_nbytes)} of checkpoints"
        return html_table([fact], headings, rows, ["* no other is both smaller and truer"])


def compare(
    base: CheckpointSource,
    experts: Mapping[str, CheckpointSource | Checkpoint],
    *,
    methods: Sequence[Method] | None = None,
    private: Sequence[str] = (),
    key_mapping: Mapping[str, str] | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """What each method would make of these experts: the size of the bundle, and how true every task is.

    The packer itself packs a deterministic sample: tensors of up to 2^19 elements whole, of larger ones rows that are
    spread over them, 2^18 elements or one part in 16. What is chosen over all parameters (TIES, Localize, EMR's
    rescaler) is chosen over all of them. Sizes are meant to be within 3 % of what `pack` then writes, with its default
    dtypes and the base by reference.

    Args:
        base: as for `pack`.
        experts: as for `pack`.
        private: as for `pack`.
        key_mapping: as for `pack`.
        methods: to compare; None takes every kind of fit, at a few settings.
        evaluate: called with a task and its reconstructed state dict: every method is then packed whole, in scratch
            space, and measured instead of predicted.
        progress: called with methods done and methods in all.

    Cost:
        A pack of the sample for each method; reads of the whole inputs for those that need all of them.

    Raises:
        InputError: an input cannot be read or packed.
        OptionError: an argument is outside its range.
    """
    chosen = METHODS if methods is None else tuple(methods)
    if not chosen:
        raise OptionError("methods: gives none to compare; leave it out for all")
    for method in chosen:
        if isinstance(method, Localize) and method.masks is not None:
            raise OptionError("methods: Localize with masks of one's own is not predicted; pack it with dry_run=True")
        check_arguments(experts, method, evaluates=evaluate is not None)
    tell = progress or (lambda _done, _total: None)
    rows = []
    options = Options(private=patterns(private))
    with contextlib.ExitStack() as inputs:
        inputs.enter_context(torch.inference_mode(mode=False))  # see `pack`
        opened_base = inputs.enter_context(open_checkpoint(base))
        checkpoints = {task: inputs.enter_context(open_expert(task, source)) for task, source in experts.items()}
        named = name_experts(opened_base, checkpoints, key_mapping or {})
        nbytes = sum(expert.nbytes for expert in named)
        pool = inputs.enter_context(parallel.threads())
        job = Job(opened_base, named, options, meter=Meter(None, [0]), pool=pool)
        trials = Trials(job)
        for number, method in enumerate(chosen):
            tell(number, len(chosen))
            if evaluate is not None or isinstance(method, Auto):
                given = {"private": private, "key_mapping": key_mapping, "evaluate": evaluate}
                rows.append(_measured(base, experts, method, **given))
            else:
                rows.append(_predicted(job, trials, method, open_merged(method, opened_base, inputs)))
        tell(len(chosen), len(chosen))
    return Comparison(_with_front(rows), nbytes)


def _predicted(job: Job, trials: Trials, method: Method, given: Checkpoint | None) -> Compared:
    fitting = Fitting.uniform(method, job.prepare(method), method.merged_dtype)
    trial = trials.run(fitting, given)
    sums = {expert.task: trial.sums(expert.task) for expert in job.experts}
    return Compared(
        method=method,
        bundle_nbytes=round(trial.bundle_nbytes),
        bits=trial.bits,
        cosine={task: found.cosine for task, found in sums.items()},
        gain={task: found.gain for task, found in sums.items()},
    )


def _measured(
    base: CheckpointSource,
    experts: Mapping[str, CheckpointSource | Checkpoint],
    method: Method,
    **arguments: Any,  # noqa: ANN401 - those of `pack` that were given
) -> Compared:
    """A real pack of the whole inputs, in scratch space."""
    with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch:
        report = pack(base, experts, Path(scratch) / "bundle", method=method, **arguments)
    bits = [task.bits for task in report.tasks if task.bits is not None]
    return Compared(
        method=method,
        bundle_nbytes=report.bundle_nbytes,
        bits=sum(bits) / len(bits) if bits else None,
        cosine={task.name: task.cosine for task in report.tasks},
        gain={task.name: task.gain for task in report.tasks},
        score={task.name: task.score for task in report.tasks if task.score is not None},
        measured=True,
    )


def _with_front(rows: Sequence[Compared]) -> tuple[Compared, ...]:
    """Mark the Pareto front of size and cosine; of score, where there is one."""

    def truth(row: Compared) -> float:
        return row.mean_cosine if row.mean_score is None else row.mean_score

    def beats(other: Compared, row: Compared) -> bool:
        smaller, truer = other.bundle_nbytes <= row.bundle_nbytes, truth(other) >= truth(row)
        better = other.bundle_nbytes < row.bundle_nbytes or truth(other) > truth(row)
        return smaller and truer and better

    return tuple(replace(row, is_best=not any(beats(other, row) for other in rows)) for row in rows)
