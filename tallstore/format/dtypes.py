"""Data types and sizes of tensors, without torch.

Data types carry safetensors' names. A chunk is `CHUNK_NUMEL` elements of one tensor in flat row-major order: the unit
in which payloads are stored and hashed, and in which inputs are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, TypeGuard

Dtype: TypeAlias = Literal[
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "F64", "I64", "U64", "C64",
]  # fmt: skip
"""The name of a data type that a bundle can hold."""

_NBYTES: Final[dict[Dtype, int]] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}
DTYPES: Final[Mapping[Dtype, int]] = MappingProxyType(_NBYTES)
"""Name of every data type that a bundle can hold -> bytes an element."""

CODED: Final = frozenset({"F16", "BF16", "F32", "F64"})
"""The data types that masks and fields are coded for; tensors of the others are stored whole."""

CHUNK_NUMEL: Final = 2**20
"""Elements of a chunk; a tensor's last chunk may be shorter."""


def itemsize(dtype: Dtype) -> int:
    """Bytes an element of *dtype*; KeyError for a name that is not in `DTYPES`."""
    return DTYPES[dtype]


def is_dtype(name: str) -> TypeGuard[Dtype]:
    """Whether *name* is in `DTYPES`."""
    return name in DTYPES


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before its bytes are read.

    Attributes:
        dtype: a name in `DTYPES`.
        shape: empty for a tensor of 0 dimensions, which has one element.
    """

    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the elements."""
        return self.numel * DTYPES[self.dtype]


def chunk_count(numel: int) -> int:
    """Chunks of a tensor of *numel* elements; 0 for an empty one."""
    return -(-numel // CHUNK_NUMEL)


def chunk_spans(numel: int) -> Iterator[tuple[int, int]]:
    """`chunk_span` of each chunk of a tensor of *numel* elements, in order."""
    return (chunk_span(numel, index) for index in range(chunk_count(numel)))


def chunk_span(numel: int, index: int) -> tuple[int, int]:
    """First element of chunk *index* of a tensor of *numel* elements, and the first one after it.

    Raises:
        IndexError: there is no chunk of that index.
    """
    if not 0 <= index < chunk_count(numel):
        raise IndexError(f"chunk {index} of a tensor of {numel} elements")
    start = index * CHUNK_NUMEL
    return start, min(start + CHUNK_NUMEL, numel)
