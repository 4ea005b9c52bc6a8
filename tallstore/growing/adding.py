"""`add`: fine-tunes into a bundle that is there, as a group of their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path

import torch

from tallstore import files
from tallstore.checkpoints import Checkpoint, CheckpointSource
from tallstore.errors import OutputError, OutputExistsError
from tallstore.fit import Method, SignedMask, Uniform
from tallstore.format import layout
from tallstore.format.manifest import MAX_GROUP_NUMBER, BaseTable
from tallstore.format.parsing import parse_manifest
from tallstore.growing.change import Change, changing, trying
from tallstore.growing.described_base import describe
from tallstore.growing.manifests import after_change, lost_companions
from tallstore.loading import parallel
from tallstore.loading.pinned_base import open_base
from tallstore.meter import Progress
from tallstore.packing.arguments import open_expert
from tallstore.packing.calibrating import Calibrate
from tallstore.packing.job import Options
from tallstore.packing.outcome import Action, PackReport
from tallstore.packing.recipe import Evaluate, Recipe, Work, patterns

_FEW = 2  # tasks that would each pay more for a shared vector than it saves them


def add(
    bundle: str | os.PathLike[str],
    experts: Mapping[str, CheckpointSource | Checkpoint],
    *,
    base: CheckpointSource | None = None,
    method: Method | None = None,
    merged_dtype: str | None = None,
    private: Sequence[str] = (),
    key_mapping: Mapping[str, str] | None = None,
    evaluate: Evaluate | None = None,
    calibrate: Calibrate | None = None,
    compress: bool = True,
    replace: bool = False,
    dry_run: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Add fine-tunes to a bundle, as one group: they share vectors with each other, and none with the tasks before.

    No file of a task or group that is there is touched. The bundle changes in one step, when the new group is complete:
    on any error, on Ctrl-C and after a crash it is as it was, or changed, and a reader that has it open reads on. The
    bundle may be a partial one.

    Args:
        bundle: its directory.
        experts: the fine-tunes by task name, as `pack` takes them.
        base: the base that the bundle was packed from, if that is neither embedded nor named in the bundle, or a copy
            of it is nearer. It is compared with the bundle's hashes; what tensors it has beyond, count as not there.
        method: as for `pack`. By default `SignedMask()` for three experts and more, and ``Uniform(levels=3,
            scale="tensor")`` for one or two: that shares nothing, where a shared vector of 4 bits a parameter for a
            single expert would cost more than its mask.
        merged_dtype: of the vector that the new tasks share, as for `pack`.
        private: glob patterns of tensor names to store whole.
        key_mapping: regular expression -> replacement, from the experts' tensor names to the base's, applied in order.
        evaluate: as for `pack`; called with the new tasks alone.
        calibrate: a `Calibration`, as for `pack`.
        compress: whether payloads are compressed where that saves 3 %.
        replace: put tasks in the place of those in the bundle that have the same name, which are deleted; otherwise
            such a name is an error.
        dry_run: do everything but change the bundle.
        executor: somebody's `concurrent.futures.Executor` to pack on, as for `pack`.
        progress: called with bytes done and bytes in all.

    Returns:
        what was added, and how true it is.

    Cost:
        as a `pack` of these experts, and the base is read once more.

    Raises:
        BaseMismatchError: the base is another than the bundle's; names the first tensor that differs.
        BaseMissingError: the bundle neither embeds its base nor names it, and none was given.
        OutputExistsError: a task of that name is there already.
        BundleNotFoundError: there is no bundle at that path.
        FormatError: the bundle breaks a rule.
        InputError, OptionError, WorkerError: as `pack`.
        OutputError: the bundle cannot be changed: it is on the Hub or in its cache, another process is writing to it,
            it has had all the groups that it can have, or the system refuses.
    """
    recipe = Recipe(
        method=default_method(len(experts)) if method is None else method,
        merged_dtype=merged_dtype,
        key_mapping=key_mapping or {},
        evaluate=evaluate,
        calibrate=calibrate,
        executor=executor,
        progress=progress,
        options=Options(private=patterns(private), compress=compress),
    )
    recipe.check(experts)
    with trying(bundle) if dry_run else changing(bundle) as change, contextlib.ExitStack() as inputs:
        there = {task.name for task in change.manifest.tasks} & experts.keys()
        if there and not replace:
            name = next(name for name in experts if name in there)
            raise OutputExistsError(
                f"{bundle}: there is a task {name!r} already; give another name, or replace=True to put it in its place"
            )

        def opened(_: Checkpoint) -> Experts:
            return Experts({task: inputs.enter_context(open_expert(task, source)) for task, source in experts.items()})

        report = pack_group(change, base, opened, recipe, inputs, gone=there, action="add")
    return changed(report, path=Path(bundle))


def default_method(count: int) -> Method:
    """What a new group of so many tasks is packed with unless another method is asked for."""
    return Uniform(levels=3, scale="tensor") if count <= _FEW else SignedMask()


@dataclass(frozen=True)
class Experts:
    """What a group is packed from.

    Attributes:
        checkpoints: by task.
        base_names: by task, what the base calls its tensors, where that is known; the others go by their names.
    """

    checkpoints: Mapping[str, Checkpoint]
    base_names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def pack_group(
    change: Change,
    base: CheckpointSource | None,
    open_experts: Callable[[Checkpoint], Experts],
    recipe: Recipe,
    inputs: contextlib.ExitStack,
    *,
    gone: Collection[str],
    action: Action,
) -> PackReport:
    """Pack experts as a new group of a bundle, and let the tasks *gone* go in the same change.

    Args:
        change: of the bundle.
        base: as for `add`.
        open_experts: called with the base, which nobody has compared yet: it is, before a weight is read.
        recipe: how to pack.
        inputs: closes what was opened.
        gone: names of the tasks that go.
        action: for the report, and for messages.

    Raises:
        TallstoreError: as `add`.
    """
    before = change.manifest
    if before.next_group > MAX_GROUP_NUMBER:
        raise OutputError(
            f"{change.root}: has had {MAX_GROUP_NUMBER:,} groups, and cannot have another; pack its tasks anew"
        )
    lost = lost_companions(change.bundle, gone)
    # A caller's inference mode is not its threads', and tensors that it makes may not be written to outside of it.
    inputs.enter_context(torch.inference_mode(mode=False))
    opened = inputs.enter_context(open_base(change.bundle, base, None, f"{action}(bundle, …, base=…)"))
    experts = open_experts(opened)
    tensors = change.bundle.base
    described = describe(opened, tensors)
    options = changed(recipe.options, group=before.next_group, taken=frozenset(task.slug for task in before.tasks))
    work = Work(described, experts.checkpoints, changed(recipe, options=options), inputs, experts.base_names)
    made = change.room / "made"
    place = made if change.is_trial else change.root
    with files.writing(place):
        made.mkdir()
    table = BaseTable(format="tallstore.base", tensors=tuple(tensors.values()))
    with parallel.threads() as pool:
        report = work.write(made, place, pool, table=table)
    with files.writing(place):
        packed = parse_manifest((made / layout.MANIFEST).read_bytes(), layout.MANIFEST)
    after = after_change(before, gone, packed, lost)
    nbytes = change.commit(after, made)
    listed = {file.path for file in before.files}
    return changed(
        report,
        path=change.root,
        dry_run=change.is_trial,
        action=action,
        bundle_nbytes=nbytes + sum(file.size for file in after.files),
        written_nbytes=sum(file.size for file in after.files if file.path not in listed),
    )
