"""How the float32 values of a shared vector become the codes that are stored, and what those codes stand for.

Rows are stored with a step each (I8, LOG4) or plainly (F32, BF16, F16). Every function works on whole rows or on a part
of one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.fit import select
from tallstore.format.encodings import LOG4_VALUES
from tallstore.format.manifest import SharedDtype
from tallstore.format.r13 import SMALLEST, r13

_LARGEST_CODE = {"I8": 127.0, "LOG4": 1.0}  # the largest value a code stands for, in steps
_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_LOG4 = np.array(LOG4_VALUES, np.float32)


def _log4_codes() -> NDArray[np.uint8]:
    """The log4 code of a ratio from 0 to 2, by the upper 16 bits below its sign.

    The nearer value is taken, the larger on a tie. Values have 8 significant bits, and the midpoints between them 9:
    8 exponent and 8 mantissa bits decide exactly.
    """
    ratios = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(15)).view(np.float32)
    ascending = np.array(LOG4_VALUES[::-1], np.float32)
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    return (len(LOG4_VALUES) - 1 - np.searchsorted(midpoints, ratios, side="right")).astype(np.uint8)


_LOG4_CODES = _log4_codes()


def steps(largest: Tensor, dtype: SharedDtype) -> NDArray[np.float32]:
    """The r13 step of each row.

    Args:
        largest: the largest magnitude of each row, float32 [rows].
        dtype: I8 or LOG4.
    """
    return r13(largest.numpy().astype(np.float64) / _LARGEST_CODE[dtype])


def quantise(merged: Tensor, step: Tensor | None, dtype: SharedDtype) -> Tensor:
    """Codes of *merged*, float32 [rows, length], with *step* float32 [rows, 1] for I8 and LOG4.

    Returns:
        uint8 [rows, length] of log4 codes, int8 codes, or the values themselves in the shared dtype. A row whose step
        is 0 has codes that stand for 0 whatever they are.
    """
    if step is None:
        kept = torch.from_numpy(np.greater_equal(merged.abs().numpy(), np.float32(SMALLEST)).view(np.uint8))
        # Adding +0.0 turns -0.0 into +0.0, also where a float16 underflowed: a shared zero has one encoding.
        return select(kept, merged).to(_TORCH[dtype]) + 0.0
    ratio = merged / step
    empty = step[:, 0] <= 0
    if empty.any():
        ratio[empty] = 0.0
    if dtype == "I8":
        return ratio.round_().clamp_(-127, 127).to(torch.int8)
    # Ratios are from 0 to 1 and a little: no index is out of range, and numpy need not look for one.
    return torch.from_numpy(_LOG4_CODES.take(ratio.numpy().view(np.uint32) >> np.uint32(15), mode="clip"))


def values(codes: Tensor, dtype: SharedDtype) -> Tensor:
    """What codes stand for, in steps: float32, of the shape of *codes*."""
    if dtype == "LOG4":
        return torch.from_numpy(_LOG4.take(codes.numpy(), mode="clip"))
    return codes.to(torch.float32)
