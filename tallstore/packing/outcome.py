"""What `pack` reports: sizes, fidelity a task, and every tensor that was stored whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from tallstore.checkpoints import Checkpoint
from tallstore.fit import Method
from tallstore.format import layout
from tallstore.format.manifest import Estimate, Manifest, TaskTable
from tallstore.inspecting.cost import Costs, coded_numel
from tallstore.notebook import MAX_ROWS, html_table, number
from tallstore.packing.group import GroupTask
from tallstore.packing.task_progress import StoredWhole
from tallstore.sizes import readable

#: What was done: a new bundle packed, tasks added to one, or tasks of it packed again.
Action = Literal["pack", "add", "repack"]
_PAST: Final = {"pack": "packed", "add": "added", "repack": "repacked"}


@dataclass(frozen=True)
class PackedTask:
    """One task as it was packed.

    Attributes:
        name, slug: the task.
        checkpoint_nbytes: its tensors in a plain checkpoint.
        nbytes: its files in the bundle, companions not counted.
        coded_numel: elements that were to be coded: not those of what equals the base, or is whole by nature.
        bits: one of them costs (see `tallstore.inspecting.cost`); None where there is none.
        cosine, gain: of the reconstruction, after the final rounding, over the coded tensors.
        mask_lambda: what `evaluate` chose; None where there was nothing to choose.
        score: what `evaluate` gave, on weights as a reader gets them.
        estimates: what other fits would reach, by name.
        whole: every tensor that was stored whole, and the further rows of resized ones.
    """

    name: str
    slug: str
    checkpoint_nbytes: int
    nbytes: int
    coded_numel: int
    bits: float | None
    cosine: float | None
    gain: float | None
    mask_lambda: float | None
    score: float | None
    estimates: Mapping[str, Estimate]
    whole: tuple[StoredWhole, ...]


@dataclass(frozen=True)
class PackReport:
    """What `pack`, `add` or `repack` wrote, or with `dry_run` would have written.

    Attributes:
        path: the bundle.
        dry_run: nothing was written there.
        method: its name and parameters.
        merged_dtype: of the shared vectors.
        tasks: in the order given.
        base_nbytes: the base's tensors in a plain checkpoint.
        shared_nbytes: files of the shared vectors.
        bundle_nbytes: all files of the bundle, those of other groups and of tasks that are not here included.
        written_nbytes: the files that are new in it; all files of a new bundle.
        advice: one-line hints, such as a method that would be smaller and truer, or that predictions probably change.
        action: whether this is a new bundle, or which change of one.
    """

    path: Path
    dry_run: bool
    method: str
    merged_dtype: str
    tasks: tuple[PackedTask, ...]
    base_nbytes: int
    shared_nbytes: int
    bundle_nbytes: int
    written_nbytes: int
    advice: tuple[str, ...]
    action: Action = "pack"

    @property
    def checkpoints_nbytes(self) -> int:
        """The experts as plain checkpoints."""
        return sum(task.checkpoint_nbytes for task in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        plain = asdict(self) | {"path": str(self.path), "checkpoints_nbytes": self.checkpoints_nbytes}
        for task, packed in zip(plain["tasks"], self.tasks, strict=True):
            task["estimates"] = {
                name: {"cosine": estimate.cosine, "bits": estimate.bits} for name, estimate in packed.estimates.items()
            }
        return plain

    def __repr__(self) -> str:
        return f"<PackReport {str(self.path)!r}: {self._sum()}>"

    def __str__(self) -> str:
        """A few lines for people: all in all, a line a task for the first of them, advice."""
        lines = [self._sum()]
        for task in self.tasks[:MAX_ROWS]:
            measured = "nothing coded" if task.cosine is None else f"cosine {task.cosine:.4f}, gain {task.gain:.4f}"
            bits = "" if task.bits is None else f", {task.bits:.2f} bits a parameter"
            lines.append(f"  {task.name}: {readable(task.nbytes)}, {measured}{bits}, {len(task.whole)} tensors whole")
        return "\n".join([*lines, *(f"  {more}" for more in self._more()), *self.advice])

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        has_scores = any(task.score is not None for task in self.tasks)
        headings = ("task", "size", "bits", "cosine", "gain", "tensors whole", *(["score"] if has_scores else []))
        rows = [
            (
                task.name,
                readable(task.nbytes),
                number(task.bits, 2),
                number(task.cosine, 4),
                number(task.gain, 4),
                str(len(task.whole)),
                *([number(task.score, 4)] if has_scores else []),
            )
            for task in self.tasks[:MAX_ROWS]
        ]
        return html_table([self._sum()], headings, rows, [*self._more(), *self.advice])

    def _sum(self) -> str:
        verb = f"would {self.action}" if self.dry_run else _PAST[self.action]
        ratio = self.checkpoints_nbytes / max(1, self.written_nbytes)
        first = f"{verb} {len(self.tasks)} tasks with {self.method}: {readable(self.checkpoints_nbytes)} of checkpoints"
        whole = "" if self.action == "pack" else f"; the bundle has {readable(self.bundle_nbytes)}"
        return f"{first} in {readable(self.written_nbytes)} ({ratio:.1f} times smaller){whole}"

    def _more(self) -> list[str]:
        count = len(self.tasks) - MAX_ROWS
        return [f"and {count} more in report.tasks"] if count > 0 else []


def report(
    base: Checkpoint,
    root: Path,
    manifest: Manifest,
    packed: Sequence[tuple[GroupTask, TaskTable]],
    *,
    method: Method,
    dtype: str,
) -> PackReport:
    """Sum up what was written.

    Args:
        base: what was packed.
        root: the bundle's directory.
        manifest: the bundle's.
        packed: for each task, what was written of it.
        method: how it was fitted.
        dtype: of the shared vectors.
    """
    sizes = _sizes(root, manifest)
    shared_nbytes = sum(size for directory, size in sizes.items() if directory.startswith("groups/"))
    costs = Costs(manifest)
    tasks = tuple(
        PackedTask(
            name=table.name,
            slug=table.slug,
            checkpoint_nbytes=_nbytes(task.expert.checkpoint),
            nbytes=sizes[layout.task_directory(table.slug)],
            coded_numel=coded_numel(table),
            bits=costs.bits(table),
            cosine=table.fidelity.cosine,
            gain=table.fidelity.gain,
            mask_lambda=_number(table.chosen.get("mask_lambda")),
            score=table.fidelity.score,
            estimates=table.fidelity.estimates,
            whole=tuple(task.whole),
        )
        for task, table in packed
    )
    return PackReport(
        path=Path(),
        dry_run=False,
        method=_call(method),
        merged_dtype=dtype,
        tasks=tasks,
        base_nbytes=_nbytes(base),
        shared_nbytes=shared_nbytes,
        bundle_nbytes=sum(sizes.values()),
        written_nbytes=sum(sizes.values()),
        advice=(),
    )


def _call(method: Method) -> str:
    """The method as it is called, but for the tensors it was given."""
    given = ", ".join(f"{name}={value!r}" for name, value in method.parameters.items())
    return f"{type(method).__name__}({given})"


def with_scores(report: PackReport, root: Path, manifest: Manifest, scores: Mapping[str, float]) -> PackReport:
    """The report once the user's scores are in the bundle too."""
    sizes = _sizes(root, manifest)
    tasks = tuple(
        replace(task, score=scores[task.name], nbytes=sizes[layout.task_directory(task.slug)]) for task in report.tasks
    )
    nbytes = sum(sizes.values())
    return replace(report, tasks=tasks, bundle_nbytes=nbytes, written_nbytes=nbytes)


def _sizes(root: Path, manifest: Manifest) -> Counter[str]:
    """Bytes of a bundle's files by directory, "" for those of no directory."""
    sizes = Counter({"": (root / layout.MANIFEST).stat().st_size})
    for file in manifest.files:
        sizes[file.path.rpartition("/")[0]] += file.size
    return sizes


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.spec(name).nbytes for name in checkpoint.names if name not in checkpoint.aliases)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
