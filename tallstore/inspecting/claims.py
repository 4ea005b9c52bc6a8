"""Which weights a task's mask claims: one bit a weight, read chunk by chunk from whatever kind of mask it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from tallstore.format.bits import Bytes, packed_nbytes
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL, chunk_count
from tallstore.format.encodings import SIGNED_VALUES, UNIFORM_VALUES
from tallstore.format.manifest import Mask, ScaledCode, Signed, Sparse, Uniform
from tallstore.format.owners import Task
from tallstore.format.payloads import Coded, sides_of
from tallstore.format.shard_reader import PayloadReader
from tallstore.inspecting.agreement import Words

#: Writes a chunk's claims, by its index, to a row of words: the bits of what the task does not have there are zero.
ReadClaims = Callable[[int, Words], None]

#: Payloads of so many tasks are held open at once; of more, each is opened for every chunk. A process may have a few
#: hundred files open.
MAX_HELD = 128
CHUNK_WORDS: Final = CHUNK_NUMEL // 64
_ABSENT: Final = {"signed": SIGNED_VALUES.index(0), "ternary": UNIFORM_VALUES[3].index(0)}
_WORD: Final = np.dtype("<u8")


def is_mask(code: ScaledCode) -> bool:
    """Whether a code leaves weights out, which stay the base's."""
    return isinstance(code, Mask | Signed | Sparse) or (isinstance(code, Uniform) and code.levels == 3)


def open_claims(files: BundleFiles, task: Task, coded: Coded, *, hold: bool = True) -> ReadClaims:
    """The claims of a task's mask.

    Args:
        files: the bundle's.
        task: whose mask it is.
        coded: what it codes: `is_mask`.
        hold: keep its shard open, instead of opening it for every chunk.

    Raises:
        NotFetchedError, FormatError, IntegrityError: here or in a read, as `BundleFiles.payload` and
            `PayloadReader.chunk`.
    """
    stored = sides_of(coded)
    held = files.payload(task, stored) if hold else None

    def read(index: int, row: Words) -> None:
        row[:] = 0
        if index < chunk_count(coded.numel):
            claims = _claims(held or files.payload(task, stored), coded, index)
            row.view(np.uint8)[: claims.size] = claims

    return read


def words(numel: int) -> int:
    """Words that the claims of *numel* weights take."""
    return -(-numel // 64)


def _claims(payload: PayloadReader, coded: Coded, index: int) -> Bytes:
    codes = payload.chunk(index)
    if isinstance(coded.code, Signed | Uniform):
        absent = _ABSENT["signed" if isinstance(coded.code, Signed) else "ternary"]
        return other_than(codes, min(CHUNK_NUMEL, coded.numel - index * CHUNK_NUMEL), absent)
    return codes


def other_than(fields: Bytes, numel: int, absent: int) -> Bytes:
    """Which of *numel* 2-bit fields are not *absent*: a bit a field, pad bits zero."""
    padded = np.zeros(-(-fields.size // 8) * 8, np.uint8)
    padded[: fields.size] = fields
    found = padded.view(_WORD)
    found ^= _WORD.type(absent * 0x5555555555555555)
    # The lower bit of each field says whether it differs; then pairs, quarters and bytes of those bits move together.
    for distance, kept in ((1, 0x55), (1, 0x33), (2, 0x0F)):
        found |= found >> _WORD.type(distance)
        found &= _WORD.type(kept * 0x0101010101010101)
    pairs = found.view("<u2")
    claims: Bytes = (pairs | pairs >> np.uint16(4)).astype(np.uint8)[: packed_nbytes(numel, 1)]
    if numel % 8:
        claims[-1] &= (1 << numel % 8) - 1
    return claims
