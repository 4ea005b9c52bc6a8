"""What it means that a file is not there, or another than the manifest says: an error that tells what to do."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

from tallstore.errors import BundleChangedError, FormatError, IntegrityError, NotFetchedError, TallstoreError
from tallstore.format import layout
from tallstore.format.manifest import FileEntry, Manifest
from tallstore.format.origin import read_origin
from tallstore.format.parsing import MAX_JSON_NBYTES


class Absence:
    """The errors of one bundle as it was when it was opened."""

    def __init__(self, root: Path, where: str, manifest: Manifest, raw: bytes) -> None:
        """Take a bundle's directory, what messages call it, and its manifest, which was read from *raw*."""
        self._root, self._where, self._manifest = root, where, manifest
        self._sha256 = hashlib.sha256(raw).digest()

    def missing(self, path: str) -> TallstoreError:
        """The error where nothing is at *path*."""
        slug = path.split("/")[1] if path.startswith("tasks/") else None
        name = next((task.name for task in self._manifest.tasks if task.slug == slug), None)
        if self.is_changed():
            return self._changed(path)
        if name is None:
            return FormatError("FILE-4", path, f"is missing from {self._where}; fetch the bundle again")
        return NotFetchedError(
            f"{self._where}: task {name!r} was not fetched ({path} is not here); {self._advice(name)}"
        )

    def missing_companion(self, path: str, file: str, task: str) -> TallstoreError:
        """The error where the companion *file* of a *task* is not at *path*."""
        if self.is_changed():
            return self._changed(path)
        return NotFetchedError(
            f"{self._where}: the file {file!r} of task {task!r} was not fetched ({path} is not here);"
            f" {self._advice(task)}"
        )

    def other(self, error: FormatError, path: str) -> TallstoreError:
        """The error where what is at *path* breaks a rule: *error*, unless it is of another bundle by now."""
        return self._changed(path) if self.is_changed() else error

    def check_size(self, entry: FileEntry, size: int) -> None:
        """Refuse a file of another size than its entry's.

        Raises:
            IntegrityError: FILE-1.
            BundleChangedError: it is of another bundle by now.
        """
        if size != entry.size:
            problem = f"has {size} bytes, the manifest says {entry.size}; fetch the file again"
            raise self.other(IntegrityError("FILE-1", entry.path, problem), entry.path) from None

    def is_changed(self) -> bool:
        """Whether the directory has another manifest than the one that was opened, or none. Reads it."""
        try:
            raw = layout.read_bounded(self._root, layout.MANIFEST, MAX_JSON_NBYTES)
        except (OSError, FormatError):
            return True
        return hashlib.sha256(raw).digest() != self._sha256

    def _changed(self, path: str) -> TallstoreError:
        return BundleChangedError(
            f"{self._where}: was changed since it was opened, and {path} is no longer what it was then; open it again"
        )

    def _advice(self, task: str) -> str:
        """How to get what is not here."""
        origin = read_origin(self._root)
        if origin is None:
            return "copy its files from where the bundle came from"
        return f"tallstore pull {origin.repo_id} --task {shlex.quote(task)} --out {shlex.quote(str(self._root))}"
