"""Trained localisation (Localize-and-Stitch, arXiv 2408.13656): which few weights carry a task, by its own loss.

    minimise over S      loss(base + round(sigmoid(S)) * tau) + l1 * mean(sigmoid(S))

tau is the task vector, S one score a parameter; rounding lets gradients through as if it were not there, so that

    slope of S = (slope of the loss at the rounded weights * tau + l1 / n) * sigmoid(S) * (1 - sigmoid(S))

The paper's are the objective, the start from the largest moves, and gradient descent. Where we differ from its code:

- Its loss sees base + sigmoid(S) * tau, and the mask is rounded once, at the end. Ours sees the rounded mask all along.
- It steps by 1e7 times the slope. Our rate is in units of the first slope's root mean square, so that one suits models
  and losses of any scale, and falls to 0.
- It starts thinner than it means to end, and looks what density comes out. Ours starts at the density asked for and
  holds it: where a step sets more bits than there were, all scores go down by as much as unsets the least of them.
  What is below it is the work of l1.
- Scores start at ±2 (sigmoid 0.88 and 0.12), not ±5, where the slope of the sigmoid hardly lets them move.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from tallstore.checkpoints import Checkpoint, CheckpointSource, open_checkpoint
from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.errors import InputError, OptionError
from tallstore.fit.gain import check_number, is_number
from tallstore.fit.ties import trim_threshold
from tallstore.meter import Progress
from tallstore.packing.plan import Expert, Part, counts_for_the_trim, name_experts, parts_by_base_name
from tallstore.packing.stack import trimmable_chunks
from tallstore.tuning.loss import differentiable, gradients

Loss = Callable[[dict[str, Tensor]], Tensor]

_SMALLEST_RMS = 2.0**-100  # of a slope that says anything
_START = 2.0  # of a score inside the mask; outside it is the negative


def train_masks(
    base: CheckpointSource,
    expert: CheckpointSource | Checkpoint,
    loss: Loss,
    *,
    density: float = 0.01,
    steps: int = 200,
    learning_rate: float = 1.0,
    l1: float = 0.1,
    seed: int = 0,
    private: Sequence[str] = (),
    key_mapping: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Train one task's masks for `Localize`: which weights of an expert to keep so that its loss stays low.

        masks = {"spam": tallstore.train_masks("base/", "spam/", loss, density=0.01)}
        tallstore.pack("base/", {"spam": "spam/"}, "bundle/", method=tallstore.Localize(masks=masks))

    The masks fit the values as they are, and so `Localize` keeps them: what they hold, a gain of one would overshoot.

    Args:
        base: as for `pack`.
        expert: as for `pack`; one of them.
        loss: called with a state dict of the expert's names; gives a tensor of one number that torch can differentiate,
            as by `torch.func.functional_call(model, weights, batch)`. The weights are on the CPU, in the expert's
            dtypes. What has no mask (integers, other shapes, private=) is the expert's own there.
        density: the share of the parameters to keep. No more bits are ever set than in the mask of `Localize(density)`,
            which is where training starts.
        steps: of gradient descent; with 0 the result is that first mask.
        learning_rate: of the scores: by how much the first step moves them, in root mean square.
        l1: of the mean of sigmoid(S), added to the loss: the larger, the more weights are given up that do not pay.
        seed: of torch's random numbers in *loss*, such as those that choose its batches.
        private: glob patterns of tensor names that will be stored whole. `pack` stores tensors of fewer than 4,096
            elements whole too: name those here for masks that spend nothing on them. Batch norms' running statistics
            belong here: torch does not differentiate by them.
        key_mapping: as for `pack`.
        progress: called with the steps done and those in all.

    Returns:
        by the base's names, every floating-point tensor that both have: bool, on the CPU, of the shape of what both
        have of it.

    Cost:
        memory for 20 bytes a parameter (scores, task vector, weights, their gradients and the next step, in float32),
        and what *loss* takes; a step is one loss, its gradient, and about ten passes over the parameters.

    Raises:
        OptionError: an argument is outside its range; or *loss* gave no single number, one that is not finite, or one
            that cannot be differentiated: names the step.
        InputError: an input cannot be read, or the two have no names in common.
    """
    if not callable(loss):
        raise OptionError(f"train_masks: loss is {loss!r}; give a function of the weights")
    _check(density=density, steps=steps, learning_rate=learning_rate, l1=l1)
    patterns = (private,) if isinstance(private, str) else tuple(private)
    with ExitStack() as inputs:
        inputs.enter_context(torch.inference_mode(mode=False))
        opened_base = inputs.enter_context(open_checkpoint(base))
        opened = inputs.enter_context(expert if isinstance(expert, Checkpoint) else open_checkpoint(expert))
        localised = _Localised(opened_base, _named(opened_base, opened, key_mapping or {}), patterns, density)
        with differentiable(seed):
            for step in range(steps):
                slopes = localised.slopes(loss, f"train_masks: loss, step {step + 1},")
                localised.descend(slopes, learning_rate * (1 - step / steps), l1)
                del slopes  # as large as the model
                if progress is not None:
                    progress(step + 1, steps)
        return localised.masks()


def _check(*, density: float, steps: int, learning_rate: float, l1: float) -> None:
    if not is_number(density) or not 0 < density <= 1:
        raise OptionError(f"train_masks: density is {density!r}; give a share above 0 and at most 1, such as 0.01")
    if type(steps) is not int or steps < 0:
        raise OptionError(f"train_masks: steps is {steps!r}; give a whole number from 0, such as 200")
    check_number("train_masks", "learning_rate", learning_rate, 1.0)
    check_number("train_masks", "l1", l1, 0.1)


def _named(base: Checkpoint, expert: Checkpoint, key_mapping: Mapping[str, str]) -> Expert:
    """The expert, its tensors beside the base's."""
    try:
        [named] = name_experts(base, {"": expert}, key_mapping)
    except InputError as error:
        raise type(error)(error.where.replace("expert ''", "the expert"), error.problem) from None
    return named


@dataclass(frozen=True, eq=False)
class _Scored:
    """What base and expert both have of a tensor, and a score for each of its elements; all 1-D.

    Attributes:
        part: of the expert's tensor.
        base: the base's elements, in its own dtype; not to be written to.
        task_vector: float32.
        scores: float32; where they are above 0, sigmoid(S) rounds to 1.
    """

    part: Part
    base: Tensor
    task_vector: Tensor
    scores: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what both have."""
        return (self.part.rows, *self.part.spec.shape[1:]) if self.part.is_resized else self.part.spec.shape

    def masked(self) -> Tensor:
        """The weights, base + round(sigmoid(S)) * tau: in the expert's dtype and the shape of what both have."""
        wide = self.base if self.base.dtype is torch.float64 else self.base.float()
        moved = torch.where(self.scores > 0, wide + self.task_vector, wide)
        return moved.to(TORCH_DTYPES[self.part.spec.dtype]).view(self.shape)

    def slope(self, of_weights: Tensor, penalty: float) -> Tensor:
        """How the objective changes with each score, given how it changes with each weight: float32, 1-D."""
        sigmoid = torch.sigmoid(self.scores)
        slope = of_weights.reshape(-1).float() * self.task_vector
        return slope.add_(penalty).mul_(sigmoid).mul_(1 - sigmoid)


class _Localised:
    """An expert whose weights are its own where their scores say so, and else the base's."""

    def __init__(self, base: Checkpoint, expert: Expert, private: Sequence[str], density: float) -> None:
        """Score the largest moves, a share *density* of all, above the others."""
        parts = [
            (base_name, part)
            for base_name, [part] in parts_by_base_name(base, (expert,), private).items()
            if counts_for_the_trim(part, private)
        ]
        threshold = trim_threshold(
            lambda: (chunk for base_name, part in parts for chunk in trimmable_chunks(base, base_name, part)), density
        )
        self.scored = [_scored(base, base_name, part, threshold) for base_name, part in parts]
        self._base_names = [base_name for base_name, _ in parts]
        self._numel = sum(part.numel for _, part in parts)
        self._most = self._count()
        self._unit = 0.0  # of the rate: what takes the first slope to unit root mean square
        self._aliases = expert.aliases
        self._own = {}
        masked = {part.name: part.numel for _, part in parts}
        for name in expert.base_names:
            spec, start = expert.checkpoint.spec(name), masked.get(name, 0)
            own = expert.checkpoint.read(name, start).clone()  # a loss may write to buffers
            self._own[name] = own if start else own.view(spec.shape)

    def slopes(self, loss: Loss, where: str) -> list[Tensor]:
        """How the loss changes with each masked weight, in the shapes of what both have.

        Raises:
            OptionError: *loss*, which messages call *where*, is of no use.
        """
        leaves = [scored.masked().requires_grad_() for scored in self.scored]
        return gradients(functools.partial(loss, self._state_dict(leaves)), leaves, where)[1]

    def _state_dict(self, masked: Sequence[Tensor]) -> dict[str, Tensor]:
        """All tensors of the expert, those with scores as given."""
        weights = dict(self._own)
        for scored, leading in zip(self.scored, masked, strict=True):
            further = weights[scored.part.name]
            weights[scored.part.name] = (
                torch.cat([leading, further.view(-1, *leading.shape[1:])]) if further.numel() else leading
            )
        return weights | {name: weights[carrier] for name, carrier in self._aliases.items()}

    def descend(self, of_weights: Sequence[Tensor], rate: float, l1: float) -> None:
        """Take one step against the slope, and unset what is too many."""
        penalty = l1 / max(1, self._numel)
        slopes = [scored.slope(slope, penalty) for scored, slope in zip(self.scored, of_weights, strict=True)]
        if not self._unit:
            squares = sum(torch.linalg.vector_norm(slope, dtype=torch.float64).item() ** 2 for slope in slopes)
            rms = math.sqrt(squares / max(1, self._numel))
            self._unit = 1 / rms if rms > _SMALLEST_RMS else 0.0
        for scored, slope in zip(self.scored, slopes, strict=True):
            scored.scores.sub_(slope, alpha=rate * self._unit)
        surplus = self._count() - self._most
        if surplus > 0:
            set_scores = torch.cat([scored.scores[scored.scores > 0] for scored in self.scored])
            least = set_scores.kthvalue(surplus).values
            for scored in self.scored:
                scored.scores.sub_(least)

    def _count(self) -> int:
        return sum(int(torch.count_nonzero(scored.scores > 0)) for scored in self.scored)

    def masks(self) -> dict[str, Tensor]:
        """By the base's names: bool."""
        return {
            base_name: (scored.scores > 0).view(scored.shape)
            for base_name, scored in zip(self._base_names, self.scored, strict=True)
        }


def _scored(base: Checkpoint, base_name: str, part: Part, threshold: float) -> _Scored:
    task_vector = torch.cat(list(trimmable_chunks(base, base_name, part)))
    is_kept = (task_vector.abs() >= threshold) & (task_vector != 0)
    scores = torch.where(is_kept, _START, -_START)
    return _Scored(part, base.read(base_name, 0, part.numel), task_vector, scores)
