"""What the decoded bytes of a payload mean, and which bytes are no valid encoding of anything.

An encoding says how many bits an element takes and which content rules hold; `codecs` says how those bytes are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tallstore.errors import FormatError
from tallstore.format import bits
from tallstore.format.bits import Bytes
from tallstore.format.dtypes import CODED, DTYPES
from tallstore.format.manifest import Levels
from tallstore.format.r13 import SMALLEST, is_r13

# Code k of log4 stands for 2^(-k/2); 181/256 replaces the square root of 1/2, so that 8 significant bits hold every
# value.
LOG4_VALUES: tuple[float, ...] = tuple(
    2.0 ** -(k // 2) if k % 2 == 0 else 181 / 256 * 2.0 ** -((k - 1) // 2) for k in range(16)
)
SIGNED_VALUES: tuple[int, ...] = (0, 1, -1, 0)  # absent, plus, minus; code 3 is refused before it is looked up
SIGN_VALUES: tuple[float, ...] = (-1.0, 1.0)
#: What the codes of uniform fields stand for, by their levels; those of no level are refused likewise.
UNIFORM_VALUES: Final[dict[Levels, tuple[float, ...]]] = {
    3: (-1.0, 0.0, 1.0, 0.0),
    4: tuple(code - 1.5 for code in range(4)),
    8: tuple(code - 3.5 if code < 8 else 0.0 for code in range(16)),
    16: tuple(code - 7.5 for code in range(16)),
}

Check = Callable[[Bytes, int, str], None]  # decoded chunk, its element count, the place to name


@dataclass(frozen=True)
class Encoding:
    """One way to write elements as bytes.

    Attributes:
        name: what the specification calls it.
        width: bits an element.
        is_float: whether byte planes may be split (`planes-zstd`).
        check: raises FormatError for bytes that are no valid encoding.
    """

    name: str
    width: int
    is_float: bool
    check: Check

    @property
    def itemsize(self) -> int:
        """Bytes an element, at least one."""
        return max(1, self.width // 8)

    def nbytes(self, numel: int) -> int:
        """Decoded bytes of *numel* elements."""
        return bits.packed_nbytes(numel, self.width)


def _anything(_chunk: Bytes, _numel: int, _where: str) -> None:
    pass


def _padding(width: int) -> Check:
    def check(chunk: Bytes, numel: int, where: str) -> None:
        if not bits.padding_is_zero(chunk, numel, width):
            raise FormatError("BIT-1", where, f"the bits behind element {numel - 1} of the chunk are not zero")

    return check


_check_padding = {width: _padding(width) for width in (1, 2, 4)}


def _three_codes(chunk: Bytes, numel: int, where: str) -> None:
    _check_padding[2](chunk, numel, where)
    if bits.has_code_three(chunk):
        raise FormatError("FIELD-1", where, "a field holds code 3, which stands for nothing")


def _eight_codes(chunk: Bytes, numel: int, where: str) -> None:
    _check_padding[4](chunk, numel, where)
    if bits.has_code_above_seven(chunk):
        raise FormatError("FIELD-1", where, "a field of 8 levels holds a code above 7, which stands for nothing")


def _int8(chunk: Bytes, _numel: int, where: str) -> None:
    if np.any(chunk == 0x80):
        raise FormatError("INT8-1", where, "a code is -128; codes are -127 to 127")


def _bool(chunk: Bytes, _numel: int, where: str) -> None:
    if np.any(chunk > 1):
        raise FormatError("BOOL-1", where, "a bool is neither 0 nor 1")


def _r13(chunk: Bytes, _numel: int, where: str) -> None:
    if not is_r13(chunk.view("<f4")).all():
        raise FormatError("NUM-1", where, "a number has more than 13 significant bits, is -0.0 or is out of range")


def _steps(chunk: Bytes, numel: int, where: str) -> None:
    _r13(chunk, numel, where)
    if (chunk.view("<f4") < 0).any():
        raise FormatError("NUM-4", where, "a step is negative")


def _shared_float(dtype: str) -> Check:
    def check(chunk: Bytes, _numel: int, where: str) -> None:
        values = as_float32(chunk, dtype)
        magnitude = np.abs(values)
        negative_zero = (values == 0) & np.signbit(values)
        sound = np.isfinite(values) & ~negative_zero & ((magnitude == 0) | (magnitude >= SMALLEST))
        if not np.all(sound):
            raise FormatError("NUM-2", where, "a value is not finite, is -0.0, or is smaller than 2^-60")

    return check


def as_float32(chunk: Bytes, dtype: str) -> NDArray[np.float32]:
    """The values of a chunk of shared floats: float32 [numel]."""
    if dtype == "BF16":  # the upper half of a float32
        return (chunk.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return chunk.view({"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


BITS = Encoding("bits", 1, is_float=False, check=_check_padding[1])
SIGNED = Encoding("signed", 2, is_float=False, check=_three_codes)
GAINS = Encoding("gains", 32, is_float=True, check=_r13)
STEPS = Encoding("steps", 32, is_float=True, check=_steps)
POOL = Encoding("pool", 8, is_float=False, check=_anything)

#: Encodings of uniform fields, by their levels.
UNIFORM: Final[dict[Levels, Encoding]] = {
    3: Encoding("uniform of 3 levels", 2, is_float=False, check=_three_codes),
    4: Encoding("uniform of 4 levels", 2, is_float=False, check=_check_padding[2]),
    8: Encoding("uniform of 8 levels", 4, is_float=False, check=_eight_codes),
    16: Encoding("uniform of 16 levels", 4, is_float=False, check=_check_padding[4]),
}

#: Encodings of a shared vector, by the dtype that group.json records; the floats also of a sparse tensor's values.
SHARED: dict[str, Encoding] = {
    "LOG4": Encoding("LOG4", 4, is_float=False, check=_check_padding[4]),
    "I8": Encoding("I8", 8, is_float=False, check=_int8),
    "F16": Encoding("F16", 16, is_float=True, check=_shared_float("F16")),
    "BF16": Encoding("BF16", 16, is_float=True, check=_shared_float("BF16")),
    "F32": Encoding("F32", 32, is_float=True, check=_shared_float("F32")),
}

#: Encodings of whole tensors, by safetensors dtype.
WHOLE: dict[str, Encoding] = {
    name: Encoding(name, 8 * itemsize, is_float=name in CODED, check=_bool if name == "BOOL" else _anything)
    for name, itemsize in DTYPES.items()
}
