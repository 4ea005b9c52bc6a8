"""Memory that a thread works in, over and over: to be given fresh memory costs more than to compute in it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Tensors by name, each thread's own; what one holds is lost when its name is next asked for in that thread."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def tensor(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A tensor [numel] on the CPU, of any content; *dtype* is always the same for a *name*."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < numel:
            with torch.inference_mode(mode=False):  # what is made in that mode cannot be written to outside of it
                kept = self._kept[name] = torch.empty(numel, dtype=dtype, device="cpu")
        return kept if kept.numel() == numel else kept.narrow(0, 0, numel)


scratch = Scratch()
