"""`write_report`, and the plots as files."""

from __future__ import annotations

import os
from pathlib import Path

from tallstore import files
from tallstore.errors import OutputError, OutputExistsError, OutputInsideInputError
from tallstore.format import layout
from tallstore.meter import Progress
from tallstore.reporting.drawing import check_matplotlib
from tallstore.reporting.measuring import measure
from tallstore.reporting.page import render


def write_report(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a report of the bundle at *path* to *out*: one HTML page that needs no network.

    It shows what `inspect` and `Bundle.statistics` tell: sizes, how true each task is, densities, agreement and overlap
    of the masks, the values of the shared vectors. Tasks whose files are not here are named, and left out.

    Args:
        path: the bundle's directory.
        out: the page, written whole or not at all.
        overwrite: replace a file that is there.
        progress: called with bytes of masks and shared vectors done, and in all.

    Returns:
        where the page is.

    Cost:
        reads every mask and shared vector once, rebuilds nothing, needs no base; time for the overlaps grows with the
        square of the number of tasks.

    Raises:
        MissingExtraError: matplotlib is not installed: the extra ``report`` has it.
        BundleNotFoundError: there is no bundle at *path*.
        FormatError, IntegrityError: a file of the bundle is not the one that was written.
        OutputError: *out* is there already, is inside the bundle, or cannot be written.
    """
    bundle, target = Path(path), Path(out)
    check_matplotlib()
    _check_output(bundle, target, overwrite=overwrite)
    page = render(measure(bundle, progress)).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
    with files.writing(target):
        files.write_file(target, page)
    return target


def _check_output(bundle: Path, target: Path, *, overwrite: bool) -> None:
    place, root = Path(os.path.realpath(target)), Path(os.path.realpath(bundle))
    if root in (place, *place.parents) and (root / layout.MANIFEST).exists():
        raise OutputInsideInputError(f"{target}: is inside the bundle {bundle}; choose another place")
    if target.is_dir():
        raise OutputExistsError(f"{target}: is a directory; give the name of a file, such as report.html")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target}: is there already; choose another place, or give overwrite=True")
