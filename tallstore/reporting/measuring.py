"""What the report tells, from what the library tells: nothing is counted here."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tallstore.format.bundle_files import BundleFiles
from tallstore.inspecting.shared_vectors import VectorStatistics, measure_vectors, vectors_nbytes
from tallstore.inspecting.statistics import Statistics, measure_masks
from tallstore.inspecting.summary import BundleSummary, summarise
from tallstore.meter import Progress


@dataclass(frozen=True)
class Measured:
    """A bundle in numbers.

    Attributes:
        summary: what `inspect` shows.
        masks: what `Bundle.statistics` returns, of the tasks that can be read here; None where there is none.
        vectors: the shared vectors of those tasks' groups.
    """

    summary: BundleSummary
    masks: Statistics | None
    vectors: tuple[VectorStatistics, ...]

    @property
    def not_fetched(self) -> tuple[str, ...]:
        """Tasks whose files are not here."""
        return tuple(task.name for task in self.summary.tasks if not task.fetched)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Tasks that need a newer version of tallstore."""
        return tuple(task.name for task in self.summary.tasks if task.unreadable is not None)


def measure(path: Path, progress: Progress | None = None) -> Measured:
    """Measure the bundle at *path*.

    Args:
        path: its directory.
        progress: is told bytes done, and in all: of masks, then of shared vectors.

    Cost:
        reads every table, every mask and every shared vector once.

    Raises:
        BundleNotFoundError, FormatError, IntegrityError: as `summarise`, `measure_masks` and `measure_vectors`.
    """
    summary = summarise(path)
    here = [task for task in summary.tasks if task.fetched and task.unreadable is None]
    used = {task.group for task in here}
    groups = [group.id for group in summary.groups if group.id in used]
    with contextlib.closing(BundleFiles(path)) as files:
        first, second = _in_turn(progress, vectors_nbytes(files, groups))
        masks = measure_masks(files, [task.name for task in here], first) if here else None
        vectors = measure_vectors(files, groups, second)
    return Measured(summary, masks, vectors)


def _in_turn(progress: Progress | None, later: int) -> Sequence[Progress | None]:
    """What two pieces of work are to tell, so that *progress* hears of one: *later* bytes are the second's."""
    if progress is None:
        return None, None
    earlier = 0

    def first(done: int, total: int) -> None:
        nonlocal earlier
        earlier = total
        progress(done, total + later)

    def second(done: int, _total: int) -> None:
        progress(earlier + done, earlier + later)

    return first, second
