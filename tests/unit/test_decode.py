"""decode: rebuilt elements are those of a slow reference, bit for bit, however they are cut into tiles."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.format import bits
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.payloads import row_count
from tallstore.loading import decode
from tallstore.loading.decode import copy_cast, rebuild
from tallstore.loading.sides import MaskSides, RowScales, SharedChunk, Sides, SignedSides
from tests import reference
from tests.number_cases import base_patterns, numbers_for, specials
from tests.reference import same_bits

BASES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHARED = ["LOG4", "I8", "BF16", "F16", "F32"]
SHAPES = [(), (13,), (7, 5), (2, 3, 2, 2)]
R13 = [1.0, -0.75, 0.0, 2.0**-60, 2.0**60, 1 + 2.0**-12, -(1 + 4095 * 2.0**-12), 2.0**-9]


def vector(shared: str, numbers: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Bytes of *numbers* (codes, or values to be rounded), and the values as the reference takes them."""
    if shared == "LOG4":
        raw, values = bits.pack(numbers.astype(np.uint8), 4), [reference.log4(code) for code in numbers.tolist()]
    elif shared == "I8":
        raw, values = numbers.astype(np.int8).view(np.uint8), [float(code) for code in numbers.tolist()]
    else:
        stored = torch.from_numpy(numbers.astype(np.float32)).to(TORCH_DTYPES[shared])
        raw, values = stored.view(torch.uint8).numpy(), stored.tolist()
    return raw, values


def coded(
    shared: str, numbers: np.ndarray, sides: np.ndarray, width: int
) -> tuple[Callable[[RowScales], Sides], list[float]]:
    """A mask (*width* 1) or signed mask of *sides* over *numbers*, for any scales, and the reference's values."""
    units = bits.pack(np.where(sides < 0, 2, sides).astype(np.uint8), width)
    raw, values = vector(shared, numbers)
    kind = MaskSides if width == 1 else SignedSides
    return lambda scales: kind(units, SharedChunk(raw, shared, scales)), values


def finite_sides(random: np.random.Generator, base: torch.Tensor, width: int) -> np.ndarray:
    """Sides that are absent where the base is NaN: what a sum makes of a payload is not specified."""
    drawn = random.integers(0 if width == 1 else -1, 2, base.numel())
    return np.where(base.view(-1).isnan().numpy(), 0, drawn)


@pytest.mark.parametrize("width", [1, 2], ids=["mask", "signed"])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", BASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rebuilt_tensors_are_the_references_bit_for_bit(shape, dtype, shared, width):
    random = np.random.default_rng([len(shape), SHARED.index(shared), width])
    numel, rows = math.prod(shape), row_count(shape, 1)
    for _ in range(4):
        base = reference.from_patterns(base_patterns(random, dtype, numel), dtype, shape)
        sides = finite_sides(random, base, width)
        chunk, values = coded(shared, numbers_for(shared, random, base), sides, width)
        scales = random.choice([scale for scale in R13 if abs(scale) < 2.0**59], rows)
        rebuilt = torch.empty(shape, dtype=dtype)
        rebuild(rebuilt.view(-1), base.view(-1), chunk(RowScales(scales.astype(np.float32), numel // rows)), None, 0)
        assert same_bits(rebuilt, reference.rebuild(base, sides.tolist(), values, scales.tolist()))


@given(data=st.data(), dtype=st.sampled_from(BASES), result=st.sampled_from(BASES), width=st.sampled_from([1, 2]))
def test_any_base_any_value_any_result(data, dtype, result, width):
    """Any bits in the base, any float32 that may be shared, any r13 scale, under every result dtype."""
    count = data.draw(st.integers(1, 12))
    nbits = 8 * dtype.itemsize
    patterns = st.integers(0, (1 << nbits) - 1) | st.sampled_from(specials(dtype))
    base = reference.from_patterns(data.draw(st.lists(patterns, min_size=count, max_size=count)), dtype, [count])
    magnitudes = st.floats(2.0**-60, 2.0**127, width=32)
    values = st.just(0.0) | magnitudes | magnitudes.map(lambda value: -value)
    numbers = np.array(data.draw(st.lists(values, min_size=count, max_size=count)), np.float32)
    scale = data.draw(st.sampled_from(R13))
    sides = np.array(data.draw(st.lists(st.integers(1 - width, 1), min_size=count, max_size=count)))
    overflows = np.abs(numbers.astype(np.float64) * scale) > 2.0**127
    sides[(base.isnan() | base.isinf() & torch.from_numpy(overflows)).numpy()] = 0  # a sum that is NaN has any payload
    chunk, known = coded("F32", numbers, sides, width)
    rebuilt = torch.empty(count, dtype=result)
    rebuild(rebuilt, base, chunk(RowScales(np.array([scale], np.float32), count)), None, 0)
    expected = reference.rebuild(base, sides.tolist(), known, [scale], result)
    assert torch.equal(rebuilt.isnan(), base.isnan())
    exact = ~base.isnan() | torch.tensor(dtype == result)  # so has a NaN that is cast
    assert same_bits(rebuilt[exact], expected[exact])


@given(
    rows=st.tuples(st.integers(1, 6), st.integers(1, 60)),
    span=st.tuples(st.integers(0, 60), st.integers(0, 80)),
    tile=st.sampled_from([1, 8, 16, 24, 40, 1000]),
    shared=st.sampled_from(SHARED),
    width=st.sampled_from([1, 2]),
)
def test_a_range_in_tiles_is_the_same_as_the_whole_at_once(rows, span, tile, shared, width):
    """Ranges and tiles that begin and end anywhere: inside a byte, inside a row, over many rows."""
    random = np.random.default_rng(1)
    row_count, row_length = rows
    numel = row_count * row_length
    start, stop = min(span[0], numel), min(sum(span), numel)
    base = torch.from_numpy(random.standard_normal(numel)).to(torch.float32)
    sides = finite_sides(random, base, width)
    chunk, values = coded(shared, numbers_for(shared, random, base), sides, width)
    scales = random.choice(R13, row_count)
    part = torch.empty(stop - start)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decode, "_TILE_NUMEL", tile)
        rebuild(part, base[start:stop], chunk(RowScales(scales.astype(np.float32), row_length)), None, start)
    whole = reference.rebuild(base, sides.tolist(), values, scales.tolist())
    assert same_bits(part, whole[start:stop])


def test_a_range_of_a_later_chunk_reads_its_own_bits_and_rows():
    """Bits and values are counted from the chunk's beginning, rows from the tensor's."""
    random = np.random.default_rng(2)
    row_length, start, count = 1_000_003, CHUNK_NUMEL * 2 + 5, 300
    base = torch.from_numpy(random.standard_normal(count)).float()
    sides, numbers = random.integers(0, 2, 5 + count), random.integers(-127, 128, 5 + count)
    chunk, values = coded("I8", numbers, sides, 1)
    rebuilt = torch.empty(count)
    rebuild(rebuilt, base, chunk(RowScales(np.array([1, 2, 4, 8], np.float32), row_length)), None, start)
    scales = [float(1 << (start + i) // row_length) for i in range(count)]
    expected = [
        reference.element(pattern, side, value, scale, base_dtype="F32", result_dtype="F32")
        for pattern, side, value, scale in zip(
            reference.patterns(base), sides[5:].tolist(), values[5:], scales, strict=True
        )
    ]
    assert reference.patterns(rebuilt) == expected


def test_absent_and_zero_deltas_keep_every_bit_of_the_base():
    """-0.0, subnormals, infinities and NaN payloads, where nothing or nothing but zero is added."""
    for dtype in BASES:
        patterns = specials(dtype) * 2
        base = reference.from_patterns(patterns, dtype, [len(patterns)])
        sides = np.arange(len(patterns)) >= len(patterns) // 2  # absent first, then a value of 0
        for scale in (1.0, -1.0, 0.0):
            chunk, _ = coded("F32", np.zeros(len(patterns)), sides, 1)
            rebuilt = torch.empty_like(base)
            rebuild(rebuilt, base, chunk(RowScales(np.array([scale], np.float32), len(patterns))), None, 0)
            assert same_bits(rebuilt, base)


def test_the_product_is_rounded_before_the_sum():
    """A fused multiply-add, or a sum in float64, would come out differently."""
    value, scale = 1 + 2.0**-23, 1 + 2.0**-12
    base = torch.tensor([-(1 + 2.0**-12 + 2.0**-23)])
    chunk, _ = coded("F32", np.array([value]), np.array([1]), 1)
    rebuilt = torch.empty(1)
    rebuild(rebuilt, base, chunk(RowScales(np.array([scale], np.float32), 1)), None, 0)
    assert rebuilt.item() == 0.0
    assert value * scale + base.item() != 0.0


@pytest.mark.parametrize("dtype", BASES, ids=str)
@pytest.mark.parametrize("result", BASES, ids=str)
def test_a_cast_rounds_once_to_nearest_even(dtype, result):
    """Ties, neighbours of ties that two roundings would make ties, overflow, subnormals."""
    numbers = [
        1 + 2**-11,
        1 + 3 * 2**-11,
        1 + 2**-11 + 2**-40,
        1 + 2**-8 + 2**-45,
        1 + 2**-9 - 2**-40,
        65519.99,
        65520.0,
        1e39,
    ]
    numbers += [2**-25, 2**-25 + 2**-60, 3 * 2**-134, 2**-134 + 2**-180, 2**-150, 2**-1074, 0.0, math.inf, 3.4e38]
    source = torch.tensor([sign * number for number in numbers for sign in (1, -1)], dtype=torch.float64).to(dtype)
    cast = torch.empty(source.numel(), dtype=result)
    copy_cast(cast, source)
    expected = [reference.encode(number, reference.NAMES[result]) for number in source.tolist()]
    assert reference.patterns(cast) == expected


def test_a_copy_in_the_same_dtype_keeps_every_bit():
    for dtype in BASES:
        source = reference.from_patterns(specials(dtype), dtype, [len(specials(dtype))])
        copy = torch.empty_like(source)
        copy_cast(copy, source)
        assert same_bits(copy, source)


def subnormal_case(count: int) -> tuple[torch.Tensor, Sides]:
    """Elements whose sum is subnormal: the smallest delta there is, and a base that all but cancels it."""
    base = torch.full((count,), -(2.0**-120) * (1 - 2.0**-20))
    chunk, _ = coded("F32", np.full(count, 2.0**-60), np.ones(count, np.int64), 1)
    return base, chunk(RowScales(np.array([2.0**-60], np.float32), count))


@pytest.mark.parametrize("count", [13, 3 * (1 << 18)], ids=["small", "parallel"])
def test_flushing_of_subnormals_changes_nothing(count):
    """Set in this thread, and inherited by the threads that torch started for it; the setting stays as it was."""
    base, sides = subnormal_case(count)
    expected = torch.empty_like(base)
    rebuild(expected, base, sides, None, 0)
    assert torch.equal(expected, torch.full((count,), 2.0**-140))
    rebuilt, cast = torch.empty_like(base), torch.empty(count, dtype=torch.bfloat16)
    tiny = torch.full((count,), 2.0**-130, dtype=torch.float64)
    still_on = []

    def flushing():
        torch.set_flush_denormal(True)
        try:
            torch.mul(base, base)  # starts torch's threads, which inherit the setting
            rebuild(rebuilt, base, sides, None, 0)
            copy_cast(cast, tiny)
            still_on.append(tiny[:1].float().item() == 0.0)
        finally:
            torch.set_flush_denormal(False)

    thread = threading.Thread(target=flushing)
    thread.start()
    thread.join()
    assert same_bits(rebuilt, expected)
    assert (cast.view(torch.int16) == 8).all()  # 2^-133 is the smallest bfloat16
    assert still_on == [True]


def test_default_dtype_and_device_change_nothing():
    random = np.random.default_rng(3)
    base = torch.from_numpy(random.standard_normal(100)).to(torch.bfloat16)
    chunk, _ = coded("LOG4", random.integers(0, 16, 100), random.integers(-1, 2, 100), 2)
    scales = RowScales(np.full(10, 0.125, np.float32), 10)
    expected, rebuilt = torch.empty_like(base), torch.empty_like(base)
    rebuild(expected, base, chunk(scales), None, 0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            rebuild(rebuilt, base, chunk(scales), None, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(rebuilt, expected)


def test_read_only_bytes_are_taken_without_a_warning():
    """zstd gives bytes that cannot be written to."""
    base = torch.zeros(8)
    values = np.frombuffer(bytes(range(8)), np.uint8)
    merged = SharedChunk(values, "I8", RowScales(np.array([0.5], np.float32), 8))
    rebuilt = torch.empty(8)
    rebuild(rebuilt, base, MaskSides(np.frombuffer(b"\xff", np.uint8), merged), None, 0)
    assert rebuilt.tolist() == [code / 2 for code in range(8)]
