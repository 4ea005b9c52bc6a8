"""The bundle that is pushed: its manifest, and its files as they were verified."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from tallstore.caller_warnings import warn
from tallstore.errors import BundleNotFoundError, CardError, FormatError, IntegrityError
from tallstore.files import hash_bytes, hash_file, write_file
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import FileEntry
from tallstore.format.origin import ORIGIN, Origin, read_origin, serialise_origin
from tallstore.format.parsing import MAX_JSON_NBYTES, parse_manifest
from tallstore.inspecting.statistics import measure_masks
from tallstore.inspecting.summary import summarise
from tallstore.meter import Progress
from tallstore.reporting.drawing import Plot
from tallstore.reporting.plots import card_plots
from tallstore.verifying import verify

README: Final = "README.md"
MAX_README_NBYTES: Final = 16 << 20
# Files that go into git, which the client reads into memory when it commits.
_SMALL_NBYTES: Final = 1 << 20


class LocalBundle:
    """The bundle here.

    Attributes:
        root: its directory.
        manifest, raw_manifest: tallstore.json.
        files: what it lists, by path.
    """

    def __init__(self, root: Path, progress: Progress | None = None) -> None:
        """Read the manifest.

        Args:
            root: the bundle's directory.
            progress: is told bytes verified, and in all.
        """
        self.root, self._progress = root, progress
        try:
            self.raw_manifest = layout.read_bounded(root, layout.MANIFEST, MAX_JSON_NBYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleNotFoundError(f"{root}: there is no bundle (no {layout.MANIFEST}); check the path") from None
        self.manifest = parse_manifest(self.raw_manifest, layout.MANIFEST)
        self.files = {file.path: file for file in self.manifest.files}
        self._is_verified = False

    def readme(self) -> str | None:
        """The model card here, None where there is none."""
        place = self.root / README
        if not os.path.lexists(place):
            return None
        if not place.is_file():  # a pipe would be waited for
            raise CardError(str(place), "is not a regular file")
        with place.open("rb") as file:
            raw = file.read(min(os.fstat(file.fileno()).st_size, MAX_README_NBYTES) + 1)
        if len(raw) > MAX_README_NBYTES:
            raise CardError(str(place), f"is larger than {MAX_README_NBYTES:,} bytes; shorten it")
        return decode(raw, str(place))

    def git_oid(self, entry: FileEntry) -> str | None:
        """The git blob id of a file here, which is read; None where it is not here."""
        try:
            return hash_file(layout.resolve(self.root, entry.path)).git_oid
        except FileNotFoundError:
            return None

    def content(self, entry: FileEntry) -> Path | bytes:
        """What is to be uploaded of a file: where it is; for git, the bytes, which are the right ones.

        Raises:
            IntegrityError: they are not, any more.
        """
        place = layout.resolve(self.root, entry.path)
        if entry.git_oid is None or entry.size > _SMALL_NBYTES:
            return place
        raw = place.read_bytes()
        if hash_bytes(raw).sha256 != entry.sha256:
            raise changed(entry)
        return raw

    def absent_tables(self) -> list[str]:
        """The tables of tasks that were not fetched."""
        tables = [layout.task_table(task.slug) for task in self.manifest.tasks]
        return [path for path in tables if path in self.files and not os.path.lexists(self.root / path)]

    def origin(self) -> Origin | None:
        """Where the bundle was pulled from; None where that is not known."""
        return read_origin(self.root)

    def remember(self, repo_id: str, commit: str) -> None:
        """Of a bundle that was pulled from there: the repository has at *commit* what is here."""
        origin = self.origin()
        if origin is not None and origin.repo_id == repo_id:
            with contextlib.suppress(OSError):  # in a directory that may not be written to, the old commit stays
                write_file(self.root / ORIGIN, serialise_origin(Origin(repo_id, commit, self.manifest.manifest_sha256)))

    @cached_property
    def plots(self) -> Sequence[tuple[Plot, bytes]]:
        """Those of a model card, and their pictures; reads every mask once.

        Raises:
            FormatError: the bundle is broken.
        """
        self.refuse_broken()
        summary = summarise(self.root)
        names = [task.name for task in summary.tasks if task.fetched and task.unreadable is None]
        with contextlib.closing(BundleFiles(self.root)) as files:
            masks = measure_masks(files, names) if names else None
        return [(plot, plot.file("png")) for plot in card_plots(summary, masks)]

    def refuse_broken(self) -> None:
        """Verify the bundle, once; of a group or task that needs a feature which is not here, only the bytes.

        Raises:
            FormatError: the first of its problems.
        """
        if self._is_verified:
            return
        problems = []
        for problem in verify(self.root, progress=self._progress):
            if problem.rule == "VER-4":  # the manifest's own features were looked at when it was parsed
                warn(f"{problem}: its files are pushed as they are")
            else:
                problems.append(problem)
        if problems:
            first = problems[0]
            more = f"; {len(problems)} problems in all, which verify lists" if len(problems) > 1 else ""
            raise FormatError(first.rule, f"{self.root}/{first.where}", f"{first.message}{more}; not pushed")
        self._is_verified = True


def changed(entry: FileEntry) -> IntegrityError:
    """The error that a file is not what it was when it was verified."""
    return IntegrityError("FILE-2", entry.path, "changed while it was pushed, and was not committed; push again")


def decode(raw: bytes, where: str) -> str:
    """The text of a README.

    Raises:
        CardError: it is not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CardError(where, f"is not UTF-8 (byte {error.start}); save it as UTF-8") from None
