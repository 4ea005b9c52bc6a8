"""What one task of a bundle is made of, tensor by tensor. Decodes nothing, needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tallstore.format import layout
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import (
    AliasTensor,
    BasedTensor,
    CompanionFile,
    Estimate,
    ExtendedTensor,
    PrivateTensor,
    Tensor,
    Whole,
)
from tallstore.format.owners import Task
from tallstore.format.payloads import Shape, Stored, tensor_payloads
from tallstore.format.shard_reader import LocalFile, ShardReader
from tallstore.inspecting.summary import Tables, TaskSummary, kind_of, summarise_task


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a task.

    Attributes:
        name, kind: as in task.json.
        dtype, shape: of the expert's tensor; None for one that is tied to another, or that the expert does not have.
        base: the base tensor that it is rebuilt on; None where there is none.
        tied_to: the tensor that it is an alias of.
        rows: leading rows that are rebuilt on the base, of a tensor that was extended.
        gain: of its code; None where it has none, or one a row.
        nbytes: its payloads in the task's files, padding included; None where those are not here.
    """

    name: str
    kind: str
    dtype: str | None
    shape: Shape | None
    base: str | None
    tied_to: str | None
    rows: int | None
    gain: float | None
    nbytes: int | None


@dataclass(frozen=True)
class TaskDetails:
    """One task, tensor by tensor.

    Attributes:
        path: the bundle's directory.
        where: what to call it: the directory, or the id on the Hub and the commit.
        task: what the bundle's summary says of it.
        method: its group's.
        tensors: in the order of its table.
        files: its companions.
        estimates: what other fits would reach, by name.
    """

    path: Path
    where: str
    task: TaskSummary
    method: str
    tensors: tuple[TensorSummary, ...]
    files: tuple[CompanionFile, ...]
    estimates: Mapping[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """The details as plain JSON types."""
        return {
            "path": str(self.path),
            "where": self.where,
            "task": asdict(self.task),
            "method": self.method,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "files": [{"name": file.name, "sha256": file.sha256, "size": file.size} for file in self.files],
            "estimates": {
                name: {"cosine": estimate.cosine, "bits": estimate.bits} for name, estimate in self.estimates.items()
            },
        }


def describe_task(files: BundleFiles, name: str) -> TaskDetails:
    """What one task of a bundle is made of: reads its tables, and the headers and indexes of its shards that are here.

    Raises:
        UnknownTaskError: it has no task of that name.
        NotFetchedError: the task's table is not here.
        FormatError: a table or a shard's header is damaged or breaks a rule.
    """
    task = files.task(name)
    tables = Tables(files.root)
    group = next(group for group in files.manifest.groups if group.id == task.entry.group)
    stored = _stored_nbytes(files.root, task)
    return TaskDetails(
        path=files.root,
        where=files.where,
        task=summarise_task(tables, task.entry, task.table, fetched=files.is_fetched(name)),
        method=group.method.name,
        tensors=tuple(_summarise_tensor(tensor, stored[tensor.name]) for tensor in task.table.tensors),
        files=task.table.files,
        estimates=task.table.fidelity.estimates,
    )


def _summarise_tensor(tensor: Tensor, nbytes: int | None) -> TensorSummary:
    code = tensor.leading if isinstance(tensor, ExtendedTensor) else tensor
    return TensorSummary(
        name=tensor.name,
        kind=kind_of(tensor),
        dtype=tensor.dtype if isinstance(tensor, Whole) else None,
        shape=tensor.shape if isinstance(tensor, Whole) else None,
        base=_base_of(tensor),
        tied_to=tensor.of if isinstance(tensor, AliasTensor) else None,
        rows=tensor.rows if isinstance(tensor, ExtendedTensor) else None,
        gain=getattr(code, "gain", None),
        nbytes=nbytes,
    )


def _base_of(tensor: Tensor) -> str | None:
    """The base tensor that a tensor is rebuilt on, or that one which is stored whole descends from by another name."""
    if isinstance(tensor, BasedTensor):
        return tensor.base_name
    return tensor.base if isinstance(tensor, PrivateTensor) else None


def _stored_nbytes(root: Path, task: Task) -> dict[str, int | None]:
    """Bytes of each tensor's payloads in the task's shards; None where one of its shards is not here."""
    shards = [_payload_sizes(root, task, number) for number in range(len(task.shards))]
    found: dict[str, int | None] = {}
    for tensor in task.table.tensors:
        sizes = [_payload_nbytes(stored, shards[stored.payload.shard]) for stored in tensor_payloads(tensor)]
        known = [size for size in sizes if size is not None]
        found[tensor.name] = sum(known) if len(known) == len(sizes) else None
    return found


def _payload_sizes(root: Path, task: Task, number: int) -> Mapping[str, int] | None:
    """Bytes of every payload of a shard by key; None where it is not here."""
    shard = task.shards[number]
    path = f"{task.directory}/{shard.file}"
    try:
        file = LocalFile(layout.resolve(root, path), path)
    except FileNotFoundError:
        return None
    try:
        tensors = ShardReader(file, shard).header.tensors
    finally:
        file.close()
    return {key: entry.stop - entry.start for key, entry in tensors.items()}


def _payload_nbytes(stored: Stored, sizes: Mapping[str, int] | None) -> int | None:
    if sizes is None:
        return None
    if stored.payload.codec == "pooled":
        return stored.encoding.nbytes(stored.numel)  # as it is before the whole pool is compressed
    return sizes.get(stored.key)
