"""Memory that a thread works in, over and over: to be given fresh memory costs more than to compute in it."""

from __future__ import annotations

import threading
from typing import Final

import torch
from torch import Tensor

_SMALLEST_NUMEL: Final = 1 << 19  # a tile, so that few grow
_MAX_PARTS: Final = 256


class Scratch(threading.local):
    """Tensors by name, each thread's own; what one holds is lost when its name is next asked for in that thread."""

    def __init__(self) -> None:
        self._whole: dict[str, Tensor] = {}
        self._parts: dict[tuple[str, int], Tensor] = {}  # a model has tiles of few sizes: to make a view costs too

    def tensor(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A tensor [numel] on the CPU, of any content; *dtype* is always the same for a *name*."""
        part = self._parts.get((name, numel))
        return self._part(name, numel, dtype) if part is None else part

    def _part(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        whole = self._whole.get(name)
        if len(self._parts) >= _MAX_PARTS or (whole is not None and whole.numel() < numel):
            self._parts.clear()  # those of memory that is given up among them
        with torch.inference_mode(mode=False):  # what is made in that mode cannot be written to outside of it
            if whole is None or whole.numel() < numel:
                whole = self._whole[name] = torch.empty(max(numel, _SMALLEST_NUMEL), dtype=dtype, device="cpu")
            part = self._parts[name, numel] = whole.narrow(0, 0, numel)
        return part


scratch = Scratch()
