"""Packed elements to weights in one Triton kernel: unpacked in registers, written once. Importing this needs Triton.

A program decodes one block: `BLOCK_NUMEL` elements as rows of 8, so that a thread has the bits of whole bytes. Numbers
are those of the specification: products and sums are not fused, subnormal numbers count, casts are spelt out, and what
is selected or copied is handled as integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
import triton
import triton.language as tl

from tallstore.format.dtypes import itemsize
from tallstore.loading.packed import BITS, BLOCK_NUMEL, COLUMNS, PLACES, Packed, Region

OPTIONS: Final[Mapping[str, int | bool]] = {
    "num_warps": BLOCK_NUMEL // 8 // 32,  # a row of 8 elements a thread
    "enable_fp_fusion": False,  # a fused multiply-add rounds once where the specification rounds twice
}
"""What the kernel is compiled and started with."""

_VECTOR_NBYTES: Final = 16
_CODE_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # 8 codes each, by the bits of a code
_SHARED_ELEMENTS: Final = {
    "LOG4": torch.int32,  # 8 codes
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.int16,
    "F32": torch.float32,
}


def decode(packed: Packed) -> None:
    """Write every piece to its destination, on the current device and stream; see `Decode`."""
    regions, constants = arguments(packed)
    _decode[(packed.block_count,)](*regions, **constants, **OPTIONS)


def arguments(packed: Packed) -> tuple[list[torch.Tensor], dict[str, object]]:
    """What the kernel is given: regions by position, and by name what it is compiled for."""
    form = packed.form
    unused = packed.region("blocks", torch.int32)
    shared: list[torch.Tensor] = []
    regions: tuple[Region, ...] = ("values", "values_lo", "centre")
    for name, dtype in zip(regions, (form.values, form.values_lo, form.centre), strict=True):
        shared.append(unused if dtype is None else packed.region(name, _SHARED_ELEMENTS[dtype]))
    return [
        packed.region("table", torch.int64),
        packed.region("blocks", torch.int32),
        packed.region("scales", torch.float32),
        packed.region("base", BITS[itemsize(form.base)][1]),
        packed.region("codes", _CODE_WORDS[form.code_width]) if form.code_width else unused,
        *shared,
        packed.region("ranks", torch.int32) if form.kind == "sparse" else unused,
    ], {
        "KIND": form.kind,
        "BASE": form.base,
        "RESULT": form.result,
        "WANTED": form.wanted,
        "CODE_WIDTH": form.code_width,
        "LEVELS": form.levels,
        "VALUES": form.values or "",
        "VALUES_LO": form.values_lo or "",
        "CENTRE": form.centre or "",
        "RUN": packed.runs["values"],
        "RUN_LO": packed.runs["values_lo"],
        "RUN_CENTRE": packed.runs["centre"],
        "ALIGNED": all(destination.data_ptr() % _VECTOR_NBYTES == 0 for destination in packed.destinations),
        "BLOCK": BLOCK_NUMEL,
        "COLUMNS": COLUMNS,
        "PLACES": PLACES,
    }


@triton.jit
def _decode(
    table: tl.tensor,
    blocks: tl.tensor,
    scales: tl.tensor,
    base: tl.tensor,
    codes: tl.tensor,
    values: tl.tensor,
    values_lo: tl.tensor,
    centre: tl.tensor,
    ranks: tl.tensor,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    RESULT: tl.constexpr,
    WANTED: tl.constexpr,
    CODE_WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    VALUES: tl.constexpr,
    VALUES_LO: tl.constexpr,
    CENTRE: tl.constexpr,
    RUN: tl.constexpr,
    RUN_LO: tl.constexpr,
    RUN_CENTRE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    piece = table + tl.load(blocks + block) * COLUMNS
    count = tl.load(piece + 1).to(tl.int32)
    first_block = tl.load(piece + 2).to(tl.int32)
    lanes = tl.arange(0, 8)
    words = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    piece_words = words - first_block * (BLOCK // 8)
    here_words = piece_words * 8
    here = here_words[:, None] + lanes[None, :]

    kept = tl.load(base + _place(piece + PLACES) + here)
    bits = _cast(kept, BASE, RESULT)
    if KIND != "same":
        fields = (tl.load(codes + words).to(tl.int32)[:, None] >> (lanes * CODE_WIDTH)[None, :]) & (
            (1 << CODE_WIDTH) - 1
        )
        scale = _scale(scales, piece + 3, here_words, here, count, RUN)
        if KIND == "sparse":
            own = _own(values, codes, tl.load(ranks + block), fields, words, lanes)
            delta = tl.where(fields == 1, _value(own, VALUES) * scale, 0.0)
        elif VALUES == "":
            delta = _level(fields, KIND, LEVELS) * scale
        else:
            delta = _shared(values, piece + PLACES + 1, here, piece_words, lanes, VALUES) * scale
            if KIND == "two-level":
                scale_lo = _scale(scales, piece + 6, here_words, here, count, RUN_LO)
                lower = _shared(values_lo, piece + PLACES + 2, here, piece_words, lanes, VALUES_LO) * scale_lo
            elif KIND == "signed":
                lower = tl.where(fields == 2, -delta, 0.0)
            else:
                lower = 0.0
            delta = tl.where(fields == 1, delta, lower)
        total = _value(kept, BASE)
        if CENTRE != "":
            scale_centre = _scale(scales, piece + 9, here_words, here, count, RUN_CENTRE)
            total += _shared(centre, piece + PLACES + 3, here, piece_words, lanes, CENTRE) * scale_centre
        bits = tl.where(delta == 0.0, bits, _rounded(total + delta, RESULT))
    bits = _cast(bits, RESULT, WANTED)

    destination = tl.load(piece).to(tl.pointer_type(bits.dtype))
    if ALIGNED:
        destination = tl.multiple_of(destination, 16)
    if (block - first_block + 1) * BLOCK <= count:  # without a mask, a thread stores its elements at once
        tl.store(destination + here, bits)
    else:
        tl.store(destination + here, bits, mask=here < count)


# Every path of a function ends in one return: Triton compiles what stands behind an earlier one, too.


@triton.jit
def _scale(
    scales: tl.tensor, row: tl.tensor, words: tl.tensor, here: tl.tensor, count: tl.tensor, RUN: tl.constexpr
) -> tl.tensor:
    """The scale of each element; *row* points to where the table says which, *words* are the places of rows of 8."""
    scales += tl.load(row).to(tl.int32)
    if RUN == 0:
        scale = tl.load(scales)
    elif RUN == 8:
        scale = tl.load(scales + _row(row, words), mask=words < count, other=0.0)[:, None]
    else:
        scale = tl.load(scales + _row(row, here), mask=here < count, other=0.0)
    return scale


@triton.jit
def _row(row: tl.tensor, place: tl.tensor) -> tl.tensor:
    """Which of a piece's scales is for the element at *place*."""
    first = tl.load(row + 1).to(tl.int32)
    length = tl.load(row + 2).to(tl.int32)
    return tl.where(place < first, 0, 1 + (place - first) // length)


@triton.jit
def _place(column: tl.tensor) -> tl.tensor:
    """Where in a region a piece begins; pieces lie at multiples of 512 bytes, or of whole blocks."""
    return tl.multiple_of(tl.load(column), 128)


@triton.jit
def _shared(
    region: tl.tensor, column: tl.tensor, here: tl.tensor, words: tl.tensor, lanes: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """Values of a shared vector, float32."""
    pointer = region + _place(column)
    if DTYPE == "LOG4":
        code = (tl.load(pointer + words)[:, None] >> (lanes * 4)[None, :]) & 15
        odd = code & 1  # 181/256 is 2^-1 times 1 + 0x350000 / 2^23
        value = (((127 - (code >> 1) - odd) << 23) | (odd * 0x350000)).to(tl.float32, bitcast=True)
    else:
        value = _value(tl.load(pointer + here), DTYPE)
    return value


@triton.jit
def _level(fields: tl.tensor, KIND: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """What the codes of signs and of uniform fields stand for, float32."""
    if KIND == "sign":
        level = (2 * fields - 1).to(tl.float32)
    elif LEVELS == 3:
        level = (fields - 1).to(tl.float32)
    else:
        level = fields.to(tl.float32) - (LEVELS - 1) / 2
    return level


@triton.jit
def _own(
    values: tl.tensor, codes: tl.tensor, rank: tl.tensor, fields: tl.tensor, words: tl.tensor, lanes: tl.tensor
) -> tl.tensor:
    """The stored value of each set bit of a block, before which *rank* others are set."""
    byte = tl.load(codes + words).to(tl.int32)
    counts = _set_count(byte)
    before = rank + tl.cumsum(counts, 0) - counts
    inside = _set_count(byte[:, None] & ((1 << lanes) - 1)[None, :])
    return tl.load(values + before[:, None] + inside, mask=fields == 1, other=0)


@triton.jit
def _value(element: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """A stored element in float32, which holds it exactly."""
    if DTYPE == "F32":
        value = element.to(tl.float32, bitcast=True)
    elif DTYPE == "BF16":
        value = (element.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "F16":
        value = element.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = element.to(tl.float32)
    return value


@triton.jit
def _rounded(number: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The bits of a float32 in *DTYPE*, rounded to nearest, ties to even."""
    if DTYPE == "F32":
        bits = number.to(tl.int32, bitcast=True)
    elif DTYPE == "F16":
        bits = number.to(tl.float16, fp_downcast_rounding="rtne").to(tl.int16, bitcast=True)
    else:
        wide = number.to(tl.int32, bitcast=True)
        upper = wide >> 16
        nearest = (wide + (0x7FFF + (upper & 1))) >> 16
        bits = tl.where(number == number, nearest, upper | 0x40).to(tl.int16)  # noqa: PLR0124 - a NaN stays one
    return bits


@triton.jit
def _cast(bits: tl.tensor, SOURCE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """The bits of an element in another dtype; as they are in its own."""
    return bits if SOURCE == DTYPE else _rounded(_value(bits, SOURCE), DTYPE)


@triton.jit
def _set_count(byte: tl.tensor) -> tl.tensor:
    """How many of the lowest 8 bits are set."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F
