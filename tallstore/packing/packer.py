"""`pack`: a base and its fine-tunes in, one bundle out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tallstore import files
from tallstore.checkpoints import Checkpoint, CheckpointSource, open_checkpoint
from tallstore.errors import OptionError, OutputExistsError, OutputInsideInputError
from tallstore.fit import Auto, Method, SignedMask, TallMask, TallMaskFit
from tallstore.fit.gain import is_number
from tallstore.format import layout
from tallstore.format.manifest import SharedDtype
from tallstore.loading import parallel
from tallstore.loading.bundle import open_bundle
from tallstore.meter import Meter, Progress
from tallstore.packing import assemble, automatic, companions
from tallstore.packing.advice import advise
from tallstore.packing.arguments import check_arguments, open_expert, open_merged, reference, shared_dtype
from tallstore.packing.calibrating import Calibrate, Calibrator, check_calibration
from tallstore.packing.job import Fitting, Job, Options, passes_before
from tallstore.packing.outcome import PackReport, with_scores
from tallstore.packing.plan import hints, name_experts

Evaluate = Callable[[str, dict[str, Tensor]], float]


def pack(
    base: CheckpointSource,
    experts: Mapping[str, CheckpointSource | Checkpoint],
    out: str | os.PathLike[str],
    *,
    method: Method | None = None,
    merged_dtype: str | None = None,
    private: Sequence[str] = (),
    key_mapping: Mapping[str, str] | None = None,
    evaluate: Evaluate | None = None,
    calibrate: Calibrate | None = None,
    embed_base: bool = False,
    base_ref: str | None = None,
    compress: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack fine-tunes of one base into a bundle at *out*.

    Tensors that equal the base's cost nothing; those that cannot be coded (integers, small ones, ones that the base
    does not have) are stored whole, bit for bit, and the report lists them. The bundle appears in one step, complete;
    on any error, and on Ctrl-C, *out* is as it was. Inputs are never modified.

    Args:
        base: a .safetensors file, a Hugging Face directory, a .bin or .pt of plain weights, a state dict, or a Hub id
            ``"org/name[@revision]"``.
        experts: the same kinds of thing by task name (any text of 1 to 256 characters); or a `Checkpoint` of one's own,
            for weights that come from elsewhere, which is closed afterwards.
        out: the bundle's directory.
        method: `SignedMask()` by default, or a `TallMask`, `LeastSquares`, `Emr`, `Sign`, `Uniform` or `Localize`;
            or `Auto(max_bits=…)`, which chooses among them tensor by tensor.
        merged_dtype: of the shared vector: "float32", "bfloat16", "float16", "int8" or "log4" (magnitudes only); None
            takes the method's own.
        private: glob patterns of tensor names to store whole.
        key_mapping: regular expression -> replacement, from the experts' tensor names to the base's, applied in order.
        evaluate: called with a task and its reconstructed state dict, larger is better. It chooses mask_lambda where
            the method gives several, and its score is recorded.
        calibrate: a `Calibration`: tunes the gains of every coded tensor on a loss of yours, after the fit. Where it
            does not lower a task's loss, the gains stay as fitted, and the report says so.
        embed_base: put the base into the bundle.
        base_ref: where readers get the base: ``"org/name@<40-digit commit sha>"``. Taken from *base* if that is a Hub
            id.
        compress: whether masks, vectors and tensors that are stored whole are compressed where that saves 3 %. False
            stores them all raw: a larger bundle, with nothing to decompress on a load, and the same weights.
        overwrite: replace a bundle that is at *out*.
        dry_run: do everything but put the bundle in place.
        executor: a `concurrent.futures.Executor` to pack on, of processes, of threads or of other machines; None takes
            threads of this process. The bundle is the same, byte for byte. Workers read safetensors files themselves,
            and write beside *out*: both must be on storage that they see. What is not in such files goes to them with
            the work. What must know all parameters first (TIES, Localize, EMR, trials) stays in this process.
        progress: called with bytes done and bytes in all.

    Returns:
        what was written, and how true it is.

    Cost:
        Each expert is read at most twice to fit it, and once more to measure it; TIES reads each twice more. Memory
        stays under 1 GiB whatever the sizes. On disk, the bundle and its staging copy. With *calibrate*, one more pack
        in scratch space, the steps of every task, and in memory one expert four times over in float32 (the base, what
        the task adds, the weights of a step, and their gradients) and what the loss takes.

    Raises:
        InputError: an input cannot be read or packed; names task and tensor.
        OptionError: an argument is outside its range.
        OutputError: *out* is there already, lies inside an input, cannot be written, or another process is writing it.
        WorkerError: work that was given to *executor* did not come back.
    """
    method = SignedMask() if method is None else method
    dtype = None if isinstance(method, Auto) and merged_dtype is None else shared_dtype(method, merged_dtype)
    options = Options(
        private=(private,) if isinstance(private, str) else tuple(private),
        base_ref=reference(base_ref),
        compress=compress,
    )
    target = Path(out)
    check_arguments(experts, method, evaluates=evaluate is not None)
    check_calibration(calibrate)
    with contextlib.ExitStack() as inputs:
        # A caller's inference mode is not its threads', and tensors that it makes may not be written to outside of it.
        inputs.enter_context(torch.inference_mode(mode=False))
        opened_base = inputs.enter_context(open_checkpoint(base))
        checkpoints = {task: inputs.enter_context(open_expert(task, source)) for task, source in experts.items()}
        _check_output(target, [opened_base, *checkpoints.values()], overwrite=overwrite)
        named = name_experts(opened_base, checkpoints, key_mapping or {})
        missed = companions.look_through({task: checkpoint.directory for task, checkpoint in checkpoints.items()})
        meter = Meter(progress, _phases(method, sum(expert.nbytes for expert in named), calibrate))
        given = open_merged(method, opened_base, inputs)
        scorer = None if evaluate is None else _Scorer(base, evaluate)
        # The place is taken first: who finds it busy should not wait for a fit. It is given back last: what threads are
        # at when somebody interrupts must have ended before what they wrote is removed.
        with _destination(target, dry_run=dry_run) as root, parallel.threads() as pool:
            job = Job(opened_base, named, options, meter=meter, pool=pool)
            calibrator = None if calibrate is None else Calibrator(job, calibrate, meter, given)
            place = root if dry_run else Path(os.path.realpath(target))
            if isinstance(method, Auto):
                report = automatic.write(
                    job, method, root, place, embed=embed_base, calibrated=calibrator, executor=executor
                )
            else:
                fitting = _fitting(job, method, dtype or method.merged_dtype, scorer, given)
                if calibrator is not None:
                    fitting = calibrator(fitting)
                with files.writing(place):
                    report, _ = job.write(root, fitting, embed=embed_base, given=given, executor=executor)
            if scorer is not None and any(task.score is None for task in report.tasks):
                scores = scorer.scores(root)
                with files.writing(place):
                    report = with_scores(report, root, assemble.record_scores(root, scores), scores)
            advised = advise(job, method, dtype or method.merged_dtype, report.tasks)
        uncalibrated = () if calibrator is None else calibrator.advice
        advice = (*hints(opened_base, named, options.private), *missed, *uncalibrated, *advised)
    return replace(report, path=target, dry_run=dry_run, advice=advice)


@contextlib.contextmanager
def _destination(target: Path, *, dry_run: bool) -> Iterator[Path]:
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch:
            yield Path(scratch)
    else:
        with files.staged_directory(target) as staged:
            yield staged


class _Scorer:
    """The user's score of each task, on weights read back from a bundle."""

    def __init__(self, base: CheckpointSource, evaluate: Evaluate) -> None:
        self._base, self._evaluate = base, evaluate

    def scores(self, root: Path) -> dict[str, float]:
        """By task, of the bundle at *root*."""
        with open_bundle(root, base=self._base) as bundle:
            return {task: self._score(task, bundle.state_dict(task)) for task in bundle.tasks}

    def _score(self, task: str, weights: dict[str, Tensor]) -> float:
        score = self._evaluate(task, weights)
        if not is_number(score):
            raise OptionError(
                f"evaluate: gave {score!r} for task {task!r}; give a finite number, larger where it is better"
            )
        return float(score)


def _fitting(job: Job, method: Method, dtype: SharedDtype, scorer: _Scorer | None, given: Checkpoint | None) -> Fitting:
    """The method at work; with several candidates for mask_lambda, each task's best."""
    fit = job.prepare(method)
    if not isinstance(fit, TallMaskFit) or scorer is None or len(fit.method.lambdas) == 1:
        return Fitting.uniform(method, fit, dtype)
    lambdas, scores = _choose_lambdas(job, fit, dtype, scorer, given)
    return Fitting.uniform(method, fit.with_lambdas(lambdas), dtype, scores)


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


def _check_output(target: Path, inputs: Sequence[Checkpoint], *, overwrite: bool) -> None:
    resolved = target.resolve()
    for checkpoint in inputs:
        directory = checkpoint.directory.resolve() if checkpoint.directory else None
        if directory is not None and (resolved == directory or directory in resolved.parents):
            raise OutputInsideInputError(f"{target}: lies inside the input {checkpoint.where}; choose another place")
        for file in checkpoint.files:
            if resolved in file.resolve().parents or resolved == file.resolve():
                raise OutputInsideInputError(f"{target}: holds the input {file}; choose another place")
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(f"{target}: is a file; choose another place")
    if not any(target.iterdir()):
        return
    if not (target / layout.MANIFEST).exists():
        raise OutputExistsError(f"{target}: is a directory that is no bundle; choose another place, or empty it first")
    if not overwrite:
        raise OutputExistsError(f"{target}: is there already; choose another place, or give overwrite=True")


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
