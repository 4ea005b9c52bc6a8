"""How experts are packed, whatever place they go to: the arguments that `pack` shares with what adds to a bundle."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from tallstore import files
from tallstore.checkpoints import Checkpoint, CheckpointSource
from tallstore.errors import OptionError
from tallstore.fit import Auto, Method, TallMask, TallMaskFit
from tallstore.fit.gain import is_number
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import BaseTable, SharedDtype
from tallstore.loading.expert import Expert
from tallstore.loading.pinned_base import PinnedBase
from tallstore.meter import Meter, Progress
from tallstore.packing import assemble, automatic, companions
from tallstore.packing.advice import advise
from tallstore.packing.arguments import check_arguments, open_merged, shared_dtype
from tallstore.packing.calibrating import Calibrate, Calibrator, check_calibration
from tallstore.packing.job import Fitting, Job, Options, passes_before
from tallstore.packing.outcome import PackReport, with_scores
from tallstore.packing.plan import hints, name_experts

Evaluate = Callable[[str, dict[str, Tensor]], float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to pack, as `pack` describes it argument by argument."""

    method: Method
    merged_dtype: str | None = None
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    evaluate: Evaluate | None = None
    calibrate: Calibrate | None = None
    executor: Executor | None = None
    progress: Progress | None = None
    options: Options = field(default_factory=Options)

    def check(self, experts: Mapping[str, CheckpointSource | Checkpoint]) -> None:
        """Refuse what can be refused before anything is opened.

        Raises:
            TooFewExpertsError: for the method.
            OptionError: an argument is outside its range.
        """
        self.dtype()
        check_arguments(experts, self.method, evaluates=self.evaluate is not None)
        check_calibration(self.calibrate)

    def dtype(self) -> SharedDtype | None:
        """Of the shared vectors; None where each tensor's method has its own."""
        is_chosen_by_tensor = isinstance(self.method, Auto) and self.merged_dtype is None
        return None if is_chosen_by_tensor else shared_dtype(self.method, self.merged_dtype)


def patterns(private: str | Sequence[str]) -> tuple[str, ...]:
    """The glob patterns of an argument *private*; one may come by itself."""
    return (private,) if isinstance(private, str) else tuple(private)


class Work:
    """Inputs that are opened, and the recipe that they are packed by."""

    def __init__(
        self,
        base: Checkpoint,
        checkpoints: Mapping[str, Checkpoint],
        recipe: Recipe,
        inputs: contextlib.ExitStack,
        base_names: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        """Find each expert's tensors in the base.

        Args:
            base: the base.
            checkpoints: by task.
            recipe: how to pack.
            inputs: gets what else has to be opened.
            base_names: by task, what the base calls its tensors, where that is known.

        Raises:
            InputError: an input cannot be packed.
            OptionError: key_mapping is none.
        """
        self._base, self._recipe = base, recipe
        self._experts = name_experts(base, checkpoints, recipe.key_mapping, base_names)
        self._missed = companions.look_through({task: each.directory for task, each in checkpoints.items()})
        nbytes = sum(expert.nbytes for expert in self._experts)
        self._meter = Meter(recipe.progress, _phases(recipe.method, nbytes, recipe.calibrate))
        self._given = open_merged(recipe.method, base, inputs)
        self._scorer = None if recipe.evaluate is None else _Scorer(base, recipe.evaluate)

    def write(
        self, root: Path, place: Path, pool: ThreadPoolExecutor, *, embed: bool = False, table: BaseTable | None = None
    ) -> PackReport:
        """Write a bundle of these experts, and of nothing else, into the empty directory *root*.

        Args:
            root: the directory.
            place: where it will be, as messages call it.
            pool: of threads that have ended before what they write is removed.
            embed: put the base into the bundle.
            table: base.json, where there is one that describes this base.

        Raises:
            TallstoreError: as `pack`.
        """
        recipe, scorer = self._recipe, self._scorer
        job = Job(self._base, self._experts, recipe.options, meter=self._meter, pool=pool, table=table)
        calibrator = None
        if recipe.calibrate is not None:
            calibrator = Calibrator(job, recipe.calibrate, self._meter, self._given)
        if isinstance(recipe.method, Auto):
            report = automatic.write(
                job, recipe.method, root, place, embed=embed, calibrated=calibrator, executor=recipe.executor
            )
        else:
            fitting = self._fitting(job, recipe.method)
            if calibrator is not None:
                fitting = calibrator(fitting)
            with files.writing(place):
                report, _ = job.write(root, fitting, embed=embed, given=self._given, executor=recipe.executor)
        if scorer is not None and any(task.score is None for task in report.tasks):
            scores = scorer.scores(root)
            with files.writing(place):
                report = with_scores(report, root, assemble.record_scores(root, scores), scores)
        # Each was read more than once: the bundle is of one version of it.
        for checkpoint in (self._base, *(expert.checkpoint for expert in self._experts), *filter(None, [self._given])):
            checkpoint.check_unchanged()
        advised = advise(job, recipe.method, recipe.dtype() or recipe.method.merged_dtype, report.tasks)
        uncalibrated = () if calibrator is None else calibrator.advice
        slips = hints(self._base, self._experts, recipe.options.private)
        return replace(report, advice=(*slips, *self._missed, *uncalibrated, *advised))

    def _fitting(self, job: Job, method: Method) -> Fitting:
        """The method at work; with several candidates for mask_lambda, each task's best."""
        dtype = self._recipe.dtype() or method.merged_dtype
        fit = job.prepare(method)
        if not isinstance(fit, TallMaskFit) or self._scorer is None or len(fit.method.lambdas) == 1:
            return Fitting.uniform(method, fit, dtype)
        lambdas, scores = _choose_lambdas(job, fit, dtype, self._scorer, self._given)
        return Fitting.uniform(method, fit.with_lambdas(lambdas), dtype, scores)


class _Scorer:
    """The user's score of each task, on weights read back from a bundle."""

    def __init__(self, base: Checkpoint, evaluate: Evaluate) -> None:
        self._base, self._evaluate = base, evaluate

    def scores(self, root: Path) -> dict[str, float]:
        """By task, of the bundle at *root*."""
        with contextlib.closing(BundleFiles(root)) as bundle:
            base = PinnedBase(bundle.base, lambda: self._base, "never")  # whoever opened it has compared it
            return {
                task.name: self._score(task.name, Expert(bundle.task(task.name), bundle, base).state_dict())
                for task in bundle.manifest.tasks
            }

    def _score(self, task: str, weights: dict[str, Tensor]) -> float:
        score = self._evaluate(task, weights)
        if not is_number(score):
            raise OptionError(
                f"evaluate: gave {score!r} for task {task!r}; give a finite number, larger where it is better"
            )
        return float(score)


def _choose_lambdas(
    job: Job, fit: TallMaskFit, dtype: SharedDtype, scorer: _Scorer, given: Checkpoint | None
) -> tuple[dict[str, float], dict[str, float]]:
    """mask_lambda by task, the best by its score and the smaller on a tie, on weights as a reader gets them."""
    chosen: dict[str, float] = {}
    best: dict[str, float] = {}
    for value in fit.method.lambdas:  # ascending
        with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch:
            candidate = fit.with_lambdas(dict.fromkeys(fit.lambdas, value))
            with files.writing(Path(scratch)):
                job.write(Path(scratch), Fitting.uniform(fit.method, candidate, dtype), embed=False, given=given)
            for task, score in scorer.scores(Path(scratch)).items():
                if task not in best or score > best[task]:
                    best[task], chosen[task] = score, value
    return chosen, best


def _phases(method: Method, nbytes: int, calibrate: Calibrate | None) -> list[int]:
    """Bytes that each phase of a pack goes over of experts of *nbytes*: what comes before, trials, steps, the pack."""
    before = passes_before(method)
    trials = len(method.lambdas) if isinstance(method, TallMask) and len(method.lambdas) > 1 else 0
    if calibrate is None:
        tuning = []
    else:
        trials += 2 if isinstance(method, Auto) else 1
        tuning = [calibrate.steps * nbytes]
    return [*([before * nbytes] if before else []), *[nbytes] * trials, *tuning, nbytes]
