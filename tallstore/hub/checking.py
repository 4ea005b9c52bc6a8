"""`verify`: of a directory every byte; of a bundle on the Hub what the Hub says of its files, which stay there."""

from __future__ import annotations

import os
from pathlib import Path

from tallstore import verifying
from tallstore.errors import FormatError, HubError, IntegrityError
from tallstore.format import layout
from tallstore.format.manifest import FileEntry
from tallstore.hub import transfer
from tallstore.hub.ids import on_hub
from tallstore.hub.pinned import Access
from tallstore.hub.snapshot import Snapshot, open_snapshot
from tallstore.meter import Progress
from tallstore.verifying import Problem
from tallstore.verifying.bundle_checks import check_manifest_file, due_directories, listed
from tallstore.verifying.findings import Problems


def verify(
    path_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Problem]:
    """Check a bundle; every problem, not the first.

    Of a directory, every file against every rule of the specification: reads every byte twice, once for the sha256 of
    its file, once for what it means. A task none of whose files are here was not fetched, and that is no problem; nor
    are the missing files of a group that no task here belongs to.

    Of a bundle on the Hub, the manifest, which is all that is downloaded, and the sizes and hashes that the Hub has of
    all files: one request for a thousand of them.

    Args:
        path_or_repo_id: the bundle's directory; or, where no such path exists, its id on the Hub,
            ``"org/name[@revision]"``.
        revision: on the Hub, a branch, a tag or a commit; by default ``main``.
        token: for the Hub; by default the one that its login stored.
        cache_dir: where the Hub's cache is, if not in its usual place.
        progress: called with bytes done and bytes in all, from several threads, one at a time.

    Returns:
        what was found, each once: the manifest's first, then the files', the base's, and group by group its own and its
        tasks'. Empty for a sound bundle.

    Raises:
        BundleNotFoundError: there is no bundle at that path, or of that id.
        BundleChangedError: somebody changed the directory meanwhile.
        HubError: the Hub refuses, or cannot be reached.
    """
    hub_id = on_hub(path_or_repo_id)
    if hub_id is None:
        return verifying.verify(path_or_repo_id, progress=progress)
    access = Access(token, cache_dir)
    if access.is_offline:
        raise HubError(str(hub_id), "cannot be verified offline; give the directory of its snapshot in the cache")
    return listed(_check(open_snapshot(hub_id, access, revision)))


def _check(snapshot: Snapshot) -> Problems:
    """What is wrong with the manifest, and where the Hub has other files than it lists."""
    manifest = yield from check_manifest_file(snapshot.root)
    if manifest is None:
        return
    told = snapshot.repository.list_files()
    absent = {file.path for file in manifest.files if file.path not in told}
    due = due_directories(manifest, absent)
    is_whole = all(layout.task_table(task.slug) in told for task in manifest.tasks)
    for file in manifest.files:
        directory = file.path.rpartition("/")[0]
        if file.path in absent and directory not in due and not (directory == "files" and is_whole):
            continue  # of a task that was not pushed
        problem = transfer.broken_promise(file, told.get(file.path))
        if problem is not None:
            yield FormatError(problem[0], file.path, problem[1])
        elif told[file.path].sha256 is None and file.git_oid is None:
            yield from _check_content(snapshot, file)
    files = {file.path for file in manifest.files}
    for path in sorted(told.keys() - files):
        if layout.is_own_place(path):
            yield FormatError("FILE-3", path[:200], "is not listed in the manifest; remove it")


def _check_content(snapshot: Snapshot, file: FileEntry) -> Problems:
    """FILE-2 of a file that the Hub keeps in git, where it has no sha256 and the manifest no blob id: by its bytes."""
    try:
        snapshot.have([file], check=True)
    except IntegrityError as error:
        yield FormatError(error.rule, file.path, error.problem)
