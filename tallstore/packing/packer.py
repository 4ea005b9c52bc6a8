"""`pack`: a base and its fine-tunes in, one bundle out."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tallstore import files
from tallstore.checkpoints import Checkpoint, CheckpointSource, HubRef, open_checkpoint
from tallstore.errors import (
    InputError,
    OptionError,
    OutputExistsError,
    OutputInsideInputError,
    TooFewExpertsError,
)
from tallstore.fit import Fit, Method, SignedMask, TallMask, TallMaskFit, prepare
from tallstore.format import layout
from tallstore.format import manifest as tables
from tallstore.format.dtypes import CODED, itemsize
from tallstore.format.manifest import SharedDtype
from tallstore.loading.bundle import open_bundle
from tallstore.packing import assemble
from tallstore.packing.group import GroupPacker
from tallstore.packing.meter import Meter, Progress
from tallstore.packing.outcome import PackReport, report, with_scores
from tallstore.packing.plan import Expert, Part, hints, is_private, is_text, name_experts, parts_by_base_name
from tallstore.packing.stack import trimmable_chunks
from tallstore.packing.workers import workers

Evaluate = Callable[[str, dict[str, Tensor]], float]

_MERGED_DTYPES: Mapping[str, SharedDtype] = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "I8",
    "log4": "LOG4",
}


def pack(
    base: CheckpointSource,
    experts: Mapping[str, CheckpointSource],
    out: str | os.PathLike[str],
    *,
    method: Method | None = None,
    merged_dtype: str | None = None,
    private: Sequence[str] = (),
    key_mapping: Mapping[str, str] | None = None,
    evaluate: Evaluate | None = None,
    embed_base: bool = False,
    base_ref: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack fine-tunes of one base into a bundle at *out*.

    Tensors that equal the base's cost nothing; those that cannot be coded (integers, small ones, ones that the base
    does not have) are stored whole, bit for bit, and the report lists them. The bundle appears in one step, complete;
    on any error, and on Ctrl-C, *out* is as it was. Inputs are never modified.

    Args:
        base: a .safetensors file, a Hugging Face directory, a .bin or .pt of plain weights, a state dict, or a Hub id
            ``"org/name[@revision]"``.
        experts: the same kinds of thing by task name (any text of 1 to 256 characters).
        out: the bundle's directory.
        method: `SignedMask()` by default, or a `TallMask`.
        merged_dtype: of the shared vector: "float32", "bfloat16", "float16", "int8" or "log4" (magnitudes only); None
            takes the method's own.
        private: glob patterns of tensor names to store whole.
        key_mapping: regular expression -> replacement, from the experts' tensor names to the base's, applied in order.
        evaluate: called with a task and its reconstructed state dict, larger is better. It chooses mask_lambda where
            the method gives several, and its score is recorded.
        embed_base: put the base into the bundle.
        base_ref: where readers get the base: ``"org/name@<40-digit commit sha>"``. Taken from *base* if that is a Hub
            id.
        overwrite: replace a bundle that is at *out*.
        dry_run: do everything but put the bundle in place.
        progress: called with bytes done and bytes in all.

    Returns:
        what was written, and how true it is.

    Cost:
        Each expert is read at most twice to fit it, and once more to measure it; TIES reads each twice more. Memory
        stays under 1 GiB whatever the sizes. On disk, the bundle and its staging copy.

    Raises:
        InputError: an input cannot be read or packed; names task and tensor.
        OptionError: an argument is outside its range.
        OutputError: *out* is there already, lies inside an input, cannot be written, or another process is writing it.
    """
    method = SignedMask() if method is None else method
    options = _Options(
        method=method,
        dtype=_shared_dtype(method, merged_dtype),
        private=(private,) if isinstance(private, str) else tuple(private),
        base_ref=_reference(base_ref),
    )
    target = Path(out)
    _check_arguments(experts, method, evaluate)
    with contextlib.ExitStack() as inputs:
        opened_base = inputs.enter_context(open_checkpoint(base))
        checkpoints = {task: inputs.enter_context(_open_expert(task, source)) for task, source in experts.items()}
        _check_output(target, [opened_base, *checkpoints.values()], overwrite=overwrite)
        named = name_experts(opened_base, checkpoints, key_mapping or {})
        pool = inputs.enter_context(workers())
        meter = Meter(progress, _phases(method, sum(expert.nbytes for expert in named)))
        job = _Job(opened_base, base, named, options, meter=meter, pool=pool)
        # The place is taken first: who finds it busy should not wait for a fit.
        with _destination(target, dry_run=dry_run) as root:
            fit = job.prepare()
            chosen: dict[str, float] = {}
            scores: dict[str, float] = {}
            if isinstance(fit, TallMaskFit) and evaluate is not None and len(fit.method.lambdas) > 1:
                chosen, scores = _choose_lambdas(job, fit, evaluate)
                fit = fit.with_lambdas(chosen)
            place = root if dry_run else Path(os.path.realpath(target))
            with files.writing(place):
                report = job.write(root, fit, scores, chosen, embed=embed_base)
            if evaluate is not None and not scores:
                scores = job.evaluate(root, evaluate)
                with files.writing(place):
                    report = job.record_scores(root, report, scores)
        advice = (*hints(opened_base, named, options.private), *report.advice)
    return replace(report, path=target, dry_run=dry_run, advice=advice)


@contextlib.contextmanager
def _destination(target: Path, *, dry_run: bool) -> Iterator[Path]:
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch:
            yield Path(scratch)
    else:
        with files.staged_directory(target) as staged:
            yield staged


def _choose_lambdas(job: _Job, fit: TallMaskFit, evaluate: Evaluate) -> tuple[dict[str, float], dict[str, float]]:
    """mask_lambda by task, the best by its score and the smaller on a tie, on weights as a reader gets them."""
    chosen: dict[str, float] = {}
    best: dict[str, float] = {}
    for value in fit.method.lambdas:  # ascending
        with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch:
            with files.writing(Path(scratch)):
                job.write(Path(scratch), fit.with_lambdas(dict.fromkeys(fit.lambdas, value)), {}, {}, embed=False)
            for task, score in job.evaluate(Path(scratch), evaluate).items():
                if task not in best or score > best[task]:
                    best[task], chosen[task] = score, value
    return chosen, best


@dataclass(frozen=True)
class _Options:
    method: Method
    dtype: SharedDtype
    private: tuple[str, ...]
    base_ref: HubRef | None


class _Job:
    """The inputs, opened, and what to make of them; can be written more than once."""

    def __init__(
        self,
        base: Checkpoint,
        base_source: CheckpointSource,
        experts: tuple[Expert, ...],
        options: _Options,
        *,
        meter: Meter,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._base, self._base_source, self._experts, self._options = base, base_source, experts, options
        self._meter, self._pool = meter, pool
        self._parts = parts_by_base_name(base, experts, options.private)

    def prepare(self) -> Fit:
        """The method at work on these experts."""
        streams = {
            expert.task: functools.partial(self._task_vector_chunks, position)
            for position, expert in enumerate(self._experts)
        }
        fit = prepare(self._options.method, streams, run=self._pool.map)
        if _trims(self._options.method):
            self._meter.end_phase()
        return fit

    def _task_vector_chunks(self, position: int) -> Iterator[Tensor]:
        """One expert's whole task vector: every floating-point tensor that the base has too, but the private ones."""
        task = self._experts[position].task
        for base_name, parts in self._parts.items():
            for part in parts:
                if part.expert.task == task and _counts_for_the_trim(part, self._options.private):
                    for chunk in trimmable_chunks(self._base, base_name, part):
                        yield chunk
                        self._meter.advance(chunk.numel() * itemsize(part.spec.dtype))

    @functools.cached_property
    def _base_table(self) -> tables.BaseTable:
        return assemble.base_table(self._base)

    def write(
        self, root: Path, fit: Fit, scores: Mapping[str, float], lambdas: Mapping[str, float], *, embed: bool
    ) -> PackReport:
        """Write the whole bundle into the empty directory *root*."""
        options = self._options
        group = GroupPacker(
            self._base, self._experts, root, method=options.method, fit=fit, dtype=options.dtype, pool=self._pool
        )
        written = assemble.write_base(self._base, self._base_table, root, embed=embed)
        self._pack_tensors(group)
        method = assemble.recorded_method(options.method)
        written |= assemble.write_group(group, method, root)
        entries, packed = [], []
        for task in group.tasks.values():
            table, task_files = assemble.write_task(
                task, group.id, root, score=scores.get(task.expert.task), mask_lambda=lambdas.get(task.expert.task)
            )
            written |= task_files
            numel = assemble.parameters(task.expert.checkpoint)
            entries.append(assemble.task_entry(table, numel))
            packed.append((task, table))
        pin = assemble.pin(self._base, options.base_ref, embed=embed)
        groups = (tables.GroupEntry(id=group.id, method=method),)
        manifest = assemble.write_manifest(root, pin, groups, tuple(entries), written)
        return report(self._base, root, manifest, packed, method=options.method, dtype=options.dtype, lambdas=lambdas)

    def _pack_tensors(self, group: GroupPacker) -> None:
        for base_name, parts in self._parts.items():
            group.pack_tensor(base_name, parts)
            self._meter.advance(sum(part.spec.nbytes for part in parts))
        for task in group.tasks.values():
            for name, counterpart in task.expert.base_names.items():
                if counterpart is None:
                    private = is_private(name, self._options.private)
                    task.store_private(name, "asked for by private=" if private else "the base does not have it")
                    self._meter.advance(task.expert.checkpoint.spec(name).nbytes)
        self._meter.end_phase()

    def evaluate(self, root: Path, evaluate: Evaluate) -> dict[str, float]:
        """The user's score of each task, on weights read back from the bundle at *root*."""
        with open_bundle(root, base=self._base_source) as bundle:
            return {task: _score(task, evaluate(task, bundle.state_dict(task))) for task in bundle.tasks}

    def record_scores(self, root: Path, report: PackReport, scores: Mapping[str, float]) -> PackReport:
        """Write the scores into the tables of the bundle at *root*, and into its report."""
        return with_scores(report, root, assemble.record_scores(root, scores), scores)


def _score(task: str, score: float) -> float:
    if not math.isfinite(score):
        raise OptionError(
            f"evaluate: gave {score!r} for task {task!r}; give a finite number, larger where it is better"
        )
    return float(score)


def _counts_for_the_trim(part: Part, private: Sequence[str]) -> bool:
    coded = part.spec.dtype in CODED and part.base_spec.dtype in CODED
    return coded and part.numel > 0 and not is_private(part.name, private)


def _open_expert(task: str, source: CheckpointSource) -> Checkpoint:
    try:
        return open_checkpoint(source)
    except InputError as error:
        raise type(error)(f"expert {task!r} ({error.where})", error.problem) from None


def _shared_dtype(method: Method, merged_dtype: str | None) -> SharedDtype:
    if merged_dtype is None:
        return method.merged_dtype
    dtype = _MERGED_DTYPES.get(str(merged_dtype).removeprefix("torch."))
    if dtype is None or dtype not in method.allowed_dtypes:
        allowed = ", ".join(repr(name) for name, known in _MERGED_DTYPES.items() if known in method.allowed_dtypes)
        raise OptionError(f"merged_dtype: {merged_dtype!r} does not go with {method.name}; give one of {allowed}")
    return dtype


def _reference(base_ref: str | None) -> HubRef | None:
    if base_ref is None:
        return None
    found = re.fullmatch(r"([A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)?)@([0-9a-f]{40})", base_ref)
    if found is None:
        raise OptionError(f"base_ref: {base_ref!r} is no pin; give 'org/name@' and the 40 digits of a commit")
    return HubRef(found[1], found[2])


def _check_arguments(experts: Mapping[str, CheckpointSource], method: Method, evaluate: Evaluate | None) -> None:
    if len(experts) < method.minimum_experts:
        raise TooFewExpertsError(
            "experts",
            f"{method.name} merges experts and was given {len(experts)}; give at least {method.minimum_experts}",
        )
    for task in experts:
        if not (1 <= len(task) <= 256 and is_text(task)):
            raise OptionError(f"experts: {task!r} is no task name; give 1 to 256 characters without control characters")
    if isinstance(method, TallMask) and len(method.lambdas) > 1 and evaluate is None:
        raise OptionError(
            f"TallMask: mask_lambda gives {len(method.lambdas)} candidates, and nothing chooses between them;"
            " give one number, or evaluate="
        )


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


def _trims(method: Method) -> bool:
    return isinstance(method, TallMask) and method.merge == "ties"


def _phases(method: Method, nbytes: int) -> list[int]:
    """Bytes that each phase of a pack reads of experts of *nbytes*: twice for the trim, each trial, the pack itself."""
    trials = len(method.lambdas) if isinstance(method, TallMask) and len(method.lambdas) > 1 else 0
    return [*([2 * nbytes] if _trims(method) else []), *[nbytes] * (trials + 1)]
