"""Checkpoints that are files of tensors and yet not the weights of a model: adapters and quantised weights."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Final

from tallstore.errors import (
    AdapterCheckpointError,
    DamagedCheckpointError,
    InputError,
    QuantizedCheckpointError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_MERGE: Final = "merge it into its base with PEFT's merge_and_unload(), save that model, and give the result"
_DEQUANTIZE: Final = "give the weights from before quantising"

# GPTQ and AWQ, bitsandbytes (8 and 4 bits), compressed-tensors, HQQ.
_QUANTIZED_NAME: Final = re.compile(
    r"(?:^|\.)(?:qweight|qzeros|absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_packed|W_q)$"
    r"|\.quant_state(?:\.|$)"
)
_ADAPTER_NAME: Final = re.compile(r"(?:^|\.)lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.|$)")

MAX_JSON_NBYTES: Final = 100_000_000
"""Of a config or an index: as of a safetensors header, which says more of each tensor."""

_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
LFS_POINTER_NBYTES: Final = len(_LFS_POINTER)
"""How much of a file `refuse_lfs_pointer` looks at."""


def refuse_unmerged_names(where: str, names: Iterable[str]) -> None:
    """Refuse tensor names that only quantised weights or adapters have.

    Raises:
        QuantizedCheckpointError: GPTQ's, AWQ's, bitsandbytes' and the like.
        AdapterCheckpointError: LoRA's.
    """
    for name in names:
        if _QUANTIZED_NAME.search(name):
            raise QuantizedCheckpointError(where, f"tensor {name!r} belongs to quantised weights; {_DEQUANTIZE}")
        if _ADAPTER_NAME.search(name):
            raise AdapterCheckpointError(where, f"tensor {name!r} belongs to a LoRA adapter; {_MERGE}")


def refuse_adapter_file(path: Path) -> None:
    """Refuse a file that PEFT names as it names adapters.

    Raises:
        AdapterCheckpointError: it is one.
    """
    if path.stem == "adapter_model":
        raise AdapterCheckpointError(str(path), f"is a PEFT adapter, not a model; {_MERGE}")


def refuse_by_config(where: str, directory: Path) -> None:
    """Refuse a directory whose configuration says that its weights are an adapter's, or quantised.

    Args:
        where: what messages call the directory.
        directory: the directory, which need not exist.

    Raises:
        AdapterCheckpointError: there is an ``adapter_config.json``.
        QuantizedCheckpointError: ``config.json`` has a ``quantization_config``.
        DamagedCheckpointError: ``config.json`` is not a JSON object.
    """
    if (directory / "adapter_config.json").exists():
        raise AdapterCheckpointError(
            where,
            f"is a PEFT adapter (it has adapter_config.json), not a model; {_MERGE}; if it is merged, remove that file",
        )
    path = directory / "config.json"
    if not path.is_file():
        return
    quantization = read_json_object(path).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        by = f" by {method}" if isinstance(method, str) else ""
        raise QuantizedCheckpointError(
            where, f"is quantised{by} (config.json has a quantization_config); {_DEQUANTIZE}"
        )


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    """Refuse the few lines of text that stand for a file in a Git LFS clone; *start* is the file's beginning.

    Raises:
        DamagedCheckpointError: it is one.
    """
    if start.startswith(_LFS_POINTER):
        raise DamagedCheckpointError(str(path), "is a Git LFS pointer, not the file itself; run `git lfs pull` there")


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON file that must hold one object.

    Raises:
        DamagedCheckpointError: it does not, or is larger than `MAX_JSON_NBYTES`.
        InputError: it cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would be waited for, and a device may have no end
            raise InputError(str(path), "is not a regular file")
        with path.open("rb") as file:
            raw = file.read(min(os.fstat(file.fileno()).st_size, MAX_JSON_NBYTES) + 1)
        if len(raw) > MAX_JSON_NBYTES:
            raise DamagedCheckpointError(str(path), f"is larger than {MAX_JSON_NBYTES:,} bytes, which no such file is")
        parsed = json.loads(raw)
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError and UnicodeDecodeError, too
        raise DamagedCheckpointError(str(path), f"is not JSON ({error}); copy or download it again") from None
    if not isinstance(parsed, dict):
        raise DamagedCheckpointError(str(path), "is not a JSON object; copy or download it again")
    return parsed
