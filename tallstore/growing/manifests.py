"""The manifest of a bundle after a change: which tasks, groups and files it lists then."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable

import msgspec
from msgspec import Struct

import tallstore
from tallstore.errors import FormatError, IntegrityError
from tallstore.files import hash_bytes
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import CompanionFile, Manifest, TaskEntry
from tallstore.format.parsing import MAX_JSON_NBYTES
from tallstore.format.versions import FEATURES


def after_change(
    before: Manifest, gone: Collection[str], made: Manifest | None, lost_files: frozenset[str]
) -> Manifest:
    """The manifest once some tasks are gone, and those of one new group have come.

    A task that comes in the place of one that goes has its place in the list; the others follow. A group goes with its
    last task.

    Args:
        before: the bundle's manifest.
        gone: names of the tasks that go.
        made: a manifest of the new group alone; None where none comes.
        lost_files: paths of companion files that no task names any more.
    """
    came = {} if made is None else {task.name: task for task in made.tasks}
    tasks = [came.pop(task.name) if task.name in came else task for task in _remaining(before, gone, came)]
    used = {task.group for task in tasks}
    lost = {task.group for task in before.tasks if task.name in gone} - used
    groups = [group for group in before.groups if group.id not in lost]
    directories = {
        *(layout.task_directory(task.slug) for task in before.tasks if task.name in gone),
        *map(layout.group_directory, lost),
    }
    files = {
        file.path: file
        for file in before.files
        if file.path.rpartition("/")[0] not in directories and file.path not in lost_files
    }
    if made is not None:
        groups += made.groups
        files |= {file.path: file for file in made.files if file.path.partition("/")[0] in {"files", "groups", "tasks"}}
    return msgspec.structs.replace(
        before,  # whose version stays: what is new needs no other (WRITE-4)
        generator=f"tallstore {tallstore.__version__}",
        next_group=before.next_group if made is None else made.next_group,
        groups=tuple(groups),
        tasks=(*tasks, *came.values()),
        files=tuple(files[path] for path in sorted(files)),
    )


def _remaining(before: Manifest, gone: Collection[str], came: Collection[str]) -> Iterable[TaskEntry]:
    return [task for task in before.tasks if task.name not in gone or task.name in came]


class _Named(Struct):
    """Of a task.json, what it says of companion files, unless a feature says more."""

    required_features: tuple[str, ...]
    files: tuple[CompanionFile, ...]


def lost_companions(bundle: BundleFiles, gone: Collection[str]) -> frozenset[str]:
    """The paths of the companion files that no task names any more; none where that cannot be known.

    Cost:
        Reads the tables of the tasks that go, and those of others until each of their files was found in one: of one or
        two where all share them, of all where a task has a file of its own.

    Raises:
        IntegrityError: the table of a task that stays is not the one that was written.
        FormatError: JSON-3, it is none.
    """
    lost = set[str]()
    for entry in (task for task in bundle.manifest.tasks if task.name in gone):
        named = None
        with contextlib.suppress(FormatError):  # what is damaged may go
            named = _named_by(bundle, entry)
        lost |= {path for path in bundle.files if path.startswith("files/")} if named is None else named
    for entry in (task for task in bundle.manifest.tasks if task.name not in gone):
        if not lost:
            break
        named = _named_by(bundle, entry)
        if named is None:
            return frozenset()
        lost -= named
    return frozenset(lost)


def _named_by(bundle: BundleFiles, entry: TaskEntry) -> set[str] | None:
    """The companion files that a task names; None where its table is not here, or needs a feature that this lacks."""
    path = layout.task_table(entry.slug)
    try:
        raw = layout.read_bounded(bundle.root, path, MAX_JSON_NBYTES)
    except FileNotFoundError:
        return None
    if hash_bytes(raw).sha256 != bundle.files[path].sha256:
        raise IntegrityError("FILE-2", path, "changed since it was written; fetch the file again")
    try:
        named = msgspec.json.decode(raw, type=_Named)
    except msgspec.MsgspecError as error:
        raise FormatError("JSON-3", path, str(error)) from None
    if not FEATURES.issuperset(named.required_features):
        return None
    return {layout.companion_path(file.sha256) for file in named.files}
