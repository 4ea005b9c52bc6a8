"""`write_report`: of a bundle wherever it is; one on the Hub is downloaded for it, but for an embedded base."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tallstore.errors import NotFetchedError, UnsupportedFeatureError
from tallstore.files import writing as writing_to
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.owners import Task
from tallstore.hub.opening import open_files
from tallstore.hub.pinned import Access
from tallstore.meter import Progress
from tallstore.reporting import writing


def write_report(
    path_or_repo_id: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a report of a bundle to *out*: one HTML page that needs no network.

    It shows what `inspect` and `Bundle.statistics` tell: sizes, how true each task is, densities, agreement and overlap
    of the masks, the values of the shared vectors. Tasks whose files are not there are named, and left out.

    Args:
        path_or_repo_id: the bundle's directory; or, where no such path exists, its id on the Hub,
            ``"org/name[@revision]"``: then the files of all tasks and groups come into the Hub's cache.
        out: the page, written whole or not at all.
        overwrite: replace a file that is there.
        revision: on the Hub, a branch, a tag or a commit; by default ``main``.
        token: for the Hub; by default the one that its login stored.
        cache_dir: where the Hub's cache is, if not in its usual place.
        progress: called with bytes of masks and shared vectors done, and in all.

    Returns:
        where the page is.

    Cost:
        reads every mask and shared vector once, rebuilds nothing, needs no base; time for the overlaps grows with the
        square of the number of tasks.

    Raises:
        MissingExtraError: matplotlib is not installed: the extra ``report`` has it.
        BundleNotFoundError: there is no bundle at that path, or of that id.
        FormatError, IntegrityError: a file of the bundle is not the one that was written.
        OutputError: *out* is there already, is inside the bundle, or cannot be written.
        HubError: the Hub refuses, or cannot be reached.
    """
    target = Path(out)
    with writing_to(target):
        writing.check(target, overwrite=overwrite)
    with contextlib.closing(open_files(path_or_repo_id, Access(token, cache_dir), revision)) as files:
        writing.check_outside(target, files.root)
        if files.brings:
            files.bring(_tables(files))
        writing.write(files, target, progress)
    return target


def _tables(files: BundleFiles) -> list[Task]:
    """Those that the Hub has, and that this version reads."""
    names = [task.name for task in files.manifest.tasks]
    with contextlib.suppress(NotFetchedError, UnsupportedFeatureError):
        return files.tables_of(names)
    found = []
    for name in names:
        with contextlib.suppress(NotFetchedError, UnsupportedFeatureError):
            found.append(files.task(name))
    return found
