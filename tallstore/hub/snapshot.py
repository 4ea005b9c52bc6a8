"""The files of a bundle on the Hub as its client's cache has them: one commit's, brought when they are needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from tallstore.errors import NotFetchedError
from tallstore.format import layout
from tallstore.format.manifest import FileEntry
from tallstore.hub import transfer
from tallstore.hub.repository import Repository, discard
from tallstore.meter import Progress


class Snapshot:
    """A commit's files in the cache; the `Source` of a bundle that was opened by its id.

    Attributes:
        repository: at that commit.
        root: the snapshot's directory, which has the manifest.
        where: what messages call the bundle.
    """

    def __init__(self, repository: Repository, root: Path, max_workers: int = transfer.MAX_WORKERS) -> None:
        self.repository, self.root, self.where = repository, root, repository.where
        self._max_workers = max_workers
        self._settled: set[str] = set()
        self._lock = threading.Lock()

    def fetch(self, entries: Sequence[FileEntry]) -> None:
        """As `Source.fetch`; what is in the cache with its size costs nothing, the rest as `transfer.download` says."""
        self.have(entries)

    def have(self, entries: Sequence[FileEntry], progress: Progress | None = None, *, check: bool = False) -> None:
        """As `fetch`.

        Args:
            entries: of the manifest.
            progress: is told bytes that arrived, and in all.
            check: read what is in the cache, too: somebody else may have brought it.
        """
        with self._lock:
            pending = [entry for entry in entries if check or entry.path not in self._settled]
            missing = [entry for entry in pending if not self._is_settled(entry, check=check)]
            if missing:
                self._refuse_offline(missing[0])
                transfer.download(self.repository, missing, self.root, max_workers=self._max_workers, progress=progress)
            self._settled.update(entry.path for entry in pending)

    def _is_settled(self, entry: FileEntry, *, check: bool) -> bool:
        """Whether a file need not be brought; one in the cache that is wrong is removed, if another can be had."""
        if self.repository.access.force_download and entry.path not in self._settled:
            return False
        try:
            place = layout.resolve(self.root, entry.path)
        except FileNotFoundError:
            return False
        is_right = transfer.difference(place, entry) is None if check else place.stat().st_size == entry.size
        if not is_right and not self.repository.access.is_offline:
            discard(place)
        return is_right

    def _refuse_offline(self, missing: FileEntry) -> None:
        if self.repository.access.is_offline:
            raise NotFetchedError(
                f"{self.where}: {missing.path} is not in the Hub's cache here, and the Hub may not be asked (offline); "
                f"fetch it with the Hub in reach: tallstore pull {self.repository.repo_id}"
            )
