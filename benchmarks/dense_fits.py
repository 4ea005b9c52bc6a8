"""The fits as their formulas have them: dense, float64, on whole tensors. What packed bundles are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
DenseFit = Callable[[Weights, Mapping[str, Weights]], dict[str, dict[str, Tensor]]]

SMALL = 4096  # tensors below it are kept whole by every fit


def task_vectors(base: Weights, experts: Mapping[str, Weights]) -> dict[str, dict[str, Tensor]]:
    """Finetuned - base in float64, by task and tensor."""
    return {
        task: {name: weights[name].double() - base[name].double() for name in base} for task, weights in experts.items()
    }


def rebuilt(
    base: Weights, experts: Mapping[str, Weights], parts: Mapping[str, Weights]
) -> dict[str, dict[str, Tensor]]:
    """Base + part in float64, cast once to the expert's dtype; small tensors are the expert's own."""
    return {
        task: {
            name: weights[name]
            if weights[name].numel() < SMALL
            else (base[name].double() + parts[task][name]).to(weights[name].dtype)
            for name in base
        }
        for task, weights in experts.items()
    }


def gain_one(part: Tensor, task_vector: Tensor) -> Tensor:
    """*part* scaled so that its projection on the task vector is one."""
    return part * (task_vector.square().sum() / (part * task_vector).sum())


def signed_mask(threshold: float) -> DenseFit:
    """mask_t = sign(v_t) where |v_t| > threshold * mean |v|, v_t = tau_t at unit RMS a tensor; gain one."""

    def fit(base: Weights, experts: Mapping[str, Weights]) -> dict[str, dict[str, Tensor]]:
        vectors = task_vectors(base, experts)
        parts: dict[str, dict[str, Tensor]] = {task: {} for task in experts}
        for name in base:
            unit = {task: vectors[task][name] / vectors[task][name].square().mean().sqrt() for task in experts}
            merged = torch.stack([value.abs() for value in unit.values()]).mean(0)
            for task, value in unit.items():
                mask = torch.where(value.abs() > threshold * merged, value.sign(), 0.0)
                parts[task][name] = gain_one(mask * merged, vectors[task][name])
        return rebuilt(base, experts, parts)

    return fit


def tall_mask(mask_lambda: float, *, ties: bool, one: bool) -> DenseFit:
    """mask_t = |tau_t| > lambda |merged - tau_t|; merged the sum of task vectors, or their TIES merge."""

    def fit(base: Weights, experts: Mapping[str, Weights]) -> dict[str, dict[str, Tensor]]:
        vectors = task_vectors(base, experts)
        kept = {task: _trim(vector) for task, vector in vectors.items()} if ties else vectors
        parts: dict[str, dict[str, Tensor]] = {task: {} for task in experts}
        for name in base:
            stacked = torch.stack([kept[task][name] for task in experts])
            if ties:
                elected = stacked.sum(0).sign()
                stacked = torch.where(stacked.sign() == elected, stacked, 0.0)
            merged = stacked.sum(0)
            for task in experts:
                vector = vectors[task][name]
                mask = vector.abs() > mask_lambda * (merged - vector).abs()
                part = mask * merged
                parts[task][name] = gain_one(part, vector) if one else part
        return rebuilt(base, experts, parts)

    return fit


def _trim(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The largest 20 % of magnitudes over all parameters together."""
    magnitudes = torch.cat([part.abs().reshape(-1) for part in vector.values()])
    numel = magnitudes.numel()
    limit = magnitudes.kthvalue(numel - int(numel * 0.2)).values
    return {name: torch.where(part.abs() >= limit, part, 0.0) for name, part in vector.items()}
