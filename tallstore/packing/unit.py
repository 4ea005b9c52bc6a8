"""A unit of work: some tensors of a group, packed by whoever takes it, in this process or in another.

All that it needs goes with it, and all that comes of it comes back, but for two things: weights in files are read where
the unit is, and the payloads are written to a scratch file, which the group copies into its shards in their order. Both
must be on storage that every worker sees.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from tallstore.checkpoints import Checkpoint
from tallstore.errors import WorkerError
from tallstore.fit import Fit
from tallstore.format import manifest as tables
from tallstore.format.manifest import Payload, SharedDtype
from tallstore.format.shard_recorder import ShardRecorder, new_body
from tallstore.format.shard_writer import Recorded
from tallstore.loading.parallel import one_intra_op_thread
from tallstore.packing.plan import Expert, Part
from tallstore.packing.task_progress import Made, TaskProgress
from tallstore.packing.tensor_packer import TensorPacker

Entry = TypeVar("Entry", bound=msgspec.Struct)


@dataclass(frozen=True)
class UnitTensor:
    """One base tensor of a unit.

    Attributes:
        name: the base's.
        parts: what the experts made of it.
        fit, dtype: what codes it, and the dtype of its shared vectors.
    """

    name: str
    parts: tuple[Part, ...]
    fit: Fit
    dtype: SharedDtype


@dataclass(frozen=True)
class Unit:
    """What a worker is given; can be pickled where its checkpoints can.

    Attributes:
        base, given: of these tensors alone; see `TensorPacker`.
        experts: likewise, of every task.
        tensors: in their order.
        file: to write payloads to; what is added to its name makes it the worker's own.
        factors, estimates: see `TensorPacker`.
        compress: whether payloads are compressed where that makes them smaller.
    """

    base: Checkpoint
    given: Checkpoint | None
    experts: tuple[Expert, ...]
    tensors: tuple[UnitTensor, ...]
    file: Path
    factors: Mapping[tuple[str, str], float]
    estimates: bool
    compress: bool


@dataclass(frozen=True)
class UnitMade:
    """What came of a unit.

    Attributes:
        nbytes: of the experts' tensors that it was made of.
        file: with its payloads.
        tasks: by name, what was made of each, and its payloads in order; None stands for one that was taken back.
            Entries say where a payload is by its position there.
        vectors: the shared ones.
        recorded: their payloads, likewise.
        vector_nbytes: what they take, by base tensor.
    """

    nbytes: int
    file: Path
    tasks: Mapping[str, tuple[Made, tuple[Recorded | None, ...]]]
    vectors: tuple[tables.Vector, ...]
    recorded: tuple[Recorded | None, ...]
    vector_nbytes: Mapping[str, int]


def pack_unit(unit: Unit) -> UnitMade:
    """Do the work, in the calling thread alone.

    Raises:
        InputError: as `pack`.
        WorkerError: the directory of the scratch file is not there.
        OSError: the scratch file cannot be written.
    """
    # An executor that lost a worker may give its unit to another one, while the first still writes, or after.
    file = unit.file.with_name(f"{unit.file.name}-{uuid.uuid4().hex}")
    with torch.inference_mode(mode=False), one_intra_op_thread():
        try:
            body = new_body(file)
        except FileNotFoundError:
            raise WorkerError(
                f"executor: a worker does not see {file.parent}; write the bundle to storage that all workers share"
            ) from None
        writer = ShardRecorder(body, compress=unit.compress)
        recorders = {expert.task: ShardRecorder(body, compress=unit.compress) for expert in unit.experts}
        tasks = {expert.task: TaskProgress(expert=expert, writer=recorders[expert.task]) for expert in unit.experts}
        packer = TensorPacker(
            unit.base,
            tasks,
            writer,
            file.parent,
            factors=unit.factors,
            given=unit.given,
            estimates=unit.estimates,
            run=map,
        )
        for tensor in unit.tensors:
            packer.pack(tensor.name, tensor.parts, tensor.fit, tensor.dtype, lambda _nbytes: None)
        return UnitMade(
            nbytes=sum(part.spec.nbytes for tensor in unit.tensors for part in tensor.parts),
            file=file,
            tasks={name: (_plain(task), recorders[name].recorded) for name, task in tasks.items()},
            vectors=tuple(packer.vectors),
            recorded=writer.recorded,
            vector_nbytes=packer.vector_nbytes,
        )


def relocated(entry: Entry, placed: Sequence[Payload | None]) -> Entry:
    """The same entry of a table, each payload of it taken from *placed*."""
    changed: dict[str, object] = {}
    for name in entry.__struct_fields__:
        value = getattr(entry, name)
        if isinstance(value, Payload):
            changed[name] = placed[value.shard]
        elif isinstance(value, msgspec.Struct):
            changed[name] = relocated(value, placed)
    return msgspec.structs.replace(entry, **changed)


def _plain(task: TaskProgress) -> Made:
    """What was made, without the expert and the writer that it was made with."""
    return Made(entries=task.entries, whole=task.whole, coded=task.coded, sign=task.sign, signed=task.signed)
