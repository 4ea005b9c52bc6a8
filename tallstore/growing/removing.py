"""`remove`: tasks out of a bundle, with what only they had."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tallstore.errors import OptionError
from tallstore.format import layout
from tallstore.growing.change import changing, trying
from tallstore.growing.manifests import after_change, lost_companions
from tallstore.sizes import readable, several


@dataclass(frozen=True)
class RemoveReport:
    """What `remove` took out, or with `dry_run` would have taken out.

    Attributes:
        path: the bundle.
        tasks: their names.
        groups: ids of the groups that went with their last task, and of which the shared vectors are gone.
        nbytes: of the files that were deleted.
        dry_run: nothing was removed.
    """

    path: Path
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    nbytes: int
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self) | {"path": str(self.path), "tasks": list(self.tasks), "groups": list(self.groups)}

    def __str__(self) -> str:
        shared = f", and what only they shared ({', '.join(self.groups)})" if self.groups else ""
        tasks = several(len(self.tasks), "task")
        verb, freed = ("would remove", "to be freed") if self.dry_run else ("removed", "freed")
        return f"{verb} {tasks}{shared}: {readable(self.nbytes)} {freed}"


def remove(bundle: str | os.PathLike[str], tasks: Sequence[str], *, dry_run: bool = False) -> RemoveReport:
    """Remove tasks from a bundle, and what no other task needs: shared vectors with their last task, companion files.

    No other file is touched. The bundle changes in one step: on an error, and after a crash, it is as it was, or
    changed. A reader that has it open reads on the tasks that stay; of those that are gone it raises
    `BundleChangedError`. A partial bundle may be changed too; where not all tasks are fetched, companion files stay
    that they might need.

    Args:
        bundle: its directory.
        tasks: their names.
        dry_run: only say what would go.

    Returns:
        what was removed.

    Raises:
        UnknownTaskError: the bundle has no such task; nothing was removed.
        OptionError: no task would be left.
        BundleNotFoundError: there is no bundle at that path.
        FormatError: the bundle's manifest, or a table of a task that stays, breaks a rule.
        OutputError: the bundle cannot be changed: it is on the Hub or in its cache, another process is writing to it,
            or the system refuses.
    """
    if isinstance(tasks, str):
        raise OptionError(f"tasks is {tasks!r}; give a list of names")
    with trying(bundle) if dry_run else changing(bundle) as change:
        before = change.manifest
        entries = [change.bundle.entry(name) for name in dict.fromkeys(tasks)]
        gone = {entry.name for entry in entries}
        if not entries:
            return RemoveReport(Path(bundle), (), (), 0, dry_run)
        if len(gone) == len(before.tasks):
            raise OptionError(f"{bundle}: no task would be left; delete the directory instead")
        after = after_change(before, gone, None, lost_companions(change.bundle, gone))
        kept = {file.path for file in after.files}
        freed = [file.size for file in before.files if file.path not in kept and layout.is_here(change.root, file.path)]
        change.commit(after)
    remaining = {group.id for group in after.groups}
    groups = tuple(group.id for group in before.groups if group.id not in remaining)
    return RemoveReport(Path(bundle), tuple(entry.name for entry in entries), groups, sum(freed), dry_run)
