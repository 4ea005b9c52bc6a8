"""The files of a bundle, wherever it is: in a directory, or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from tallstore.format.bundle_files import BundleFiles
from tallstore.format.shard_reader import Verify
from tallstore.hub.ids import on_hub
from tallstore.hub.pinned import Access
from tallstore.hub.snapshot import open_snapshot


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
