"""Memory that a thread works in, over and over: to be given fresh memory costs more than to compute in it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Tensors by name, each thread's own; what one holds is lost when its name is next asked for in that thread."""

    def __init__(self) -> None:
        self._whole: dict[str, Tensor] = {}
        self._last: dict[str, tuple[int, Tensor]] = {}  # tiles are of one size, most of the time

    def tensor(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A tensor [numel] on the CPU, of any content; *dtype* is always the same for a *name*."""
        last = self._last.get(name)
        if last is not None and last[0] == numel:
            return last[1]
        whole = self._whole.get(name)
        with torch.inference_mode(mode=False):  # what is made in that mode cannot be written to outside of it
            if whole is None or whole.numel() < numel:
                whole = self._whole[name] = torch.empty(numel, dtype=dtype, device="cpu")
            part = whole.narrow(0, 0, numel)
        self._last[name] = (numel, part)
        return part


scratch = Scratch()
