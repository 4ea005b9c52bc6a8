"""The fits as their formulas have them: dense, on whole tensors. What packed bundles are compared with.

A fit shapes a reconstruction R out of task vectors that are stacked as [tasks, rows, length], one tensor at a time, and
a gain scales it. Everything is in one precision: float64 for a reference, float32 where many variants are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
By = Literal["tensor", "row"]
Span = Literal["row", "tensor", "layer", "task"]
Gain = Literal["one", "least-squares", "norm", "magnitudes", "published"]
#: Task vectors [tasks, rows, length], and of each task the smallest magnitude to keep: R, of the same shape.
Shape = Callable[[Tensor, Sequence[float]], Tensor]

SMALL = 4096  # tensors below it are kept whole
SHORTEST_ROW = 64  # tensors of shorter rows are one row
# The step, for 3 levels the threshold, of least squared error on a normal distribution, and what is tried around it.
WIDTHS = {3: 0.6120, 4: 0.9957, 8: 0.5860, 16: 0.3352}
AROUND = (0.85, 1.0, 1.15, 1.35, 1.6)


@dataclass(frozen=True)
class DenseFit:
    """A fit.

    Attributes:
        shape: makes R.
        gain: what scales it. "one" makes <gain * R, tau> = ||tau||^2, "least-squares" makes ||tau - gain * R|| least,
            "norm" makes ||gain * R|| = ||tau||, "magnitudes" the same of sums of magnitudes, and "published" is 1.
        by: what has a gain of its own: rows, tensors, layers (see `layer_of`) or whole tasks.
        kept: the share of all parameters of a task, the largest, that *shape* is told of by their smallest magnitude.
        small: tensors with fewer elements are kept whole.
        whole: text in the names of other tensors that are kept whole.
        times: the gain is multiplied by it.
    """

    shape: Shape
    gain: Gain = "one"
    by: Span = "tensor"
    kept: float | None = None
    small: int = SMALL
    whole: tuple[str, ...] = ()
    times: float = 1.0


def rebuild(
    fit: DenseFit, base: Weights, experts: Mapping[str, Weights], precision: torch.dtype = torch.float64
) -> dict[str, dict[str, Tensor]]:
    """Each expert as *fit* has it: base + gain * R in *precision*, cast once to the expert's dtype.

    What is small, not floating-point, or not there in the base's shape is the expert's own.
    """
    cutoffs = dict.fromkeys(experts, 0.0)
    if fit.kept is not None:
        cutoffs = {task: cutoff(base, weights, fit.kept) for task, weights in experts.items()}
    by_layer: dict[str, list[str]] = {}
    for name in base:
        if is_coded(fit, base, name):
            by_layer.setdefault({"layer": layer_of(name), "task": ""}.get(fit.by, name), []).append(name)
    rebuilt = {task: dict(weights) for task, weights in experts.items()}
    for names in by_layer.values():
        found = {
            name: _shaped(fit, base[name], {task: own[name] for task, own in experts.items()}, cutoffs, precision)
            for name in names
        }
        gains = _gains(fit, found)
        for name, parts in found.items():
            for task, (_, shaped) in parts.items():
                step = (gains[task] * fit.times * shaped).reshape(base[name].shape)
                total = torch.where(step == 0, base[name].to(precision), base[name].to(precision) + step)
                rebuilt[task][name] = total.to(experts[task][name].dtype)
    return rebuilt


def is_coded(fit: DenseFit, base: Weights, name: str) -> bool:
    """Whether *fit* codes a tensor of the base."""
    tensor = base[name]
    return tensor.is_floating_point() and tensor.numel() >= fit.small and not any(text in name for text in fit.whole)


def layer_of(name: str) -> str:
    """`encoder.layer.3` of `encoder.layer.3.output.dense.weight`: up to the first number, or all but the last word."""
    words = name.split(".")
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0] + 1] if numbers else words[:-1])


def rows_of(tensor: Tensor) -> Tensor:
    """*tensor* as [rows, length]."""
    is_one_row = tensor.ndim < 2 or tensor[0].numel() < SHORTEST_ROW
    return tensor.reshape(1 if is_one_row else tensor.shape[0], -1)


def task_vector(base: Tensor, finetuned: Tensor, precision: torch.dtype) -> Tensor:
    """Finetuned - base as [rows, length]."""
    return rows_of(finetuned.to(precision) - base.to(precision))


def cutoff(base: Weights, weights: Weights, kept: float) -> float:
    """The smallest magnitude of the largest share *kept* of all of a task's parameters together."""
    names = [name for name in base if base[name].is_floating_point() and weights[name].shape == base[name].shape]
    magnitudes = torch.cat([(weights[name].float() - base[name].float()).abs().reshape(-1) for name in names])
    return float(magnitudes.kthvalue(magnitudes.numel() - int(magnitudes.numel() * kept)).values)


def _shaped(
    fit: DenseFit, base: Tensor, finetuned: Mapping[str, Tensor], cutoffs: Mapping[str, float], precision: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """Task vector and R of the tasks that moved a tensor."""
    vectors = {task: task_vector(base, own, precision) for task, own in finetuned.items() if own.shape == base.shape}
    moved = {task: vector for task, vector in vectors.items() if vector.any()}
    if not moved:
        return {}
    stack = torch.stack(list(moved.values()))
    return dict(zip(moved, zip(stack, fit.shape(stack, [cutoffs[task] for task in moved]), strict=True), strict=True))


def _gains(fit: DenseFit, found: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """By task: a number, or one a row as [rows, 1]."""
    sums: dict[str, Tensor] = {}
    for parts in found.values():
        for task, (vector, shaped) in parts.items():
            terms = {
                "one": (vector * vector, vector * shaped),
                "least-squares": (vector * shaped, shaped * shaped),
                "norm": (vector * vector, shaped * shaped),
                "magnitudes": (vector.abs(), shaped.abs()),
            }.get(fit.gain)
            if terms is None:
                continue
            by_row = torch.stack([term.sum(1, keepdim=True) for term in terms])
            sums[task] = sums.get(task, 0.0) + (by_row if fit.by == "row" else by_row.sum(1, keepdim=True))
    if fit.gain == "published":
        return {task: torch.tensor(1.0) for parts in found.values() for task in parts}
    gains = {task: torch.where(below > 0, above / below, 0.0) for task, (above, below) in sums.items()}
    return {task: gain.sqrt() for task, gain in gains.items()} if fit.gain == "norm" else gains


def cosine(fit: DenseFit, base: Weights, expert: Weights, rebuilt: Weights) -> float:
    """Between a task vector and what was rebuilt of it, over what *fit* codes."""
    sums = torch.zeros(3, dtype=torch.float64)
    for name in base:
        if is_coded(fit, base, name) and expert[name].shape == base[name].shape:
            vector, step = (task_vector(base[name], weights[name], torch.float64) for weights in (expert, rebuilt))
            sums += torch.stack([(vector * step).sum(), (vector * vector).sum(), (step * step).sum()])
    along, ours, theirs = sums.tolist()
    return along / (ours * theirs) ** 0.5 if along else 0.0


# ---- shapes ----------------------------------------------------------------------------------------------------------


def rms(stack: Tensor, by: By) -> Tensor:
    """Root mean square of the tensor or of its rows: [tasks, 1, 1] or [tasks, rows, 1]; 1 where nothing moved."""
    found = stack.square().mean(dim=(1, 2) if by == "tensor" else 2, keepdim=True).sqrt()
    return torch.where(found > 0, found, 1.0)


def mean_magnitude(magnitudes: Tensor, _threshold: float) -> Tensor:
    """Over the tasks: [rows, length]."""
    return magnitudes.mean(0)


def root_mean_square(magnitudes: Tensor, _threshold: float) -> Tensor:
    """Over the tasks."""
    return magnitudes.square().mean(0).sqrt()


def median(magnitudes: Tensor, _threshold: float) -> Tensor:
    """Over the tasks; of an even number, the mean of both in the middle."""
    ascending = magnitudes.sort(0).values
    return (ascending[(len(magnitudes) - 1) // 2] + ascending[len(magnitudes) // 2]) / 2


def alternating(magnitudes: Tensor, threshold: float) -> Tensor:
    """The mean of those that exceed threshold * itself: found by turns, from the mean of all."""
    merged = magnitudes.mean(0)
    for _ in range(5):
        kept = magnitudes > threshold * merged
        count = kept.sum(0)
        merged = torch.where(count > 0, (magnitudes * kept).sum(0) / count.clamp(min=1), merged)
    return merged


def signed_mask(
    threshold: float, by: By = "tensor", shared: Callable[[Tensor, float], Tensor] = mean_magnitude
) -> Shape:
    """Sign of v where |v| > threshold * merged, times merged; v is tau at unit root mean square."""

    def shape(stack: Tensor, _cutoffs: Sequence[float]) -> Tensor:
        scale = rms(stack, by)
        units = stack / scale
        merged = shared(units.abs(), threshold)
        kept = units.abs() > (threshold if len(stack) > 1 else 0.0) * merged
        return scale * torch.where(kept, units.sign(), 0.0) * merged

    return shape


def tall_mask(mask_lambda: float, *, ties: bool = False, normalise: bool = False) -> Shape:
    """Merged where |tau| > lambda * |merged - tau|; merged is the sum of the task vectors, or their TIES merge."""

    def shape(stack: Tensor, cutoffs: Sequence[float]) -> Tensor:
        scale = rms(stack, "tensor") if normalise else torch.ones(len(stack), 1, 1, dtype=stack.dtype)
        units = stack / scale
        merged = units.sum(0)
        if ties:
            limits = torch.tensor(cutoffs, dtype=stack.dtype)[:, None, None]
            trimmed = torch.where(stack.abs() >= limits, units, 0.0)
            merged = torch.where(trimmed.sign() == trimmed.sum(0).sign(), trimmed, 0.0).sum(0)
        return scale * torch.where(units.abs() > mask_lambda * (merged - units).abs(), merged, 0.0)

    return shape


def emr(stack: Tensor, _cutoffs: Sequence[float]) -> Tensor:
    """The largest magnitude of the elected sign, where a task's sign is that one."""
    elected = stack.sum(0).sign()
    merged = elected * (stack * elected).clamp(min=0).amax(0)
    return torch.where(stack.sign() * elected > 0, merged, 0.0)


def least_squares(levels: Literal[1, 2], by: By = "row") -> Shape:
    """The nearest of merged and 0, or of merged and merged_lo, which leave the least squared error."""

    def shape(stack: Tensor, _cutoffs: Sequence[float]) -> Tensor:
        scale = rms(stack, by)
        units = stack / scale
        ascending = units.sort(0).values
        count = torch.arange(1, len(stack) + 1, dtype=stack.dtype)[:, None, None]
        rising, falling = ascending.cumsum(0), ascending.flip(0).cumsum(0)
        if levels == 1:
            sums = torch.cat([falling, rising])
            means = sums / torch.cat([count, count])
            upper = means.gather(0, (sums * means).argmax(0, keepdim=True))[0]
            lower = torch.zeros_like(upper)
        elif len(stack) == 1:
            upper = lower = units[0]
        else:
            low, high = (rising / count)[:-1], (falling / count).flip(0)[1:]
            gained = rising[:-1] * low + falling.flip(0)[1:] * high
            best = gained.argmax(0, keepdim=True)
            lower, upper = low.gather(0, best)[0], high.gather(0, best)[0]
        moved = stack.any(2, keepdim=True)  # rows that did not move have no scale, and stay the base's
        return torch.where(moved, scale, 0.0) * torch.where((units - upper).abs() < (units - lower).abs(), upper, lower)

    return shape


def sign(by: By = "tensor") -> Shape:
    """The sign, 0 counting as plus, times the mean magnitude of the tensor or of the row."""

    def shape(stack: Tensor, _cutoffs: Sequence[float]) -> Tensor:
        scale = stack.abs().mean(dim=(1, 2) if by == "tensor" else 2, keepdim=True)
        return torch.where(stack < 0, -scale, scale)

    return shape


def uniform(levels: Literal[3, 4, 8, 16], by: By = "row", threshold: float | None = None) -> Shape:
    """Evenly spaced levels; by row, the width of the largest cosine and the scale of least squares."""

    def level(units: Tensor, width: float) -> Tensor:
        if levels == 3:
            return torch.where(units.abs() > width, units.sign(), 0.0)
        return (units / width).floor().clamp(-levels / 2, levels / 2 - 1) + 0.5

    def shape(stack: Tensor, _cutoffs: Sequence[float]) -> Tensor:
        moved = stack.any(2, keepdim=True)  # as in least_squares
        scale = torch.where(moved, rms(stack, by), 0.0)
        units = stack / rms(stack, by)
        width = WIDTHS[levels] if threshold is None else threshold
        if by == "tensor":
            return scale.amax(1, keepdim=True) * level(units, width)
        best, kept = torch.full_like(scale, -1.0), torch.zeros_like(stack)
        for factor in AROUND if threshold is None else (1.0,):
            found = level(units, factor * width)
            along, energy = (found * units).sum(2, keepdim=True), found.square().sum(2, keepdim=True)
            cosine = torch.where(energy > 0, along / energy.sqrt(), 0.0)
            kept = torch.where(cosine > best, scale * found * torch.where(energy > 0, along / energy, 0.0), kept)
            best = torch.maximum(best, cosine)
        return kept

    return shape


def localize(stack: Tensor, cutoffs: Sequence[float]) -> Tensor:
    """The task vector's own values from its cutoff on."""
    return torch.where(stack.abs() >= torch.tensor(cutoffs, dtype=stack.dtype)[:, None, None], stack, 0.0)


def asymmetric(nbits: int) -> Shape:
    """Task vector quantization (arXiv 2503.06921): 2^nbits levels from the tensor's least value to its largest."""

    def shape(stack: Tensor, _cutoffs: Sequence[float]) -> Tensor:
        least, largest = stack.amin((1, 2), keepdim=True), stack.amax((1, 2), keepdim=True)
        step = (largest - least) / (2**nbits - 1)
        zero = (-least / step).round()
        return step * (((stack / step).round() + zero).clamp(0, 2**nbits - 1) - zero)

    return shape
