"""One change of a bundle's directory: what is new moves in, the manifest is replaced, what is gone is deleted.

The manifest's rename is the moment of the change. Whatever ends the work before it, an error or the machine, leaves the
old bundle; afterwards there is the new one. Files that neither lists are deleted, if not now, then by the next change.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tallstore import files
from tallstore.caller_warnings import warn
from tallstore.errors import BundleNotFoundError, OutputBusyError, OutputError
from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import MAX_TASKS, Manifest
from tallstore.format.parsing import MAX_JSON_NBYTES, is_newer_minor, parse_manifest, serialise_manifest
from tallstore.format.sweeping import delete, sweep
from tallstore.format.tables import check_manifest, refuse
from tallstore.hub.ids import on_hub
from tallstore.locking import to_its_end
from tallstore.sizes import readable


@dataclass(frozen=True)
class Change:
    """A bundle that may be changed, and room to write what comes into it.

    Attributes:
        root: the bundle's directory.
        bundle: its files, as they are.
        room: an empty directory on the same file system; for a trial, elsewhere.
        is_trial: whether the bundle stays as it is.
    """

    root: Path
    bundle: BundleFiles
    room: Path
    is_trial: bool

    @property
    def manifest(self) -> Manifest:
        """The bundle's, as it is."""
        return self.bundle.manifest

    def commit(self, after: Manifest, made: Path | None = None) -> int:
        """Make the bundle what the manifest *after* says.

        Args:
            after: the new manifest.
            made: a directory with the files that are new, at their paths in the bundle.

        Returns:
            bytes of the new manifest.

        Raises:
            OutputError: something cannot be written; the bundle is as it was.
        """
        refuse(check_manifest(after))
        raw = serialise_manifest(after)
        if len(raw) > MAX_JSON_NBYTES or len(after.tasks) > MAX_TASKS:
            raise OutputError(
                f"{self.root}: {len(after.tasks)} tasks in {readable(len(raw))} of {layout.MANIFEST} are more than a"
                " bundle can have; pack into another bundle"
            )
        self.bundle.close()  # some systems delete no file that is open
        if not self.is_trial:
            with files.writing(self.root):
                self._replace(after, raw, made)
        return len(raw)

    def _replace(self, after: Manifest, raw: bytes, made: Path | None) -> None:
        listed = {file.path for file in self.manifest.files}
        coming = {file.path for file in after.files}
        new_paths = [] if made is None else _files_below(made)
        # A companion file may be there already, for other tasks.
        fresh = [
            path for path in new_paths if path in coming and not (path in listed and layout.is_here(self.root, path))
        ]
        place = self.root / layout.MANIFEST
        before = place.read_bytes()
        # Where the system has no locks. No other manifest has this one's hash of itself.
        if self.manifest.manifest_sha256.encode() not in before:
            raise OutputBusyError(f"{self.root}: was changed by another process meanwhile; start again")
        old, new = self.room / "before.json", self.room / "after.json"
        files.write_file(old, before)
        files.write_file(new, raw)
        try:
            if made is not None:
                files.move_in(made, self.root, fresh)
            new.replace(place)
            try:
                files.sync_directory(self.root)
            except OSError:
                old.replace(place)
                raise
        finally:
            there = place.read_bytes()
            kept = coming if there == raw else listed if there == before else None
            to_its_end(lambda: self._delete_unlisted(fresh, _paths_of(there) if kept is None else kept))

    def _delete_unlisted(self, fresh: list[str], listed: set[str]) -> None:
        """Delete, of the old files and the *fresh* ones, what the manifest that is there does not list."""
        paths = dict.fromkeys((*fresh, *(file.path for file in self.manifest.files)))
        _warn_of_refusals(self.root, lambda: delete(self.root, (path for path in paths if path not in listed)))


def _paths_of(manifest: bytes) -> set[str]:
    return {file.path for file in parse_manifest(manifest, layout.MANIFEST).files}


def _files_below(made: Path) -> list[str]:
    """The paths of a directory's files."""
    return sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())


@contextlib.contextmanager
def changing(bundle: str | os.PathLike[str]) -> Iterator[Change]:
    """A bundle that nobody else changes inside the block; what a change that was broken off has left is deleted first.

    Raises:
        BundleNotFoundError: there is none.
        OutputBusyError: another process is writing to it.
        OutputError: it is on the Hub, in its cache, or nothing can be written beside it.
        FormatError: its manifest breaks a rule.
    """
    root = _directory(bundle)
    with contextlib.ExitStack() as opened:
        found: list[BundleFiles] = []
        room = opened.enter_context(files.room_beside(root, lambda: found.append(_open(root))))
        with files.writing(root):
            _refuse_unwritable(root)
        _warn_of_refusals(root, lambda: sweep(root, found[0].manifest, but_for_listed=True))
        opened.enter_context(contextlib.closing(found[0]))
        yield Change(root, found[0], room, is_trial=False)


@contextlib.contextmanager
def trying(bundle: str | os.PathLike[str]) -> Iterator[Change]:
    """As `changing`, of which nothing comes: the bundle is only read."""
    root = _directory(bundle)
    with tempfile.TemporaryDirectory(prefix="tallstore-") as scratch, contextlib.closing(_open(root)) as opened:
        yield Change(root, opened, Path(scratch), is_trial=True)


def _directory(bundle: str | os.PathLike[str]) -> Path:
    """Where a bundle is that may be changed, links on the way resolved."""
    hub_id = on_hub(bundle)
    if hub_id is not None:
        raise OutputError(
            f"{hub_id}: is on the Hub; pull it first (tallstore pull {hub_id} --out DIRECTORY), change the directory,"
            " and push that"
        )
    root = Path(os.path.realpath(bundle))
    manifest = root / layout.MANIFEST
    with files.writing(root):
        if not manifest.exists():
            raise BundleNotFoundError(f"{bundle}: there is no bundle (no {layout.MANIFEST}); check the path")
        if manifest.is_symlink() or (root.parent.name == "snapshots" and (root.parent.parent / "refs").is_dir()):
            raise OutputError(
                f"{bundle}: is in the cache of the Hub's client, which nobody may change; pull the bundle into a"
                " directory of its own (tallstore pull … --out DIRECTORY), and change that"
            )
    return root


def _open(root: Path) -> BundleFiles:
    bundle = BundleFiles(root)
    if is_newer_minor(bundle.manifest):  # what it says and this version would lose is refused (WRITE-5)
        parse_manifest(layout.read_bounded(root, layout.MANIFEST, MAX_JSON_NBYTES), layout.MANIFEST, to_change=True)
    return bundle


def _refuse_unwritable(root: Path) -> None:
    """Say before the work that nothing can be written, where the system says so."""
    for directory in (root, *(root / name for name in ("files", "groups", "tasks"))):
        if directory.is_dir() and not os.access(directory, os.W_OK | os.X_OK):
            raise OutputError(f"{directory}: cannot be written to (permission denied); change its permissions")


def _warn_of_refusals(root: Path, deleting: Callable[[], object]) -> None:
    """Delete what no manifest lists; where the system refuses, the bundle is whole all the same."""
    try:
        deleting()
    except OSError as error:
        warn(
            f"{root}: files that it no longer has cannot be deleted ({error.strerror}); the next change will try again"
        )
