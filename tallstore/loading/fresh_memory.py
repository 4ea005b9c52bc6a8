"""Memory for tensors that are made together: a few large allocations instead of many small ones.

For whoever fills new memory, most of the time goes into the system's pages, which it clears one by one. numpy asks for
large pages for arrays of 4 MiB and more, where the system has them (Linux; NUMPY_MADVISE_HUGEPAGE=0 turns that off).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

#: What a tensor is to be: its shape and dtype.
Wanted: TypeAlias = tuple[tuple[int, ...], torch.dtype]

_ALIGNMENT: Final = 64
#: Tensors of one allocation give their memory back together, when the last of them goes: it is a small part of a model.
_SHARED_NBYTES: Final = 64 << 20
_LARGE_NBYTES: Final = 4 << 20


def fresh(wanted: Iterable[Wanted]) -> Iterator[Tensor]:
    """A new tensor for each, contiguous, on the CPU, of any content, with a storage of its own.

    Memory is allocated as the iteration goes on, for up to 64 MiB of tensors at a time.
    """
    together: list[Wanted] = []
    nbytes = 0
    for one in wanted:
        size = _padded_nbytes(one)
        if together and nbytes + size > _SHARED_NBYTES:
            yield from _allocated(together, nbytes)
            together, nbytes = [], 0
        together.append(one)
        nbytes += size
    yield from _allocated(together, nbytes)


def _allocated(wanted: Sequence[Wanted], nbytes: int) -> Iterator[Tensor]:
    """Tensors of *nbytes*, in one allocation if it is a large one."""
    if nbytes < _LARGE_NBYTES:
        yield from (torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in wanted)
        return
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    place = -memory.ctypes.data % _ALIGNMENT
    for shape, dtype in wanted:
        count = math.prod(shape)
        if count:
            yield torch.frombuffer(memory, dtype=dtype, count=count, offset=place).view(shape)
        else:
            yield torch.empty(shape, dtype=dtype, device="cpu")
        place += _padded_nbytes((shape, dtype))


def _padded_nbytes(wanted: Wanted) -> int:
    shape, dtype = wanted
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
