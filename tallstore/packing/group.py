"""One group of tasks in the bundle that is being written: its shards and those of its tasks, in one fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tallstore.checkpoints import Checkpoint
from tallstore.fit import Fit
from tallstore.format import layout
from tallstore.format.manifest import Payload, SharedDtype
from tallstore.format.shard_writer import Recorded, ShardWriter
from tallstore.packing.plan import Expert, Part
from tallstore.packing.stack_fit import Advance, Run
from tallstore.packing.task_progress import TaskProgress
from tallstore.packing.tensor_packer import TensorPacker
from tallstore.packing.unit import UnitMade, relocated


@dataclass(kw_only=True)
class GroupTask(TaskProgress):
    """One task of the group.

    Attributes:
        slug: of its directory.
        writer: of its shards.
    """

    slug: str
    writer: ShardWriter


class GroupPacker:
    """Writes one group, one base tensor after the other, packed here or elsewhere; holds no tensor between calls.

    Attributes:
        id: the group's.
        writer: of its shards.
        tasks: by name.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Expert],
        root: Path,
        *,
        factors: Mapping[tuple[str, str], float],
        given: Checkpoint | None,
        compress: bool,
        estimates: bool,
        run: Run,
        number: int = 1,
        taken: Iterable[str] = (),
    ) -> None:
        """Begin the group *number* in the bundle that is being written at *root*, an empty directory.

        *compress* says whether payloads are compressed where that makes them smaller, *taken* are the slugs of other
        tasks of the bundle; for the others, see `TensorPacker`.
        """
        self.id = layout.group_id(number)
        self.writer = ShardWriter(root / layout.group_directory(self.id), compress=compress)
        self.tasks: dict[str, GroupTask] = {}
        (root / layout.group_directory(self.id)).mkdir(parents=True)
        for expert, slug in _slugs(experts, number, taken):
            directory = root / layout.task_directory(slug)
            directory.mkdir(parents=True)
            self.tasks[expert.task] = GroupTask(
                expert=expert, slug=slug, writer=ShardWriter(directory, compress=compress)
            )
        self._packer = TensorPacker(
            base, self.tasks, self.writer, root, factors=factors, given=given, estimates=estimates, run=run
        )
        self.vectors, self.vector_nbytes = self._packer.vectors, self._packer.vector_nbytes

    def pack(self, base_name: str, parts: Sequence[Part], fit: Fit, dtype: SharedDtype, advance: Advance) -> None:
        """Pack one base tensor here; see `TensorPacker.pack`."""
        self._packer.pack(base_name, parts, fit, dtype, advance)

    def add(self, made: UnitMade) -> None:
        """Put in what was made elsewhere, and remove the file that it came in."""
        with made.file.open("rb") as file:
            for name, (task, recorded) in made.tasks.items():
                placed = _placed(self.tasks[name].writer, recorded, file)
                task.entries = {tensor: relocated(entry, placed) for tensor, entry in task.entries.items()}
                self.tasks[name].add(task)
            placed = _placed(self.writer, made.recorded, file)
            self.vectors.extend(relocated(vector, placed) for vector in made.vectors)
            self.vector_nbytes.update(made.vector_nbytes)
        made.file.unlink()


def _placed(writer: ShardWriter, recorded: Iterable[Recorded | None], file: BinaryIO) -> list[Payload | None]:
    return [None if one is None else writer.place(one, file) for one in recorded]


def _slugs(experts: Sequence[Expert], number: int, others: Iterable[str]) -> list[tuple[Expert, str]]:
    taken = set(others)
    pairs = []
    for expert in experts:
        slug = layout.slugify(expert.task, taken, number)
        taken.add(slug)
        pairs.append((expert, slug))
    return pairs
