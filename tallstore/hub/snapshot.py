"""The files of a bundle on the Hub as its client's cache has them: one commit's, brought when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tallstore import forking
from tallstore.errors import NotFetchedError, OptionError
from tallstore.format import layout
from tallstore.format.manifest import FileEntry
from tallstore.hub import transfer
from tallstore.hub.ids import HubId, on_hub
from tallstore.hub.leftovers import remove_leftovers
from tallstore.hub.pinned import Access, PinnedRepository, discard, in_cache, pin
from tallstore.meter import Progress

if TYPE_CHECKING:
    from tallstore.hub.ranges import RemoteShard


class Snapshot:
    """A commit's files in the cache; the `Source` of a bundle that was opened by its id.

    Attributes:
        repository: at that commit.
        root: the snapshot's directory, which has the manifest.
        where: what messages call the bundle.
        opened_as: its id, and the commit.
    """

    def __init__(self, repository: PinnedRepository, root: Path, max_workers: int = transfer.MAX_WORKERS) -> None:
        self.repository, self.root, self.where = repository, root, repository.where
        self.opened_as = repository.repo_id, repository.sha
        self.max_workers = max_workers
        self._settled: set[str] = set()
        self._lock = forking.lock()

    def fetch(self, entries: Sequence[FileEntry]) -> None:
        """As `Source.fetch`; what is in the cache with its size costs nothing, the rest as `transfer.download` says."""
        self.have(entries)

    def is_better_read_there(self, entry: FileEntry, nbytes: int) -> bool:
        """As `Source.is_better_read_there`."""
        from tallstore.hub import ranges  # noqa: PLC0415 - numpy, which `inspect` does without

        access = self.repository.access
        return not access.is_offline and not access.force_download and ranges.is_worth_it(entry, nbytes)

    def read_there(self, entry: FileEntry, tell: Callable[[int], object]) -> RemoteShard:
        """As `Source.read_there`."""
        from tallstore.hub import ranges  # noqa: PLC0415

        return ranges.RemoteShard(self.repository, entry, tell)

    def have(self, entries: Sequence[FileEntry], progress: Progress | None = None, *, check: bool = False) -> None:
        """As `fetch`.

        Args:
            entries: of the manifest.
            progress: is told bytes that arrived, and in all.
            check: read what is in the cache, too: somebody else may have brought it.
        """
        with self._lock, in_cache(self.where):
            pending = [entry for entry in entries if check or entry.path not in self._settled]
            missing = [entry for entry in pending if not self._is_settled(entry, check=check)]
            if missing:
                self._refuse_offline(missing[0])
                transfer.download(self.repository, missing, self.root, max_workers=self.max_workers, progress=progress)
            self._settled.update(entry.path for entry in pending)

    def _is_settled(self, entry: FileEntry, *, check: bool) -> bool:
        """Whether a file need not be brought; one in the cache that is wrong is removed, if another can be had."""
        if self.repository.access.force_download and entry.path not in self._settled:
            return False
        try:
            place = layout.resolve(self.root, entry.path)
        except FileNotFoundError:
            return False
        with layout.readable(entry.path):
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


def find(source: str, access: Access | None = None) -> tuple[Path, str | None]:
    """The directory of a bundle, and, if *source* is an id on the Hub, what to call it; it has the manifest at least.

    Raises:
        TallstoreError: as `pin`.
    """
    hub_id = on_hub(source)
    if hub_id is None:
        return Path(source), None
    snapshot = open_snapshot(hub_id, access)
    return snapshot.root, snapshot.where


def open_snapshot(
    hub_id: HubId, access: Access | None = None, revision: str | None = None, max_workers: int = transfer.MAX_WORKERS
) -> Snapshot:
    """Pin a repository to a commit, and have its manifest; what killed downloads left of it in the cache is removed.

    Args:
        hub_id: the repository's.
        access: how the Hub is reached.
        revision: of an id that names none.
        max_workers: how many files are downloaded at a time.

    Raises:
        OptionError: two revisions were given.
        OutputError: the cache cannot be read or written.
        TallstoreError: as `pin`.
    """
    if revision is not None and hub_id.revision is not None and revision != hub_id.revision:
        raise OptionError(f"revision is {revision!r}, and {str(hub_id)!r} names another; give one of them")
    with in_cache(str(hub_id)):
        repository, root = pin(hub_id.repo_id, revision or hub_id.revision, access or Access())
        remove_leftovers(root)
    return Snapshot(repository, root, max_workers)
