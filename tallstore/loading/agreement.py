"""Whether two decoders make the same of a form: tried on a piece of numbers that are hard on arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.format import bits
from tallstore.format.bits import Bytes
from tallstore.format.dtypes import Dtype, itemsize
from tallstore.format.manifest import SharedDtype
from tallstore.loading.packed import BITS, SCALED, Batch, Decode, Form, Piece, Region, Rows, Scaled
from tallstore.loading.subnormals import subnormals_count

_NUMEL: Final = 203
_ROW: Final = 29  # rows begin inside of bytes
_SCALES: Final = (1.0, -0.75, 2.0**-60, 1 + 2.0**-12, 0.0, -(1 + 4095 * 2.0**-12), 2.0**-9)
_EXPONENT: Final[Mapping[Dtype, int]] = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


def agree(one: Decode, other: Decode, form: Form) -> bool:
    """Whether both write the same bits on the CPU, whatever the payloads of NaNs.

    Raises:
        Exception: whatever a decoder raises.
    """
    regions: dict[Region, Bytes] = {"base": _base(form.base), "codes": _codes(form)}
    dtypes: dict[Scaled, SharedDtype | None] = {
        "values": form.values,
        "values_lo": form.values_lo,
        "centre": form.centre,
    }
    for name, dtype in dtypes.items():
        if dtype is not None:
            regions[name] = _values(dtype)
    count = 0
    if form.kind == "sparse":
        count = int(np.unpackbits(regions["codes"]).sum())
        regions["values"] = regions["values"][: count * regions["values"].size // _NUMEL]
    scales = np.array(_SCALES, np.float32)
    rows = {
        name: Rows(np.roll(scales, turn), _ROW, _ROW)
        for turn, name in enumerate(SCALED)
        if name == "values" or dtypes[name] is not None
    }
    with subnormals_count():
        first, second = (
            decoded(decode, torch.device("cpu"), form, regions, rows, value_count=count).view(TORCH_DTYPES[form.wanted])
            for decode in (one, other)
        )
    integers = BITS[itemsize(form.wanted)][1]
    same = (first.view(integers) == second.view(integers)) | (first.isnan() & second.isnan())
    return bool(same.all())


def decoded(
    decode: Decode,
    device: torch.device,
    form: Form,
    sources: Mapping[Region, Bytes],
    rows: Mapping[Scaled, Rows],
    *,
    value_count: int = 0,
) -> Tensor:
    """What a decoder makes of one piece: the bits of its elements, as integers on the CPU."""
    count, (_, integers) = sources["base"].size // itemsize(form.base), BITS[itemsize(form.wanted)]
    destination = torch.empty(count, dtype=integers, device=device)
    readers = {name: partial(_itself, elements) for name, elements in sources.items()}
    batch = Batch([Piece(form, destination, readers, rows, value_count)])
    host = torch.zeros(batch.nbytes, dtype=torch.uint8, device="cpu")
    for job in batch.fill(host.numpy()):
        job()
    for packed in batch.packed(host.to(device)):
        decode(packed)
    return destination.cpu()


def _itself(elements: Bytes) -> Bytes:
    return elements


def _spread(limit: int, turn: int) -> NDArray[np.uint64]:
    """Whole numbers spread over all under *limit*, others by *turn*; numpy's random ones take long to import."""
    mixed = (np.arange(1, _NUMEL + 1, dtype=np.uint64) + np.uint64(turn << 20)) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32)


def _base(dtype: Dtype) -> Bytes:
    """Any bits, and in every fifth place zeros, infinities and the numbers beside them."""
    patterns = _spread(1 << 8 * itemsize(dtype), 0)
    exponent = _EXPONENT[dtype]
    sign = 1 << (8 * itemsize(dtype) - 1)
    special = np.array([0, sign, 1, sign | 1, exponent - 1, exponent, sign | exponent], np.uint64)
    patterns[::5] = np.resize(special, len(patterns[::5]))
    return patterns.astype(f"<u{itemsize(dtype)}").view(np.uint8)


def _codes(form: Form) -> Bytes:
    limit = {"signed": 3, "uniform": form.levels}.get(form.kind, 2)
    return bits.pack(_spread(limit, 1).astype(np.uint8), form.code_width)


def _values(dtype: SharedDtype) -> Bytes:
    if dtype == "LOG4":
        return bits.pack(_spread(16, 2).astype(np.uint8), 4)
    if dtype == "I8":
        return (_spread(255, 3).astype(np.int16) - 127).astype(np.int8).view(np.uint8)
    exponents = _spread(29 if dtype == "F16" else 140, 4).astype(np.float32) - (14 if dtype == "F16" else 40)
    signs = _spread(3, 5).astype(np.float32) - 1
    numbers = np.exp2(exponents) * (1 + _spread(128, 6).astype(np.float32) / 128) * signs + 0
    return torch.from_numpy(numbers.astype(np.float32)).to(TORCH_DTYPES[dtype]).view(torch.uint8).numpy()
