"""A small real problem: a classifier, two fine-tunes of it, and batches to tune on and to score on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tests.packing_cases import Model

_CLASSES, _WIDTH, _HIDDEN, _NOISE = 12, 32, 128, 0.7


@dataclass(frozen=True)
class Batch:
    """Inputs [n, 32] and labels [n]."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Score:
    """On the held-out batch."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Problem:
    """What was trained.

    Attributes:
        model: to be called with weights.
        base, experts: state dicts.
        seen, held_out: batches by task, to tune on and to score on; neither was trained on.
    """

    model: nn.Module
    base: Model
    experts: dict[str, Model]
    seen: dict[str, Batch]
    held_out: dict[str, Batch]

    def loss(self, task: str) -> Callable[[Model], Tensor]:
        """Cross entropy on the batch to tune on."""
        batch = self.seen[task]
        return lambda weights: functional.cross_entropy(
            functional_call(self.model, weights, batch.inputs), batch.labels
        )

    def score(self, task: str, weights: Model) -> Score:
        """How good the weights are."""
        batch = self.held_out[task]
        with torch.no_grad():
            outputs = functional_call(self.model, weights, batch.inputs)
        accuracy = (outputs.argmax(1) == batch.labels).float().mean().item()
        return Score(functional.cross_entropy(outputs, batch.labels).item(), accuracy)

    def distance(self, task: str, batches: dict[str, Batch]) -> Callable[[Model], Tensor]:
        """Mean squared distance of the outputs to the true expert's, on one of the batches."""
        inputs = batches[task].inputs
        with torch.no_grad():
            expected = functional_call(self.model, self.experts[task], inputs)
        return lambda weights: functional.mse_loss(functional_call(self.model, weights, inputs), expected)


def trained_problem() -> Problem:
    """Train it: about two seconds, the same weights every time on one machine."""
    centres = torch.randn(_CLASSES, _WIDTH, generator=torch.Generator().manual_seed(0))

    def draw(count: int, seed: int, change: Callable[[Tensor], Tensor]) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, _CLASSES, (count,), generator=generator)
        inputs = centres[labels] + _NOISE * torch.randn(count, _WIDTH, generator=generator)
        return Batch(change(inputs), labels)

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "flipped": lambda inputs: torch.cat([-inputs[:, :8], inputs[:, 8:]], dim=1),
        "shifted": lambda inputs: inputs + 1.5 * torch.sin(torch.arange(_WIDTH)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(_WIDTH, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _CLASSES),
        )

    def train(steps: int, rate: float, seed: int, change: Callable[[Tensor], Tensor]) -> Model:
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
        for step in range(steps):
            batch = draw(128, seed + step, change)
            optimiser.zero_grad()
            functional.cross_entropy(model(batch.inputs), batch.labels).backward()
            optimiser.step()
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    base = train(200, 2e-3, 1000, lambda inputs: inputs)
    experts = {}
    for task, change in changes.items():
        model.load_state_dict(base)
        experts[task] = train(200, 1e-3, 100_000, change)
    model.requires_grad_(requires_grad=False)
    return Problem(
        model,
        base,
        experts,
        {task: draw(512, 6, change) for task, change in changes.items()},
        {task: draw(3000, 5, change) for task, change in changes.items()},
    )
