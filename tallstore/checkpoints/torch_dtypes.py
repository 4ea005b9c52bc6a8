"""Torch's data types under safetensors' names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from tallstore.format.dtypes import Dtype

_BY_NAME: Final[dict[Dtype, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
TORCH_DTYPES: Final[Mapping[Dtype, torch.dtype]] = MappingProxyType(_BY_NAME)
"""Every name of `tallstore.format.dtypes.DTYPES` -> torch's type."""

DTYPE_NAMES: Final = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPES.items()})
