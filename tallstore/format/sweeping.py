"""Files that no manifest lists: what a writer left that came to no end, or has just taken out of its bundle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from tallstore.errors import FormatError
from tallstore.format import layout
from tallstore.format.manifest import Manifest


def sweep(root: Path, manifest: Manifest, *, but_for_listed: bool = False) -> list[str]:
    """Delete what stands where files of the bundle at *root* may (PATH-1), and *manifest* does not list.

    Only plain files in plain directories; a directory ``base`` is the user's own where the base is not embedded. Who
    calls it keeps other writers away.

    Args:
        root: the bundle's directory.
        manifest: what stays.
        but_for_listed: do not look into the directories of listed tasks and groups, of which there may be thousands:
            what adds and removes tasks leaves nothing there.

    Returns:
        the paths that were deleted.

    Raises:
        OSError: as `delete`.
    """
    listed = {file.path for file in manifest.files}
    tops = ["files", "groups", "tasks", *([layout.BASE_DIRECTORY] if manifest.base.embedded else [])]
    kept = {path.rpartition("/")[0] for path in listed} if but_for_listed else set[str]()
    there = [path for top in tops for path in _files(root, top, kept)]
    unlisted = sorted(path for path in there if path not in listed and layout.is_bundle_path(path))
    delete(root, unlisted)
    return unlisted


def delete(root: Path, paths: Iterable[str]) -> None:
    """Delete files of the bundle at *root*, as far as they are there, and the directories that this leaves empty.

    What a link leads to is nobody's of the bundle, and stays.

    Raises:
        OSError: the first refusal of the system; all others have been tried.
    """
    paths = list(paths)
    refused = [error for path in paths if (error := _refusal(root, path))]
    folders = {parent for path in paths for parent in PurePosixPath(path).parents if parent.parts}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with contextlib.suppress(OSError):  # not empty
            (root / folder).rmdir()
    if refused:
        raise refused[0]


def _refusal(root: Path, path: str) -> OSError | None:
    """Delete a file; what the system has against it."""
    try:
        layout.resolve(root, path).unlink()
    except (FileNotFoundError, NotADirectoryError, FormatError):
        return None
    except OSError as error:
        return error
    return None


def _files(root: Path, folder: str, kept: Collection[str]) -> Iterator[str]:
    """Paths of the plain files in a directory of the bundle and below it, but for what is in the *kept* directories.

    Links are not followed; empty directories are removed.
    """
    place = root / folder
    if place.is_symlink() or not place.is_dir():
        return
    with os.scandir(place) as entries:
        found = list(entries)
    if not found:
        with contextlib.suppress(OSError):
            place.rmdir()
    for entry in found:
        path = f"{folder}/{entry.name}"
        if path not in kept and entry.is_dir(follow_symlinks=False):
            yield from _files(root, path, kept)
        elif path not in kept and entry.is_file(follow_symlinks=False):
            yield path
