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
    CodedTensor,
    ExtendedTensor,
    GroupTable,
    Mask,
    Payload,
    PrivateTensor,
    Role,
    SameCode,
    ScaledCode,
    Signed,
    Sparse,
    TaskTable,
    Tensor,
    TwoLevel,
    Uniform,
    Vector,
    Whole,
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
        set_count: how many bits are set, for those of a sparse tensor; None for all others.
    """

    key: str
    payload: Payload
    encoding: Encoding
    numel: int
    set_count: int | None = None

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


@dataclass(frozen=True, slots=True)
class Coded:
    """A coded tensor, or the leading rows of an extended one.

    Attributes:
        name: the tensor's.
        base_name: of the tensor that it is coded over.
        code: how.
        shape: of what is coded.
    """

    name: str
    base_name: str
    code: ScaledCode
    shape: Shape

    @property
    def numel(self) -> int:
        """Coded elements."""
        return math.prod(self.shape)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The shared vectors that it takes its values from, whose steps its gains are multiplied by (TAB-5)."""
        if isinstance(self.code, Mask | Signed):
            return ("merged",)
        return ("merged", "merged_lo") if isinstance(self.code, TwoLevel) else ()


def coded_part(tensor: Tensor | Whole) -> Coded | None:
    """What of a tensor is coded: all of it, its leading rows, or nothing."""
    if isinstance(tensor, CodedTensor):
        return Coded(tensor.name, tensor.base_name, tensor, tensor.shape)
    if isinstance(tensor, ExtendedTensor) and not isinstance(tensor.leading, SameCode):
        return Coded(tensor.name, tensor.base_name, tensor.leading, leading_shape(tensor))
    return None


def sides_of(coded: Coded) -> Stored:
    """The bits or fields of what is coded."""
    code = coded.code
    if isinstance(code, Uniform):
        return Stored(f"fields/{coded.name}", code.fields, encodings.UNIFORM[code.levels], coded.numel)
    if isinstance(code, Signed):
        return Stored(f"fields/{coded.name}", code.fields, encodings.SIGNED, coded.numel)
    set_count = code.count if isinstance(code, Sparse) else None
    return Stored(f"bits/{coded.name}", code.bits, encodings.BITS, coded.numel, set_count)


def sparse_values_of(coded: Coded) -> Stored | None:
    """The values of a sparse tensor; None for other kinds, and where no bit is set."""
    code = coded.code
    if not isinstance(code, Sparse) or code.values is None:
        return None
    return Stored(f"values/{coded.name}", code.values, encodings.SHARED[code.values_dtype], code.count)


def gains_of(coded: Coded) -> Stored | None:
    """The gains by row of what is coded; None where it has one gain."""
    code = coded.code
    if code.gains is None:
        return None
    return Stored(f"gains/{coded.name}", code.gains, encodings.GAINS, row_count(coded.shape, code.row_axes))


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


def tensor_payloads(tensor: Tensor | Whole) -> Iterator[Stored]:
    """Every payload of one tensor of a task."""
    coded = coded_part(tensor)
    if coded is not None:
        yield sides_of(coded)
        yield from _present(gains_of(coded))
        yield from _present(sparse_values_of(coded))
    if isinstance(tensor, PrivateTensor):
        yield from _present(values_of(tensor))
    if isinstance(tensor, ExtendedTensor):
        yield from _present(further_of(tensor))


def _present(stored: Stored | None) -> Iterator[Stored]:
    if stored is not None:
        yield stored
