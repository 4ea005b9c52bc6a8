"""`repack`: tasks of a bundle once more, together, as one group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from tallstore.checkpoints import Checkpoint, CheckpointSource
from tallstore.errors import OptionError, UnknownTaskError
from tallstore.fit import Method
from tallstore.growing.adding import Experts, default_method, pack_group
from tallstore.growing.change import Change, changing, trying
from tallstore.growing.rebuilt import RebuiltCheckpoint, base_names
from tallstore.loading.pinned_base import PinnedBase
from tallstore.meter import Progress
from tallstore.packing.arguments import open_expert
from tallstore.packing.calibrating import Calibrate
from tallstore.packing.job import Options
from tallstore.packing.outcome import PackReport
from tallstore.packing.recipe import Evaluate, Recipe, patterns

_SHOWN = 5


def repack(
    bundle: str | os.PathLike[str],
    experts: Mapping[str, CheckpointSource | Checkpoint] | None = None,
    *,
    tasks: Sequence[str] | None = None,
    base: CheckpointSource | None = None,
    method: Method | None = None,
    reconstructions: bool = False,
    merged_dtype: str | None = None,
    private: Sequence[str] = (),
    key_mapping: Mapping[str, str] | None = None,
    evaluate: Evaluate | None = None,
    calibrate: Calibrate | None = None,
    compress: bool = True,
    dry_run: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack tasks of a bundle again, as one group: after several `add`, they share vectors with each other.

    The bundle changes in one step, as with `add`. Groups that lose all their tasks go, with their vectors.

    Args:
        bundle: its directory.
        experts: the originals by task name, as `pack` takes them.
        tasks: which tasks become the new group; all of the bundle by default.
        base: as for `add`.
        method: as for `pack`; by default that of `add` for so many tasks.
        reconstructions: pack tasks whose original is not given from what the bundle rebuilds. What was lost then stays
            lost, what is lost now comes on top, and the report measures the latter alone.
        merged_dtype: of the vector that the tasks share, as for `pack`.
        private: glob patterns of tensor names to store whole.
        key_mapping: regular expression -> replacement, from the originals' tensor names to the base's, applied in
            order. What the bundle rebuilds has the names that it had when it was packed.
        evaluate: as for `pack`.
        calibrate: a `Calibration`, as for `pack`.
        compress: whether payloads are compressed where that saves 3 %.
        dry_run: do everything but change the bundle.
        executor: somebody's `concurrent.futures.Executor` to pack on, as for `pack`. What the bundle rebuilds is
            rebuilt here, and sent there.
        progress: called with bytes done and bytes in all.

    Returns:
        what was packed, and how true it is to what it was packed from; its advice names the tasks that were packed from
        reconstructions.

    Cost:
        as a `pack` of these experts, and the base is read once more; beside the bundle, room for the new group.

    Raises:
        OptionError: an original is missing, and *reconstructions* is off; or an argument is outside its range.
        UnknownTaskError: the bundle has no such task.
        NotFetchedError: a task was to be rebuilt, and its files are not here.
        TallstoreError: as `add`.
    """
    given = dict(experts or {})
    if isinstance(tasks, str):
        raise OptionError(f"tasks is {tasks!r}; give a list of names")
    with trying(bundle) if dry_run else changing(bundle) as change, contextlib.ExitStack() as inputs:
        names = _chosen(change, given, tasks)
        rebuilt = [name for name in names if name not in given]
        if rebuilt and not reconstructions:
            raise OptionError(
                f"{bundle}: the originals of {_listed(rebuilt)} are missing; give them in experts, or"
                " reconstructions=True to pack what the bundle rebuilds, to which errors add up"
            )
        recipe = Recipe(
            method=default_method(len(names)) if method is None else method,
            merged_dtype=merged_dtype,
            key_mapping=key_mapping or {},
            evaluate=evaluate,
            calibrate=calibrate,
            executor=executor,
            progress=progress,
            options=Options(private=patterns(private), compress=compress),
        )
        recipe.check(dict.fromkeys(names, ""))

        def opened(on: Checkpoint) -> Experts:
            """Originals as they come, all others on this base."""
            pinned = PinnedBase(change.bundle.base, lambda: on, "never")  # `pack_group` compares it before it is read
            tables = {task.entry.name: task for task in change.bundle.tables_of(rebuilt)}
            checkpoints = {
                name: inputs.enter_context(
                    RebuiltCheckpoint(change.bundle, tables[name], pinned)
                    if name in tables
                    else open_expert(name, given[name])
                )
                for name in names
            }
            return Experts(checkpoints, {name: base_names(table) for name, table in tables.items()})

        report = pack_group(change, base, opened, recipe, inputs, gone=names, action="repack")
    report = replace(report, path=Path(bundle))
    if not rebuilt:
        return report
    lossy = (
        f"packed from what the bundle rebuilt, not from originals: {_listed(rebuilt)}; errors add up, and cosine and"
        " gain are measured against the reconstruction"
    )
    return replace(report, advice=(lossy, *report.advice))


def _chosen(change: Change, given: Mapping[str, object], tasks: Sequence[str] | None) -> list[str]:
    """The names of the tasks that are packed again, in the order of the bundle."""
    there = [task.name for task in change.manifest.tasks]
    wanted = set(there if tasks is None else tasks)
    for name in (*(tasks or ()), *given):
        if name not in there:
            raise UnknownTaskError(change.bundle.where, "task", name, there)
        if name not in wanted:
            raise OptionError(f"experts has {name!r}, which is not among the tasks that are to be packed; leave it out")
    if not wanted:
        raise OptionError("tasks is empty; give names, or leave it out to pack all tasks")
    return [name for name in there if name in wanted]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
