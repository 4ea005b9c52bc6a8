"""The page as a file."""

from __future__ import annotations

import os
from pathlib import Path

from tallstore import files
from tallstore.errors import OutputError, OutputExistsError, OutputInsideInputError
from tallstore.format.bundle_files import BundleFiles
from tallstore.meter import Progress
from tallstore.reporting.drawing import check_matplotlib
from tallstore.reporting.measuring import measure
from tallstore.reporting.page import render


def check(target: Path, *, overwrite: bool) -> None:
    """Make sure that a page can be drawn, and has a place, before anything is read for it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputExistsError: *target* is a directory, or, unless *overwrite*, a file.
    """
    check_matplotlib()
    if target.is_dir():
        raise OutputExistsError(f"{target}: is a directory; give the name of a file, such as report.html")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target}: is there already; choose another place, or give overwrite=True")


def check_outside(target: Path, root: Path) -> None:
    """Make sure that the page is no file of the bundle at *root*.

    Raises:
        OutputInsideInputError: it would lie in its directory.
    """
    place, inside = Path(os.path.realpath(target)), Path(os.path.realpath(root))
    if inside in (place, *place.parents):
        raise OutputInsideInputError(f"{target}: is inside the bundle {root}; choose another place")


def write(bundle: BundleFiles, target: Path, progress: Progress | None = None) -> None:
    """Measure a bundle and write its page, whole or not at all.

    Raises:
        FormatError, IntegrityError: as `measure`.
        OutputError: *target* cannot be written.
    """
    page = render(measure(bundle, progress)).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
    with files.writing(target):
        files.write_file(target, page)
