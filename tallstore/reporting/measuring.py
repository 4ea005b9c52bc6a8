"""What the report tells, from what the library tells: nothing is counted here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    def name(self) -> str:
        """What to call the bundle: its directory's name, or its id on the Hub and the commit."""
        summary = self.summary
        return summary.path.resolve().name if summary.where == str(summary.path) else summary.where

    @property
    def not_fetched(self) -> tuple[str, ...]:
        """Tasks whose files are not here."""
        return tuple(task.name for task in self.summary.tasks if not task.fetched)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Tasks that need a newer version of tallstore."""
        return tuple(task.name for task in self.summary.tasks if task.unreadable is not None)


def measure(files: BundleFiles, progress: Progress | None = None) -> Measured:
    """Measure a bundle, as far as its files are here.

    Args:
        files: its files.
        progress: is told bytes done, and in all: of masks, then of shared vectors.

    Cost:
        reads every table, every mask and every shared vector once.

    Raises:
        FormatError, IntegrityError: as `summarise`, `measure_masks` and `measure_vectors`.
    """
    summary = summarise(files.root, files.where if files.brings else None)
    here = [task for task in summary.tasks if task.fetched and task.unreadable is None]
    used = {task.group for task in here}
    groups = [group.id for group in summary.groups if group.id in used]
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
