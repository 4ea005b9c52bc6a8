"""`pack`: a base and its fine-tunes in, one bundle out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch

from tallstore import files
from tallstore.checkpoints import Checkpoint, CheckpointSource, open_checkpoint
from tallstore.errors import OutputExistsError, OutputInsideInputError
from tallstore.fit import Method, SignedMask
from tallstore.format import layout
from tallstore.loading import parallel
from tallstore.meter import Progress
from tallstore.packing.arguments import open_expert, reference
from tallstore.packing.calibrating import Calibrate
from tallstore.packing.job import Options
from tallstore.packing.outcome import PackReport
from tallstore.packing.recipe import Evaluate, Recipe, Work, patterns


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
            It says what belongs together: in the bundle, and when loaded, an expert's tensors keep their own names.
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
    recipe = Recipe(
        method=SignedMask() if method is None else method,
        merged_dtype=merged_dtype,
        key_mapping=key_mapping or {},
        evaluate=evaluate,
        calibrate=calibrate,
        executor=executor,
        progress=progress,
        options=Options(private=patterns(private), base_ref=reference(base_ref), compress=compress),
    )
    recipe.check(experts)
    target = Path(out)
    with contextlib.ExitStack() as inputs:
        # A caller's inference mode is not its threads', and tensors that it makes may not be written to outside of it.
        inputs.enter_context(torch.inference_mode(mode=False))
        opened_base = inputs.enter_context(open_checkpoint(base))
        checkpoints = {task: inputs.enter_context(open_expert(task, source)) for task, source in experts.items()}
        with files.writing(target):
            _check_output(target, [opened_base, *checkpoints.values()], overwrite=overwrite)
        work = Work(opened_base, checkpoints, recipe, inputs)
        # The place is taken first: who finds it busy should not wait for a fit. It is given back last: what threads are
        # at when somebody interrupts must have ended before what they wrote is removed.
        with _destination(target, dry_run=dry_run) as root, parallel.threads() as pool:
            place = root if dry_run else Path(os.path.realpath(target))
            report = work.write(root, place, pool, embed=embed_base)
    return replace(report, path=target, dry_run=dry_run)


@contextlib.contextmanager
def _destination(target: Path, *, dry_run: bool) -> Iterator[Path]:
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch:
            yield Path(scratch)
    else:
        with files.staged_directory(target) as staged:
            yield staged


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
