"""`pull`: tasks of a bundle on the Hub, into the Hub's cache or into a directory of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from tallstore import files
from tallstore.caller_warnings import warn
from tallstore.errors import (
    BundleNotFoundError,
    FormatError,
    OptionError,
    OutputExistsError,
    UnsupportedFeatureError,
)
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import FileEntry, Manifest
from tallstore.format.origin import ORIGIN, Origin, read_origin, serialise_origin
from tallstore.format.owners import Task
from tallstore.format.sweeping import sweep
from tallstore.hub import transfer
from tallstore.hub.ids import parse_hub_id
from tallstore.hub.pinned import Access, in_cache
from tallstore.hub.snapshot import Snapshot, open_snapshot
from tallstore.meter import Progress

_COMPANIONS: Final = "files"


def pull(
    repo_id: str,
    *,
    tasks: Sequence[str] | None = None,
    revision: str | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    max_workers: int = transfer.MAX_WORKERS,
    progress: Progress | None = None,
) -> Path:
    """Download a bundle from the Hub, or some tasks of it: a bundle that works without the Hub, and can be added to.

    What is there is kept where its size and sha256 are right, and everything that arrives is checked. A base that the
    bundle names, and does not embed, stays where it is: it is fetched when the bundle needs it.

    Args:
        repo_id: ``"org/name[@revision]"``.
        tasks: their names; all of them by default.
        revision: a branch, a tag or a commit; by default ``main``.
        local_dir: the directory to write, which holds no links. If an earlier pull wrote it, tasks are added, and where
            the bundle has changed, those that are there are brought up to date; if you added some to it yourself, that
            the bundle on the Hub does not have, it is refused. The directory changes in one step, when everything is
            there, and your own files in it stay; what was downloaded by a pull that failed is kept beside it, hidden,
            for the next one. None leaves the files in the Hub's cache.
        cache_dir: where the Hub's cache is, if not in its usual place.
        token: for the Hub; by default the one that its login stored.
        local_files_only: ask nothing of the Hub; take everything from its cache.
        force_download: download again, whatever is there.
        max_workers: how many files at a time.
        progress: called with bytes that arrived, and in all, from several threads, one at a time.

    Returns:
        the bundle's directory: *local_dir*, or the snapshot in the cache.

    Raises:
        BundleNotFoundError: there is no such bundle, or *repo_id* is no id.
        UnknownTaskError: it has no such task.
        IntegrityError: the Hub's file, or what arrived, is not what the manifest says; it was removed.
        FormatError: the bundle breaks a rule.
        NotFetchedError: offline, and a file is not in the cache.
        HubError: the Hub refuses, or cannot be reached.
        OutputError: *local_dir* holds something else, another process writes to it, or the disk is full.
        OptionError: an argument is outside its range.
    """
    hub_id = parse_hub_id(repo_id)
    if hub_id is None:
        raise BundleNotFoundError(f"{repo_id!r}: is no id of a repository on the Hub; give org/name")
    if isinstance(tasks, str):
        raise OptionError(f"tasks is {tasks!r}; give a list of names")
    if max_workers < 1:
        raise OptionError(f"max_workers is {max_workers}; give at least 1")
    snapshot = open_snapshot(hub_id, Access(token, cache_dir, local_files_only, force_download), revision, max_workers)
    bundle = BundleFiles(snapshot.root, source=snapshot)
    wanted = [task.name for task in bundle.manifest.tasks] if tasks is None else list(dict.fromkeys(tasks))
    if local_dir is None:
        snapshot.have(_entries(bundle, wanted), progress, check=True)
        return snapshot.root
    target = Path(local_dir).expanduser()
    for name in wanted:
        bundle.entry(name)
    place = Path(os.path.realpath(target))
    with files.gathered_files(place) as gathered:
        _Directory(place, gathered, snapshot, bundle).fill(wanted, progress)
    return target


def _entries(bundle: BundleFiles, names: Iterable[str]) -> list[FileEntry]:
    """What a partial bundle of these tasks consists of, the manifest aside; brings their tables.

    Where one needs a feature that is not here, nobody knows which companion files are its own: all of them are brought.
    """
    names = list(names)
    directories = {layout.BASE_DIRECTORY}
    for entry in map(bundle.entry, names):
        directories |= {layout.task_directory(entry.slug), layout.group_directory(entry.group)}
    tasks, too_new = _tables(bundle, names)
    companions = {layout.companion_path(file.sha256) for task in tasks for file in task.table.files}
    if too_new is not None:
        warn(f"{bundle.where}: {too_new}; its files are brought as they are")
        directories.add(_COMPANIONS)
    return [
        entry
        for path, entry in bundle.files.items()
        if path == layout.BASE_TABLE or path in companions or path.rpartition("/")[0] in directories
    ]


def _tables(bundle: BundleFiles, names: Sequence[str]) -> tuple[list[Task], UnsupportedFeatureError | None]:
    """The tables of tasks, and why the first is left out of those that need a feature which is not here."""
    try:
        return bundle.tables_of(names), None
    except UnsupportedFeatureError as error:
        too_new = error
    tasks = []
    for name in names:
        with contextlib.suppress(UnsupportedFeatureError):
            tasks.append(bundle.task(name))
    return tasks, too_new


# --- a directory ------------------------------------------------------------------------------------------------------

_WHOLE: Final = ".whole"  # among what is gathered: the directory as it will be


class _Directory:
    """A directory that is filled: files are gathered beside it, and move in when all of them are there."""

    def __init__(self, target: Path, gathered: Path, snapshot: Snapshot, bundle: BundleFiles) -> None:
        self._target, self._gathered, self._snapshot, self._bundle = target, gathered, snapshot, bundle
        self._again = snapshot.repository.access.force_download

    def fill(self, names: Sequence[str], progress: Progress | None) -> None:
        """Have these tasks in the directory, and those that are there; then the manifest.

        Raises:
            OutputExistsError: something else is in the directory.
            OutputError: it is read-only.
            TallstoreError: as `pull`.
        """
        with files.writing(self._target):
            files.refuse_read_only(self._target)
            before = self._before()
        needed = self._gather([*names, *self._kept(before)], progress)
        with files.writing(self._target):
            self._move_in(needed, before)

    # --- what is there ---

    def _before(self) -> Manifest | None:
        """The manifest that is there; None in a directory that is new or empty."""
        target = self._target
        if target.exists() and not target.is_dir():
            raise OutputExistsError(f"{target}: is a file; choose another place")
        if not (target / layout.MANIFEST).exists():
            if target.exists() and any(target.iterdir()):
                raise OutputExistsError(f"{target}: holds what no pull wrote; choose another place")
            return None
        before = BundleFiles(target).manifest
        origin = read_origin(target)
        if origin is None or origin.repo_id != self._snapshot.repository.repo_id:
            self._refuse_another(before)
        elif before.manifest_sha256 != origin.manifest_sha256:
            self._refuse_own_tasks(before)
        return before

    def _refuse_another(self, before: Manifest) -> None:
        """Refuse a bundle that was not pulled from here, unless it is the same but for the tasks that it has."""
        for file in before.files:
            now = self._bundle.files.get(file.path)
            is_table = file.path.endswith(".json") and file.path != layout.BASE_TABLE
            if now is not None and now.sha256 != file.sha256 and not is_table:
                raise OutputExistsError(
                    f"{self._target}: is another bundle than {self._bundle.where} ({file.path} differs); "
                    "choose another place"
                )
        self._refuse_own_tasks(before, but_for_tables=True)

    def _refuse_own_tasks(self, before: Manifest, *, but_for_tables: bool = False) -> None:
        """Refuse a bundle that was changed here, and has tasks by that which would be lost."""
        listed = {file.path: file.sha256 for file in before.files}
        for task in before.tasks:
            path = layout.task_table(task.slug)
            now = self._bundle.files.get(path)
            is_known = now is not None and (but_for_tables or now.sha256 == listed[path])
            if not is_known and layout.is_here(self._target, path):
                raise OutputExistsError(
                    f"{self._target}: has a task {task.name!r} that {self._bundle.where} has not, and would lose it;"
                    " push the directory first, or choose another place"
                )

    def _kept(self, before: Manifest | None) -> list[str]:
        """The tasks that are there, as far as the bundle still has them."""
        names = {task.name for task in self._bundle.manifest.tasks}
        there = () if before is None else before.tasks
        return [
            task.name
            for task in there
            if task.name in names and layout.is_here(self._target, layout.task_table(task.slug))
        ]

    # --- what is missing ---

    def _gather(self, names: Sequence[str], progress: Progress | None) -> list[FileEntry]:
        """Have what the directory lacks beside it; what that is."""
        entries = _entries(self._bundle, names)
        with files.writing(self._target):
            needed = [entry for entry in entries if self._again or not _is_right(self._target, entry)]
            missing = [entry for entry in needed if not self._is_gathered(entry)]
        repository = self._snapshot.repository
        if missing and repository.access.is_offline:
            self._snapshot.have(missing)  # says which one is not there
        if missing:
            with files.writing(self._target):
                transfer.download(
                    repository,
                    missing,
                    self._gathered,
                    local_dir=self._gathered,
                    max_workers=self._snapshot.max_workers,
                    progress=progress,
                )
        return needed

    def _is_gathered(self, entry: FileEntry) -> bool:
        """Whether a pull that failed has left a file, or the cache has it: then it is copied."""
        if _is_right(self._gathered, entry):
            return True
        copy = self._gathered / entry.path
        copy.unlink(missing_ok=True)
        if self._again or not layout.is_here(self._snapshot.root, entry.path):
            return False
        copy.parent.mkdir(parents=True, exist_ok=True)
        cached = self._snapshot.root / entry.path
        try:
            files.write_file(copy, cached)
        except OSError as error:
            if error.filename is None or os.fsdecode(error.filename) != str(cached):
                raise
            return False  # what the cache has cannot be read: it comes from the Hub
        return _is_right(self._gathered, entry)

    # --- into the directory ---

    def _move_in(self, needed: Sequence[FileEntry], before: Manifest | None) -> None:
        """Move what was gathered into the directory: all in one step, where its manifest is to be another."""
        repository = self._snapshot.repository
        manifest = self._bundle.manifest
        origin = serialise_origin(Origin(repository.repo_id, repository.sha, manifest.manifest_sha256))
        (self._gathered / ORIGIN).parent.mkdir(parents=True, exist_ok=True)
        files.write_file(self._gathered / ORIGIN, origin)
        with in_cache(self._snapshot.where):
            raw = (self._snapshot.root / layout.MANIFEST).read_bytes()
        files.write_file(self._gathered / layout.MANIFEST, raw)
        paths = [*(entry.path for entry in needed), ORIGIN]
        for path in paths:
            files.sync_file(self._gathered / path)
        if before is None or before.manifest_sha256 != manifest.manifest_sha256:
            self._replace([*paths, layout.MANIFEST])
        else:
            self._add(paths)
            sweep(self._target, manifest)

    def _add(self, paths: Sequence[str]) -> None:
        """Move files in; those of a new task with their directory, for a task is here whole or not at all (PART-1)."""
        due = set(paths)
        folders = {PurePosixPath(path).parent for path in paths if path.startswith("tasks/")}
        new = {folder for folder in folders if _is_free(self._target / folder)}
        for folder in new:
            for left in (self._gathered / folder).iterdir():  # by a pull that was killed
                if str(folder / left.name) not in due:
                    left.unlink()
            files.sync_directory(self._gathered / folder)
        others = [path for path in paths if PurePosixPath(path).parent not in new]
        files.move_in(self._gathered, self._target, [*others, *sorted(map(str, new))])

    def _replace(self, paths: Sequence[str]) -> None:
        """Replace the directory in one step.

        What is the user's own is in the new one as it was: linked, so that nothing is copied.
        """
        whole = self._gathered / _WHOLE
        shutil.rmtree(whole, ignore_errors=True)  # of a pull that was killed
        if self._target.exists():
            shutil.copytree(self._target, whole, symlinks=True, copy_function=_link_or_copy)
        else:
            whole.mkdir()
        files.move_in(self._gathered, whole, paths)
        sweep(whole, self._bundle.manifest)
        files.replace_directory(whole, self._target)


def _is_free(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # not there, or not empty
        folder.rmdir()
    return not os.path.lexists(folder)


def _link_or_copy(source: str, destination: str) -> None:
    """Have the file *source* under a second name; a copy of it where the file system has no links."""
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _is_right(root: Path, entry: FileEntry) -> bool:
    """Whether a file is there, and the one that the manifest says; reads it."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, FormatError):
        return transfer.difference(layout.resolve(root, entry.path), entry) is None
    return False
