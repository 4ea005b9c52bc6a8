"""The payloads of one coded tensor of one task: gains, bits or fields, and the values of a sparse one."""

from __future__ import annotations

import tempfile
from typing import IO, Any

import numpy as np
import torch

from tallstore.fit import Coded, Kind, LocalizeFit
from tallstore.format import manifest as tables
from tallstore.format.encodings import BITS, GAINS, SHARED, SIGNED, UNIFORM
from tallstore.format.shard_writer import POOLED_NUMEL, PayloadSink, about_stored
from tallstore.packing.stack_fit import Scaled

#: The table entries of each kind: of leading rows, and of a whole tensor.
CODES: dict[Kind, tuple[Any, Any]] = {
    "mask": (tables.MaskCode, tables.MaskTensor),
    "signed": (tables.SignedCode, tables.SignedTensor),
    "two-level": (tables.TwoLevelCode, tables.TwoLevelTensor),
    "sign": (tables.SignCode, tables.SignTensor),
    "sparse": (tables.SparseCode, tables.SparseTensor),
    "uniform": (tables.UniformCode, tables.UniformTensor),
}
_IN_MEMORY_NBYTES = 16 << 20
_PIECE_NBYTES = 1 << 20
_VALUES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class CodeWriter:
    """Streams one tensor's codes into its task's shards, tile by tile."""

    def __init__(self, writer: PayloadSink, name: str, scaled: Scaled, *, row_axes: int) -> None:
        self._writer, self._name, self._kind = writer, name, scaled.fit.kind
        self._fields: dict[str, Any] = {"row_axes": row_axes}
        self._gains = scaled.gains
        self._gains_nbytes = 0
        self._role, encoding = "bits", BITS
        if self._kind == "signed":
            self._role, encoding = "fields", SIGNED
        elif self._kind == "uniform":
            levels = scaled.fit.levels or 4
            self._role, encoding = "fields", UNIFORM[levels]
            self._fields["levels"] = levels
        self._codes = writer.payload("mask", f"{self._role}/{name}", encoding, ranked=self._kind == "sparse")
        # Payloads of one shard are written one after the other: a sparse tensor's values wait for its bits.
        sparse = self._kind == "sparse"
        self._values = tempfile.SpooledTemporaryFile(_IN_MEMORY_NBYTES) if sparse else None  # noqa: SIM115 - see `finish`
        self._values_nbytes = 0
        self._unit = scaled.unit
        self._values_dtype = scaled.fit.values_dtype if isinstance(scaled.fit, LocalizeFit) else "F16"

    def append(self, coded: Coded) -> None:
        """Add the codes of the next tile, and its values if it is sparse."""
        self._codes.append(coded.codes.numpy())
        if self._values is not None and coded.values is not None:
            stored = coded.values.to(_VALUES[self._values_dtype])
            self._values.write(stored.view(torch.uint8).numpy().data)

    def finish(self) -> dict[str, Any]:
        """Write what is left; the fields of the tensor's entry, but for its identity."""
        self._fields[self._role] = self._codes.finish()
        if self._gains.size == 1:
            self._fields["gain"] = self._gains.item()
        else:
            raw = np.ascontiguousarray(self._gains).view(np.uint8)
            self._fields["gains"] = self._writer.whole("mask", f"gains/{self._name}", GAINS, self._gains.size, raw)
            self._gains_nbytes = about_stored(raw, GAINS, self._gains.size)
        if self._values is not None:
            values = self._write_values(self._values)
            self._fields |= {
                "count": self._codes.rank,
                "values_dtype": self._values_dtype,
                "unit": self._unit,
                "values": values,
            }
        return self._fields

    def _write_values(self, values: IO[bytes]) -> tables.Payload | None:
        count = self._codes.rank
        values.seek(0)
        encoding, key = SHARED[self._values_dtype], f"values/{self._name}"
        with values:
            if not count:
                return None
            if count < POOLED_NUMEL:
                raw = np.frombuffer(values.read(), np.uint8)
                self._values_nbytes = raw.size
                return self._writer.whole("mask", key, encoding, count, raw)
            payload = self._writer.payload("mask", key, encoding)
            while piece := values.read(_PIECE_NBYTES):
                payload.append(np.frombuffer(piece, np.uint8))
        placed = payload.finish()
        self._values_nbytes = payload.stored_nbytes
        return placed

    def discard(self) -> None:
        """Take back everything: the tensor will be stored whole."""
        self._codes.discard()
        if self._values is not None:
            self._values.close()

    @property
    def nbytes(self) -> int:
        """Bytes of what was stored so far."""
        return self._gains_nbytes + self._codes.stored_nbytes + self._values_nbytes
