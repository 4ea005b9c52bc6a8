"""Ids of the Hub as users write them."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

_HUB_ID: Final = re.compile(r"(?P<repo_id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_SHA: Final = re.compile(r"[0-9a-f]{40}")
_SHORT: Final = 12


class HubId(NamedTuple):
    """A repository, and its revision where one was given."""

    repo_id: str
    revision: str | None

    def __str__(self) -> str:
        return shown(self.repo_id, self.revision)


def match_hub_id(text: str) -> re.Match[str] | None:
    """Match ``org/name`` or ``org/name@revision``, in groups `repo_id` and `revision`; says nothing of existence."""
    return _HUB_ID.fullmatch(text)


def parse_hub_id(text: str) -> HubId | None:
    """What ``org/name`` or ``org/name@revision`` names; None where *text* is neither."""
    found = match_hub_id(text)
    return None if found is None else HubId(found["repo_id"], found["revision"])


def on_hub(source: str | os.PathLike[str]) -> HubId | None:
    """The id of a bundle on the Hub; None for a path: what is there always comes first."""
    hub_id = parse_hub_id(source) if isinstance(source, str) else None
    return None if hub_id is None or os.path.lexists(source) else hub_id


def is_sha(revision: str) -> bool:
    """Whether a revision is the full sha of a commit, which never stands for another one."""
    return _SHA.fullmatch(revision) is not None


def shown(repo_id: str, revision: str | None) -> str:
    """A repository at a revision as messages call it: ``org/name@revision``, the sha of a commit shortened."""
    if revision is None:
        return repo_id
    return f"{repo_id}@{revision[:_SHORT] if is_sha(revision) else revision}"
