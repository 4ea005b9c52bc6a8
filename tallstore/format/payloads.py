"""What the tables of a bundle refer to: each payload, its key in its shard, and what its bytes must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tallstore.format import encodings
from tallstore.format.dtypes import chunk_count
from tallstore.format.encodings import Encoding
from tallstore.format.manifest import (
    BaseTable,
    BaseTensor,
    ExtendedTensor,
    GroupTable,
    MaskCode,
    MaskTensor,
    Payload,
    PrivateTensor,
    Role,
    SameCode,
    ScaledCode,
    SignedTensor,
    TaskTable,
    Tensor,
    Vector,
)

Shape = tuple[int, ...]
#: The tensors of a base table by name, and the vectors of a group table by tensor and role.
BaseTensors = Mapping[str, BaseTensor]
Vectors = Mapping[tuple[str, Role], Vector]


def base_tensors(table: BaseTable) -> BaseTensors:
    """The tensors of a base table by name."""
    return {tensor.name: tensor for tensor in table.tensors}


def group_vectors(table: GroupTable) -> Vectors:
    """The vectors of a group table by tensor and role."""
    return {(vector.tensor, vector.role): vector for vector in table.vectors}


@dataclass(frozen=True, slots=True)
class Stored:
    """A payload that a table refers to.

    Attributes:
        key: its name in its shard.
        payload: where it is.
        encoding: what its bytes mean.
        numel: how many elements it has.
    """

    key: str
    payload: Payload
    encoding: Encoding
    numel: int

    @property
    def records(self) -> int:
        """Records that it takes of its shard's index."""
        return 0 if self.payload.codec == "pooled" else chunk_count(self.numel)


def row_count(shape: Shape, row_axes: int) -> int:
    """Rows of a tensor (REC-7): one for 0 or 1 dimensions, else the indices of its first *row_axes* ones."""
    return 1 if len(shape) <= 1 else math.prod(shape[:row_axes])


def leading_shape(tensor: ExtendedTensor) -> Shape:
    """Shape of an extended tensor's leading rows."""
    return (tensor.rows, *tensor.shape[1:])


def sides_of(name: str, code: ScaledCode, shape: Shape) -> Stored:
    """The bits or fields of a coded tensor, or of the leading rows of an extended one."""
    if isinstance(code, MaskCode | MaskTensor):
        return Stored(f"bits/{name}", code.bits, encodings.BITS, math.prod(shape))
    return Stored(f"fields/{name}", code.fields, encodings.SIGNED, math.prod(shape))


def gains_of(name: str, code: ScaledCode, shape: Shape) -> Stored | None:
    """The gains by row of a coded tensor; None where it has one gain."""
    if code.gains is None:
        return None
    return Stored(f"gains/{name}", code.gains, encodings.GAINS, row_count(shape, code.row_axes))


def values_of(tensor: PrivateTensor) -> Stored | None:
    """The elements of a private tensor; None where it has none."""
    if tensor.values is None:
        return None
    return Stored(f"values/{tensor.name}", tensor.values, encodings.WHOLE[tensor.dtype], math.prod(tensor.shape))


def further_of(tensor: ExtendedTensor) -> Stored | None:
    """The further rows of an extended tensor; None where it has none."""
    if tensor.further is None:
        return None
    numel = math.prod(tensor.shape) - math.prod(leading_shape(tensor))
    return Stored(f"further/{tensor.name}", tensor.further, encodings.WHOLE[tensor.dtype], numel)


def vector_values_of(vector: Vector, shape: Shape) -> Stored:
    """The values of a shared vector for a base tensor of *shape*."""
    encoding = encodings.SHARED[vector.dtype]
    return Stored(f"{vector.role}/{vector.tensor}", vector.values, encoding, math.prod(shape))


def vector_step_of(vector: Vector, shape: Shape) -> Stored | None:
    """The steps of a shared vector; None where it has none."""
    if vector.step is None:
        return None
    rows = row_count(shape, vector.row_axes)
    return Stored(f"{vector.role}.step/{vector.tensor}", vector.step, encodings.STEPS, rows)


def group_payloads(table: GroupTable, base: BaseTensors) -> Iterator[Stored]:
    """Every payload of a group; vectors of tensors that the base does not have are left out."""
    for vector in table.vectors:
        tensor = base.get(vector.tensor)
        if tensor is not None:
            yield vector_values_of(vector, tensor.shape)
            yield from _present(vector_step_of(vector, tensor.shape))


def task_payloads(table: TaskTable) -> Iterator[Stored]:
    """Every payload of a task."""
    for tensor in table.tensors:
        yield from tensor_payloads(tensor)


def tensor_payloads(tensor: Tensor) -> Iterator[Stored]:
    """Every payload of one tensor of a task."""
    match tensor:
        case MaskTensor() | SignedTensor():
            yield from _code_payloads(tensor.name, tensor, tensor.shape)
        case PrivateTensor():
            yield from _present(values_of(tensor))
        case ExtendedTensor():
            if not isinstance(tensor.leading, SameCode):
                yield from _code_payloads(tensor.name, tensor.leading, leading_shape(tensor))
            yield from _present(further_of(tensor))


def _code_payloads(name: str, code: ScaledCode, shape: Shape) -> Iterator[Stored]:
    yield sides_of(name, code, shape)
    yield from _present(gains_of(name, code, shape))


def _present(stored: Stored | None) -> Iterator[Stored]:
    if stored is not None:
        yield stored
