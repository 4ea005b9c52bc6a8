"""The files of a bundle, wherever it is: in a directory, or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from tallstore.errors import OptionError
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.shard_reader import Verify
from tallstore.hub.ids import HubId, parse_hub_id
from tallstore.hub.repository import Access, pin
from tallstore.hub.snapshot import Snapshot


def on_hub(source: str | os.PathLike[str]) -> HubId | None:
    """The id of a bundle on the Hub; None for a path: what is there always comes first."""
    hub_id = parse_hub_id(source) if isinstance(source, str) else None
    return None if hub_id is None or os.path.lexists(source) else hub_id


def open_files(
    source: str | os.PathLike[str],
    access: Access | None = None,
    revision: str | None = None,
    verify: Verify = "first-read",
) -> BundleFiles:
    """Open a bundle: its manifest, and nothing else.

    Args:
        source: a directory, or an id ``"org/name[@revision]"``.
        access: how the Hub is reached.
        revision: of an id that names none.
        verify: when the hash of a chunk is compared.

    Raises:
        BundleNotFoundError: there is none.
        OptionError: two revisions were given.
        FormatError: its manifest breaks a rule.
        HubError: the Hub refuses, or cannot be reached.
    """
    hub_id = on_hub(source)
    if hub_id is None:
        return BundleFiles(Path(source), verify)
    snapshot = open_snapshot(hub_id, access, revision)
    return BundleFiles(snapshot.root, verify, snapshot)


def open_snapshot(
    hub_id: HubId, access: Access | None = None, revision: str | None = None, max_workers: int = 8
) -> Snapshot:
    """Pin a repository to a commit, and have its manifest.

    Raises:
        TallstoreError: as `open_files`.
    """
    if revision is not None and hub_id.revision is not None and revision != hub_id.revision:
        raise OptionError(f"revision is {revision!r}, and {str(hub_id)!r} names another; give one of them")
    repository, root = pin(hub_id.repo_id, revision or hub_id.revision, access or Access())
    return Snapshot(repository, root, max_workers)
