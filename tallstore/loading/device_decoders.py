"""Which decoder a device has: the fastest of those that pass a test of the specification's arithmetic on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final

import numpy as np
import torch

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.format.bits import Bytes
from tallstore.format.dtypes import Dtype
from tallstore.loading import decode_torch
from tallstore.loading.agreement import decoded
from tallstore.loading.packed import Decode, Form, Region, Rows

#: base, value and scale, and the bits of the sum in float32: what goes wrong under a fused multiply-add, a sum in
#: float64, flushing of subnormal numbers, or an addition of 0.
_SUMS: Final = (
    (-(1 + 2.0**-12 + 2.0**-23), 1 + 2.0**-23, 1 + 2.0**-12, 0x00000000),
    (-(2.0**-120) * (1 - 2.0**-20), 2.0**-60, 2.0**-60, 0x00000200),
    (2.0**-130, 0.0, 1.0, 0x00080000),
    (-0.0, 0.0, 1.0, 0x80000000),
)
#: Numbers, and their bits in float16 and bfloat16: ties to even either way, overflow, subnormal numbers and their ties.
_CASTS: Final = (
    (1 + 2.0**-11, 0x3C00, 0x3F80),
    (1 + 3 * 2.0**-11, 0x3C02, 0x3F80),
    (1 + 2.0**-8, 0x3C04, 0x3F80),
    (1 + 3 * 2.0**-8, 0x3C0C, 0x3F82),
    (65519.996, 0x7BFF, 0x4780),
    (-65520.0, 0xFC00, 0xC780),
    (3 * 2.0**-25, 0x0002, 0x33C0),
    (2.0**-25, 0x0000, 0x3300),
    (2.0**-133, 0x0000, 0x0001),
    (3 * 2.0**-134, 0x0000, 0x0002),
    (3.4e38, 0x7C00, 0x7F80),
)
#: Forms that need other operations: packed codes and values, and what four elements become over a base of 0.
_KINDS: Final[tuple[tuple[Form, bytes, bytes, list[float]], ...]] = (
    (
        Form("signed", "F32", "F32", "F32", values="LOG4"),
        b"\x64",  # absent, plus, minus, plus
        b"\x10\x32",
        [0.0, 181 / 256, -0.5, 181 / 512],
    ),
    (
        Form("sparse", "F32", "F32", "F32", values="F16"),
        b"\x0a",
        b"\x00\x3c\x00\xc0",
        [0.0, 1.0, 0.0, -2.0],
    ),
    (
        Form("uniform", "F32", "F32", "F32", levels=16),
        b"\x70\xf8",
        b"",
        [-7.5, -0.5, 0.5, 7.5],
    ),
)


@cache
def decoder_for(device: torch.device) -> Decode | None:
    """The decoder to use on a device; None where experts are rebuilt on the CPU, and moved.

    Cost: on CUDA, six small kernels are compiled, or taken from Triton's cache; nothing the second time.

    Args:
        device: with its index, where it has one.
    """
    if device.type in {"cpu", "meta"}:
        return None
    return next((decode for decode in _candidates(device) if computes_exactly(decode, device)), None)


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which kernels are started on *device*."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _candidates(device: torch.device) -> Iterator[Decode]:
    if device.type == "cuda":
        try:
            from tallstore.loading import decode_triton  # noqa: PLC0415 - Triton is an extra
        except ImportError:
            pass
        else:
            yield decode_triton.decode
    yield decode_torch.decode


def computes_exactly(decode: Decode, device: torch.device) -> bool:
    """Whether a decoder works on a device, and gives the bits that the specification asks for where others may not."""
    try:
        with current(device):
            return _passes(decode, device)
    except Exception:  # noqa: BLE001 - no compiler, an operation that the device lacks: whatever it is, others may do
        return False


def _passes(decode: Decode, device: torch.device) -> bool:
    return (
        _sums(decode, device, [row[:3] for row in _SUMS], "F32") == [row[3] for row in _SUMS]
        and _sums(decode, device, [(row[0], 0.0, 1.0) for row in _CASTS], "F16") == [row[1] for row in _CASTS]
        and _sums(decode, device, [(0.0, row[0], 1.0) for row in _CASTS], "BF16") == [row[2] for row in _CASTS]
        and all(_elements(decode, device, form, codes, values) == made for form, codes, values, made in _KINDS)
    )


def _sums(
    decode: Decode, device: torch.device, terms: Sequence[tuple[float, float, float]], result: Dtype
) -> list[int]:
    """The bits that a decoder makes of base + scale * value, each sum with a row of its own."""
    numbers = np.array(terms, np.float32).reshape(-1, 3)
    base, values, scales = (np.ascontiguousarray(numbers[:, column]).view(np.uint8) for column in range(3))
    codes = np.packbits(np.ones(len(numbers), np.uint8), bitorder="little")
    form = Form("mask", "F32", result, result, values="F32")
    sources: dict[Region, Bytes] = {"base": base, "codes": codes, "values": values}
    made = decoded(decode, device, form, sources, {"values": Rows(scales.view(np.float32), 1, 1)})
    width = TORCH_DTYPES[result].itemsize
    return [bits & ((1 << 8 * width) - 1) for bits in made.tolist()]


def _elements(decode: Decode, device: torch.device, form: Form, codes: bytes, values: bytes) -> list[float]:
    """What a decoder makes of four elements."""
    sources: dict[Region, Bytes] = {"base": np.zeros(16, np.uint8), "codes": np.frombuffer(codes, np.uint8)}
    if values:
        sources["values"] = np.frombuffer(values, np.uint8)
    count = len(values) // 2 if form.kind == "sparse" else 0
    made = decoded(decode, device, form, sources, {"values": Rows(np.ones(1, np.float32), 4, 4)}, value_count=count)
    return made.view(torch.float32).tolist()
