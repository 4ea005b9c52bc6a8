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

# LOG4 by the bits of a float32, of which 23 are its fraction. An octave has two codes, and half an octave is 2^22: even
# codes stand for powers of two, and odd ones for 362/256 of one.
_HALF_OCTAVE = 22
_WHOLE = 127 << 23  # 1.0, code 0
_BETWEEN = (1 << _HALF_OCTAVE) - (106 << 15)  # by what an odd code is less than half way through its octave
# The midpoints of an octave are 309/256 and 437/256 of its power of two: half an octave apart, so that one sum brings
# both to where the upper bits change.
_TO_MIDPOINT = (1 << _HALF_OCTAVE) - (53 << 15)


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
    return _log4_codes(ratio)


def values(codes: Tensor, dtype: SharedDtype) -> Tensor:
    """What codes stand for, in steps: float32, of the shape of *codes*."""
    return _log4_values(codes) if dtype == "LOG4" else codes.to(torch.float32)


def _log4_codes(ratio: Tensor) -> Tensor:
    """The codes of the nearest values, of the larger ones on a tie: uint8. *ratio*, float32 from 0 to 2, is lost."""
    halves = ratio.view(torch.int32).add_(_TO_MIDPOINT).bitwise_right_shift_(_HALF_OCTAVE)
    return halves.neg_().add_(_WHOLE >> _HALF_OCTAVE).clamp_(0, len(LOG4_VALUES) - 1).to(torch.uint8)


def _log4_values(codes: Tensor) -> Tensor:
    """As `LOG4_VALUES` has them; arithmetic takes less than half the time of a look-up."""
    halves = codes.to(torch.int32).mul_(-1 << _HALF_OCTAVE)
    return halves.add_((codes & 1).to(torch.int32), alpha=-_BETWEEN).add_(_WHOLE).view(torch.float32)
