"""Memory for tensors that are made together: a few large allocations instead of many small ones.

For whoever fills new memory, most of the time goes into the system's pages, which it clears one by one. numpy asks for
large pages for arrays of 4 MiB and more, where the system has them (Linux; NUMPY_MADVISE_HUGEPAGE=0 turns that off).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tallstore.errors import TooLargeError
from tallstore.sizes import readable

#: What a tensor is to be: its shape and dtype.
Wanted: TypeAlias = tuple[tuple[int, ...], torch.dtype]

_ALIGNMENT: Final = 64
#: Tensors of one allocation give their memory back together, when the last of them goes: it is a small part of a model.
_SHARED_NBYTES: Final = 64 << 20
_LARGE_NBYTES: Final = 4 << 20


def refuse_too_large(nbytes: int, where: str) -> None:
    """Refuse what no memory of this machine can hold, whoever says that it is that large: nothing was allocated yet.

    Raises:
        TooLargeError: it is larger than all of the memory.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return
    if nbytes > total > 0:
        raise TooLargeError(
            f"{where}: {readable(nbytes)} are needed, and this machine has {readable(total)} of memory; "
            "take the tensors one by one, or export them"
        )


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
