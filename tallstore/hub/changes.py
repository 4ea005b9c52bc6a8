"""What a push sends, leaves and deletes: the files that a bundle lists beside those that a repository has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tallstore.format import layout
from tallstore.format.manifest import FileEntry


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: in the repository.
        size: in bytes.
        sha256: of a file that the Hub keeps outside git; None for others.
        git_oid: the blob's, which for a file outside git is a pointer's.
    """

    path: str
    size: int
    sha256: str | None
    git_oid: str


@dataclass(frozen=True, slots=True)
class Changes:
    """What makes a repository's files those of a bundle.

    Attributes:
        upload: what the repository lacks, or has otherwise.
        keep: what it has.
        delete: what it has of a bundle and the new one does not list. A path that no bundle can have is never deleted.
    """

    upload: tuple[FileEntry, ...]
    keep: tuple[FileEntry, ...]
    delete: tuple[RemoteFile, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the repository is as it should be."""
        return not self.upload and not self.delete


def compare(
    wanted: Iterable[FileEntry], there: Mapping[str, RemoteFile], git_oid_of: Callable[[FileEntry], str | None]
) -> Changes:
    """Compare contents by the names that the Hub has for them; nothing is downloaded.

    Args:
        wanted: every file of the bundle.
        there: those of the repository, by path.
        git_oid_of: the git blob id of a wanted file whose entry has none; None where it is not known.
    """
    upload, keep = list[FileEntry](), list[FileEntry]()
    for entry in wanted:
        (keep if is_same(entry, there.get(entry.path), git_oid_of) else upload).append(entry)
    kept = {entry.path for entry in (*upload, *keep)}
    delete = [file for path, file in there.items() if path not in kept and layout.is_bundle_path(path)]
    return Changes(tuple(upload), tuple(keep), tuple(delete))


def is_same(entry: FileEntry, there: RemoteFile | None, git_oid_of: Callable[[FileEntry], str | None]) -> bool:
    """Whether a repository's file has the content of a bundle's; arguments as for `compare`."""
    if there is None or there.size != entry.size:
        return False
    if there.sha256 is not None:
        return there.sha256 == entry.sha256
    return there.git_oid == (entry.git_oid or git_oid_of(entry))
