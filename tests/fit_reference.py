"""The methods, written straight from their formulas: dense, whole tensors, one after the other.

They share no code with tallstore's fits. Sums run in the order of the tasks, and roundings are the ones that the
specification names, so that what is selected and what is stored can be compared bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests import reference

LOG4 = np.array([reference.log4(code) for code in range(16)])
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SMALLEST = 2.0**-60


def task_vector(base: Tensor, finetuned: Tensor) -> Tensor:
    """finetuned - base, rounded once to float32."""
    return (finetuned.double() - base.double()).float()


def rms(vector: Tensor) -> float:
    """Root mean square."""
    return math.sqrt((vector.double() ** 2).sum().item() / vector.numel())


def rows(tensor: Tensor) -> Tensor:
    """[rows, length]: a row is an index of the first dimension; a tensor of 0 or 1 dimensions is one row."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(1, -1)


# --- shared vectors, and how they are stored --------------------------------------------------------------------------


class Shared(NamedTuple):
    """A shared vector as stored.

    Attributes:
        codes: uint8 log4 codes, int8 codes, or values in the shared dtype; of the tensor's shape.
        steps: float32, one a row; None for F32, BF16 and F16.
        units: what the codes stand for, in steps: float32, of the tensor's shape.
        values: what they stand for at gain one: float32, of the tensor's shape.
    """

    codes: Tensor
    steps: Tensor | None
    units: Tensor
    values: Tensor


def store(merged: Tensor, dtype: str) -> Shared:
    """Store a float32 shared vector."""
    if dtype in TORCH_DTYPES:
        kept = torch.where(merged.abs() < SMALLEST, 0.0, merged)
        codes = kept.to(TORCH_DTYPES[dtype])
        codes = torch.where(codes == 0, 0.0, codes).to(codes.dtype)  # -0.0 has no place in a bundle
        return Shared(codes, None, codes.float(), codes.float())
    largest = rows(merged).abs().amax(1).double() / (127 if dtype == "I8" else 1)
    steps = torch.tensor([reference.r13(value) for value in largest.tolist()], dtype=torch.float32)
    ratio = rows(merged) / torch.where(steps > 0, steps, 1.0)[:, None]
    if dtype == "I8":
        codes = torch.from_numpy(np.rint(ratio.numpy()).clip(-127, 127).astype(np.int8))
        units = codes.float()
    else:
        codes = nearest_log4(ratio)
        units = torch.from_numpy(LOG4.astype(np.float32))[codes.long()]
    shape = merged.shape
    return Shared(codes.view(shape), steps, units.view(shape), (units * steps[:, None]).view(shape))


def nearest_log4(ratio: Tensor) -> Tensor:
    """The code of the nearest log4 value, of the larger on a tie: uint8, of the ratio's shape."""
    distance = np.abs(ratio.double().numpy()[..., None] - LOG4)
    return torch.from_numpy(distance.argmin(-1).astype(np.uint8))  # the first, and largest, of equals


# --- SignedMask -------------------------------------------------------------------------------------------------------


def unit_magnitude(vector: Tensor) -> Tensor:
    """|v_t|: the task vector's magnitude at unit root mean square."""
    return vector.abs() * np.float32(1.0 / rms(vector)).item()


def mean_magnitude(vectors: Sequence[Tensor]) -> Tensor:
    """Mean over the tasks of |v_t|."""
    return in_order([unit_magnitude(vector) for vector in vectors]) / len(vectors)


def signed_sides(vector: Tensor, stored: Tensor, threshold: float, *, alone: bool = False) -> Tensor:
    """sign(v_t) where |v_t| > threshold * merged, else 0; all signs where no other task moved. int8."""
    kept = unit_magnitude(vector) > np.float32(0.0 if alone else threshold).item() * stored
    return torch.where(kept & (stored > 0), torch.sign(vector), 0.0).to(torch.int8)


# --- TallMask ---------------------------------------------------------------------------------------------------------


def merge(vectors: Sequence[Tensor], how: str, thresholds: Sequence[float] = ()) -> Tensor:
    """The sum or mean of task vectors, or their TIES merge for the smallest magnitudes that its trim keeps."""
    if how == "ties":
        trimmed = [
            torch.where(vector.abs() >= threshold, vector, 0.0)
            for vector, threshold in zip(vectors, thresholds, strict=True)
        ]
        elected = torch.sign(in_order(trimmed))
        return in_order([torch.where(values * elected > 0, values, 0.0) for values in trimmed])
    return in_order(vectors) / (len(vectors) if how == "mean" else 1)


def trim_threshold(vectors: Sequence[Tensor], kept: float = 0.2) -> float:
    """The smallest magnitude that TIES' trim keeps, over all tensors of one task together."""
    magnitudes = torch.cat([vector.reshape(-1).abs() for vector in vectors])
    return magnitudes.kthvalue(magnitudes.numel() - int(magnitudes.numel() * kept)).values.item()


def tall_sides(vector: Tensor, stored: Tensor, mask_lambda: float) -> Tensor:
    """1 where |tau| > mask_lambda * |merged - tau| and merged is not 0, else 0. int8."""
    limit = np.float32(mask_lambda).item() * (stored - vector).abs()
    return ((vector.abs() > limit) & (stored != 0)).to(torch.int8)


# --- experts ----------------------------------------------------------------------------------------------------------


def gain_one(vector: Tensor, sides: Tensor, stored: Tensor) -> float:
    """The gain for which <gain * R, tau> = ||tau||^2, for R = sides * stored; not rounded."""
    tau, reconstruction = vector.double(), sides.double() * stored.double()
    return ((tau * tau).sum() / (reconstruction * tau).sum()).item()


def expert(base: Tensor, shared: Shared, sides: Tensor, gain: float, dtype: torch.dtype) -> Tensor:
    """base + gain * sides * merged in the specification's arithmetic, in *dtype*."""
    scales = [gain] if shared.steps is None else [reference.r13(gain * step) for step in shared.steps.tolist()]
    delta = (torch.tensor(scales, dtype=torch.float32)[:, None] * rows(shared.units)).view(base.shape) * sides.float()
    total = base.double() + delta.double() if base.dtype == torch.float64 else base.float() + delta
    return torch.where(delta == 0, cast(base, dtype), cast(total, dtype))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """*tensor* in *dtype*, rounded once to nearest even: torch takes float64 to 16 bits by way of float32."""
    if tensor.dtype != torch.float64 or dtype in {torch.float32, torch.float64}:
        return tensor.to(dtype)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(tensor.numpy().astype(np.float16))
    pattern = tensor.numpy().view(np.int64)
    dropped = 52 - 7  # fraction bits
    even = pattern >> dropped & 1
    rounded = (pattern + (1 << dropped - 1) - 1 + even) >> dropped << dropped
    return torch.from_numpy(rounded.view(np.float64)).to(dtype)


def cosine_and_gain(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Of reconstructions on task vectors, over all tensors together: (cosine, gain)."""
    projection = sum((one.double() * other.double()).sum().item() for one, other in pairs)
    ours = sum((one.double() ** 2).sum().item() for one, _ in pairs)
    theirs = sum((other.double() ** 2).sum().item() for _, other in pairs)
    return projection / math.sqrt(ours * theirs), projection / theirs


def in_order(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum in float32, from the first to the last."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total = total + tensor
    return total


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All tensors end to end, by name."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


# --- whole models -----------------------------------------------------------------------------------------------------


class Fitted(NamedTuple):
    """One tensor of the base, as the tasks that moved it share it.

    Attributes:
        shared: the merged vector.
        vectors: each task's vector; without the tasks whose tensor is the base's.
        sides: each task's: 1, -1 or 0.
    """

    shared: Shared
    vectors: dict[str, Tensor]
    sides: dict[str, Tensor]


def fit_signed(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], dtype: str, threshold: float
) -> dict[str, Fitted]:
    """SignedMask on every tensor that can be coded."""
    found = {}
    for name, vectors in _moved(base, experts).items():
        shared = store(mean_magnitude(list(vectors.values())), dtype)
        alone = len(vectors) == 1
        sides = {task: signed_sides(tau, shared.values, threshold, alone=alone) for task, tau in vectors.items()}
        found[name] = Fitted(shared, vectors, sides)
    return found


def fit_tall(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    dtype: str,
    how: str,
    lambdas: Mapping[str, float],
) -> dict[str, Fitted]:
    """TallMask on every tensor that can be coded."""
    thresholds = {}
    if how == "ties":
        thresholds = {
            task: trim_threshold([task_vector(base[name], expert[name]) for name in _floats(base)])
            for task, expert in experts.items()
        }
    found = {}
    for name, vectors in _moved(base, experts).items():
        merged = merge(list(vectors.values()), how, [thresholds.get(task, 0.0) for task in vectors])
        shared = store(merged, dtype)
        sides = {task: tall_sides(tau, shared.values, lambdas[task]) for task, tau in vectors.items()}
        found[name] = Fitted(shared, vectors, sides)
    return found


def _floats(base: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel()]


def _moved(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """By tensor of at least 4,096 elements, the vectors of the tasks that moved it."""
    moved = {}
    for name in _floats(base):
        if base[name].numel() >= 4096:
            vectors = {task: task_vector(base[name], expert[name]) for task, expert in experts.items()}
            vectors = {task: tau for task, tau in vectors.items() if tau.any()}
            if vectors:
                moved[name] = vectors
    return moved
