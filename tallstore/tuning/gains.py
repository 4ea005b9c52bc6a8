"""Calibration: one factor a coded tensor, chosen by how a task's outputs change.

    minimise over f      loss(base + f * (expert from the bundle - base))            f > 0, from 1

A fit sets gains from the weights alone. BitDelta (arXiv 2402.10193) trains its scale of every matrix until the outputs
come near the fine-tune's; here any method's gains are multiplied by what is found, and a tensor's rows by one factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tallstore.errors import OptionError
from tallstore.fit.gain import is_number
from tallstore.packing.calibrating import Tuned, WeightsAt
from tallstore.tuning.loss import differentiable, gradients, value_of

_WIDEST = 8.0  # the largest factor, and one part in as many the smallest
TaskLoss = Callable[[str, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Calibration:
    """How `pack(…, calibrate=…)` tunes the gains of each task on a few unlabelled batches.

        texts = {task: tokenizer(examples[task], return_tensors="pt", padding=True) for task in experts}
        with torch.no_grad():
            expected = {task: models[task](**texts[task]).logits for task in experts}

        def loss(task, weights):
            found = torch.func.functional_call(models[task], weights, kwargs=dict(texts[task])).logits
            return torch.nn.functional.mse_loss(found, expected[task])

        tallstore.pack(base, experts, out, calibrate=tallstore.Calibration(loss))

    Args:
        loss: called with a task and the state dict of its expert; says how far the outputs with these weights are from
            the true expert's, as a tensor of one number that torch can differentiate. The weights are on the CPU in the
            expert's dtypes: move them if the model is elsewhere. Before and after are compared by it, so give it the
            same batches at every call, or draw them by torch's own random numbers, which are seeded here.
        steps: of Adam, a task.
        learning_rate: of the factors' logarithms; it falls to 0 over the steps.
    """

    loss: TaskLoss
    steps: int = 50
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what is outside the documented ranges."""
        if not callable(self.loss):
            raise OptionError(f"Calibration: loss is {self.loss!r}; give a function of a task and its weights")
        if type(self.steps) is not int or self.steps < 1:
            raise OptionError(f"Calibration: steps is {self.steps!r}; give a whole number from 1, such as 50")
        if not is_number(self.learning_rate) or self.learning_rate <= 0:
            raise OptionError(f"Calibration: learning_rate is {self.learning_rate!r}; give a number above 0, as 0.02")

    def tune(self, task: str, weights_at: WeightsAt, count: int, after_step: Callable[[], None]) -> Tuned:
        """Minimise the task's loss over *count* factors between 1/8 and 8.

        Cost:
            *steps* + 1 calls of the loss, and their gradients.

        Raises:
            OptionError: the loss is no finite number, or not differentiable; names the task.
        """
        logarithms = torch.zeros(count, dtype=torch.float32, device="cpu", requires_grad=True)
        optimiser = torch.optim.Adam([logarithms], lr=self.learning_rate)
        before = math.nan
        with differentiable(seed=0):
            for step in range(self.steps):
                value, [slope] = gradients(
                    lambda: self.loss(task, weights_at(logarithms.exp())),
                    [logarithms],
                    f"calibrate: the loss of task {task!r}, step {step + 1},",
                )
                before = before if step else value
                logarithms.grad = slope
                optimiser.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.steps)
                optimiser.step()
                with torch.no_grad():
                    logarithms.clamp_(-math.log(_WIDEST), math.log(_WIDEST))
                after_step()
        with differentiable(seed=0), torch.no_grad():  # draws what the first step drew
            factors = logarithms.exp()
            after = value_of(self.loss(task, weights_at(factors)), f"calibrate: the loss of task {task!r}, at the end,")
        return Tuned(tuple(factors.tolist()), before, after)
