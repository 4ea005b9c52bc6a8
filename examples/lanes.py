"""A model that many threads ask: for one expert or another, in batches, and never two of them at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH = 16


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """BATCH rows at a time, padded: rounding depends on shapes, and an answer must not depend on who asks beside it."""
    padded = functional.pad(images, (0, 0, 0, -len(images) % BATCH))
    return torch.cat([model(rows) for rows in padded.split(BATCH)])[: len(images)]


class Lane:
    """A model and those who wait for it: whoever's turn it is answers all who wait for the same expert."""

    def __init__(
        self, experts: Sequence[str], model: nn.Module, using: Callable[[str], AbstractContextManager[object]]
    ) -> None:
        self.waiting = {expert: queue.SimpleQueue() for expert in experts}
        self.model, self.using = model, using
        self.turn, self.turns, self.answered = threading.Lock(), 0, 0

    def ask(self, expert: str, pixels: list[float]) -> list[float]:
        """Return the logits of *expert*; for many threads at once."""
        waiting, mine = self.waiting[expert], Future()
        waiting.put((pixels, mine))
        with self.turn:
            if asked := [waiting.get() for _ in range(waiting.qsize())]:
                self._answer(expert, *zip(*asked, strict=True))
        return mine.result()

    def _answer(self, expert: str, images: tuple[list[float], ...], futures: tuple[Future, ...]) -> None:
        self.turns, self.answered = self.turns + 1, self.answered + len(images)
        try:
            with self.using(expert):  # in this block, no other thread can switch the model
                answers = logits(self.model, torch.tensor(images)).tolist()
            for future, answer in zip(futures, answers, strict=True):
                future.set_result(answer)
        except Exception as error:  # noqa: BLE001 - all who wait hear of it
            for future in futures:
                future.set_exception(error)
