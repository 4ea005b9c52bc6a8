"""The methods, written straight from their formulas: dense, whole tensors, one after the other.

They share no code with tallstore's fits. There are two readings of each method. The first is in float64: what the
formula gives, with a note of where a rounding could have tipped a choice (`decided`). The second says which codes are
due once the shared vectors are as they were stored: sums run in the order of the tasks, and roundings are the ones that
the fits name, so that what is selected and what is stored can be compared bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tallstore import Emr, LeastSquares, Localize, Sign, SignedMask, TallMask, Uniform
from tests import reference

LOG4 = np.array([reference.log4(code) for code in range(16)])
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
VALUES_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SMALLEST = 2.0**-60
SHORTEST_ROW = 64
# Of the best quantiser of a normal distribution, in standard deviations: the step (J. Max, 1960), for 3 levels the
# threshold; and the factors of it that are tried.
NORMAL_WIDTH = {3: 0.6120, 4: 0.9957, 8: 0.5860, 16: 0.3352}
WIDTH_FACTORS = (0.85, 1.0, 1.15, 1.35, 1.6)


def task_vector(base: Tensor, finetuned: Tensor) -> Tensor:
    """finetuned - base, rounded once to float32."""
    return (finetuned.double() - base.double()).float()


def rms(vector: Tensor) -> float:
    """Root mean square."""
    return math.sqrt((vector.double() ** 2).sum().item() / vector.numel())


def rows(tensor: Tensor) -> Tensor:
    """[rows, length]: a row is an index of the first dimension; one, where there is none or rows would be short."""
    if tensor.ndim < 2 or tensor[0].numel() < SHORTEST_ROW:
        return tensor.reshape(1, -1)
    return tensor.reshape(tensor.shape[0], -1)


def row_rms(tensor: Tensor) -> Tensor:
    """Root mean square of each row: float64 [rows, 1]."""
    return rows(tensor).double().square().mean(1, keepdim=True).sqrt()


def rms_of(vector: Tensor, scale: str) -> Tensor:
    """Root mean square of the tensor, or of its rows: float64, of the tensor's shape."""
    if scale == "tensor":
        return torch.full(vector.shape, rms(vector), dtype=torch.float64)
    return row_rms(vector).expand_as(rows(vector)).reshape(vector.shape)


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


# --- the formulas, in float64 -----------------------------------------------------------------------------------------


class Formula(NamedTuple):
    """One task's tensor as a method rebuilds it, before the gain. All of the tensor's shape.

    Attributes:
        sides: what is added to the base, under the method's own scale: float64.
        centre: what is added with it, wherever a side is not 0: float64; None where there is none.
        decided: False where a rounding of float32 could have tipped the choice: bool.
    """

    sides: Tensor
    centre: Tensor | None
    decided: Tensor

    @property
    def fixed(self) -> Tensor:
        """What is added whatever the gain."""
        if self.centre is None:
            return torch.zeros_like(self.sides)
        return torch.where(self.sides == 0, 0.0, self.centre)

    def step(self, tau: Tensor, gain: str) -> Tensor:
        """What is added to the base: float64."""
        return self.fixed + gain_of(gain, tau, self.sides, self.fixed) * self.sides


def gain_of(gain: str, tau: Tensor, sides: Tensor, fixed: Tensor | None = None) -> float:
    """The gain for R = sides and F = fixed: not rounded."""
    tau, sides = tau.double(), sides.double()
    fixed = torch.zeros_like(tau) if fixed is None else fixed.double()
    if gain == "one":
        return (((tau * tau).sum() - (fixed * tau).sum()) / (sides * tau).sum()).item()
    if gain == "least-squares":
        return ((sides * (tau - fixed)).sum() / (sides * sides).sum()).item()
    return 1.0


def signed_mask(vectors: Sequence[Tensor], threshold: float, scale: str = "tensor") -> list[Formula]:
    """sign(v) * mean |v| where |v| > threshold * mean |v|; every sign where that keeps nothing, or a task is alone."""
    scales = [rms_of(tau, scale) for tau in vectors]
    units = [torch.where(own > 0, tau.double() / own, 0.0) for tau, own in zip(vectors, scales, strict=True)]
    merged = sum(unit.abs() for unit in units) / len(units)
    found = []
    for unit, own in zip(units, scales, strict=True):
        limit = (threshold if len(units) > 1 else 0.0) * merged
        if not (unit.abs() > limit * (1 + 1e-5)).any():
            limit = torch.zeros_like(merged)
        kept = unit.abs() > limit
        decided = (unit.abs() - limit).abs() > 1e-5 * merged
        found.append(Formula(own * torch.where(kept, torch.sign(unit) * merged, 0.0), None, decided | (merged == 0)))
    return found


def tall_mask(
    vectors: Sequence[Tensor],
    lambdas: Sequence[float],
    how: str,
    *,
    thresholds: Sequence[float] = (),
    given: Tensor | None = None,
    normalise: bool = False,
    scaled_back: bool = True,
) -> list[Formula]:
    """merged where |v| > lambda * |merged - v|."""
    scales = [rms(tau) if normalise else 1.0 for tau in vectors]
    wide = [tau.double() / own for tau, own in zip(vectors, scales, strict=True)]
    kept = [
        torch.where(tau.abs() >= threshold, unit, 0.0)
        for tau, unit, threshold in zip(vectors, wide, thresholds or [0.0] * len(wide), strict=True)
    ]
    total = sum(kept)
    if given is not None:
        merged = given.double()
    elif how == "ties":
        merged = sum(torch.where(torch.sign(values) == torch.sign(total), values, 0.0) for values in kept)
    else:
        merged = total / (len(wide) if how == "mean" else 1)
    if how == "mean" and scaled_back:
        scales = [own * len(wide) for own in scales]
    spread, votes = sum(unit.abs() for unit in wide), sum(values.abs() for values in kept)
    agreed = (total.abs() > 1e-6 * votes) | (votes == 0) | (how != "ties")
    found = []
    for unit, mask_lambda, own in zip(wide, lambdas, scales, strict=True):
        near, far = unit.abs(), mask_lambda * (merged - unit).abs()
        decided = agreed & (((near - far).abs() > 1e-5 * spread) | (merged == 0))
        found.append(Formula(own * torch.where(near > far, merged, 0.0), None, decided))
    return found


def elected(vectors: Sequence[Tensor]) -> Tensor:
    """EMR's vector: the largest magnitude of the sign of the sum. float64."""
    wide = [tau.double() for tau in vectors]
    gamma = torch.sign(sum(wide))
    agreeing = [torch.where(torch.sign(tau) == gamma, tau.abs(), 0.0) for tau in wide]
    return gamma * torch.stack(agreeing).amax(0)


def emr(vectors: Sequence[Tensor], rescalers: Sequence[float]) -> list[Formula]:
    """lambda_t * merged where tau * merged > 0."""
    merged = elected(vectors)
    spread, total = sum(tau.double().abs() for tau in vectors), sum(tau.double() for tau in vectors)
    decided = (total.abs() > 1e-6 * spread) | (spread == 0)
    return [
        Formula(rescaler * torch.where(torch.sign(tau) * torch.sign(merged) > 0, merged, 0.0), None, decided)
        for tau, rescaler in zip(vectors, rescalers, strict=True)
    ]


def least_squares(vectors: Sequence[Tensor], levels: int, scale: str = "row") -> list[Formula]:
    """The levels whose nearest to each v leaves the least squared error, by trying every choice of the tasks."""
    scales = [rms_of(tau, scale) for tau in vectors]
    units = torch.stack(
        [torch.where(own > 0, tau.double() / own, 0.0) for tau, own in zip(vectors, scales, strict=True)]
    )
    errors, sides = [], []
    for chosen in choices(len(vectors), levels):
        side = sides_of(units, chosen, levels)
        sides.append(side)
        errors.append((units - side).square().sum(0))
    order = torch.stack(errors).sort(dim=0, stable=True)
    best = torch.gather(torch.stack(sides), 0, order.indices[:1, None].expand(1, *units.shape))[0]
    energy = units.square().sum(0)
    decided = torch.ones_like(energy, dtype=torch.bool)
    if len(errors) > 1:
        decided = (order.values[1] - order.values[0] > 1e-6 * energy) | (energy == 0)
    return [Formula(own * side, None, decided) for own, side in zip(scales, best, strict=True)]


def choices(tasks: int, levels: int) -> Iterator[tuple[bool, ...]]:
    """Every way of the tasks to choose, each once: for two levels, the first one may as well take the upper."""
    for chosen in itertools.product((True, False), repeat=tasks):
        if levels == 1 or chosen[0]:
            yield chosen


def sides_of(units: Tensor, chosen: Sequence[bool], levels: int) -> Tensor:
    """What each task gets where those that are *chosen* share their mean; the others share theirs, or get 0."""
    upper = torch.tensor(chosen).view(-1, *[1] * (units.ndim - 1))
    side = torch.zeros_like(units)
    for members in (upper, ~upper) if levels == 2 else (upper,):
        if members.any():
            side = torch.where(members, (units * members).sum(0) / members.sum(), side)
    return side


def sign(vectors: Sequence[Tensor], scale: str = "tensor", *, centre: bool = False) -> list[Formula]:
    """Plus or minus mean |tau|, of the tensor or of the row."""
    mean = mean_of(vectors) if centre else None
    found = []
    for tau in vectors:
        wide = tau.double()
        left = wide if mean is None else wide - mean
        own = wide.abs().mean().expand_as(wide)
        if scale == "row":
            own = rows(wide).abs().mean(1, keepdim=True).expand_as(rows(wide)).reshape(wide.shape)
        decided = torch.ones_like(wide, dtype=torch.bool) if mean is None else left.abs() > 1e-5 * own
        found.append(Formula(torch.where(left < 0, -own, own), mean, decided | (own == 0)))
    return found


def mean_of(vectors: Sequence[Tensor]) -> Tensor:
    """Mean of task vectors: float64."""
    return sum(tau.double() for tau in vectors) / len(vectors)


def uniform(
    vectors: Sequence[Tensor], levels: int, scale: str = "row", *, threshold: float | None = None, centre: bool = False
) -> list[Formula]:
    """s * level, for the width of largest cosine a row, or one width for the tensor."""
    mean = mean_of(vectors) if centre else None
    factors = WIDTH_FACTORS if scale == "row" and threshold is None else (1.0,)
    found = []
    for tau in vectors:
        left = rows(tau.double() if mean is None else tau.double() - mean)
        spread = row_rms(tau if mean is None or scale == "tensor" else left)
        if scale == "tensor":
            spread = torch.full_like(spread, rms(tau))
        width = (NORMAL_WIDTH[levels] if threshold is None else threshold) * spread
        tried = [level_of(left, factor * width, levels) for factor in factors]
        cosines = torch.stack([cosine(level, left) for level, _ in tried])
        best = cosines.argmax(0)
        level = torch.stack([level for level, _ in tried])[best, torch.arange(len(left))]
        clear = torch.stack([clear for _, clear in tried])[best, torch.arange(len(left))]
        for (other, _), found_cosine in zip(tried, cosines, strict=True):
            clear = clear & ((other == level).all(1) | (found_cosine < cosines.amax(0) - 1e-6))[:, None]
        own = step_of(level, left, scale)
        if centre:
            own = torch.maximum(own, 2.0**-20 * spread)
        found.append(Formula((own * level).reshape(tau.shape), mean, clear.reshape(tau.shape)))
    return found


def level_of(elements: Tensor, width: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The level of each element, and where it is clearly that one; *width* [rows, 1] is a step, or a threshold."""
    if levels == 3:
        clear = (elements.abs() - width).abs() > 1e-5 * width
        return torch.where(elements.abs() > width, torch.sign(elements), 0.0), clear
    places = torch.tensor([place - (levels - 1) / 2 for place in range(levels)], dtype=torch.float64)
    steps = torch.where(width > 0, elements / width, 0.0)
    nearest = places[(steps[..., None] - places).abs().argmin(-1)]
    border = steps.round()
    return nearest, (steps - border).abs() > 1e-5 * border.abs() + 1e-6


def step_of(level: Tensor, elements: Tensor, scale: str) -> Tensor:
    """<tau, level> / <level, level> of each row, or of all: float64 [rows, 1]."""
    along, energy = (level * elements).sum(1, keepdim=True), level.square().sum(1, keepdim=True)
    if scale == "tensor":
        along, energy = along.sum().expand_as(along), energy.sum().expand_as(energy)
    return torch.where(energy > 0, along / energy, 0.0)


def cosine(level: Tensor, elements: Tensor) -> Tensor:
    """Of each row with its levels: float64 [rows]; 0 where either is 0."""
    norms = level.norm(dim=1) * elements.norm(dim=1)
    return torch.where(norms > 0, (level * elements).sum(1) / norms, 0.0)


def localize(vectors: Sequence[Tensor], kept: Sequence[Tensor], values_dtype: str) -> list[Formula]:
    """tau where it is kept, its values rounded in units of a power of two."""
    found = []
    for tau, mask in zip(vectors, kept, strict=True):
        unit = 2.0 ** round(math.log2(rms(tau)))
        values = (tau.double() / unit).float().to(VALUES_DTYPES[values_dtype]).double() * unit
        found.append(Formula(torch.where(mask, values, 0.0), None, torch.ones_like(mask)))
    return found


# --- what needs the whole of a task -----------------------------------------------------------------------------------


def threshold_of(vectors: Sequence[Tensor], kept: float) -> float:
    """The smallest of the largest magnitudes, a share *kept* of them, over all tensors of one task together."""
    magnitudes = torch.cat([vector.reshape(-1).abs() for vector in vectors])
    return magnitudes.kthvalue(max(1, magnitudes.numel() - int(magnitudes.numel() * kept))).values.item()


def rescaler_of(vectors: Sequence[Tensor], merged: Sequence[Tensor]) -> float:
    """EMR's lambda_t over all of a task's tensors."""
    agreeing = sum(
        torch.where(torch.sign(tau) * torch.sign(own) > 0, own.abs(), 0.0).sum().item()
        for tau, own in zip(vectors, merged, strict=True)
    )
    return sum(tau.double().abs().sum().item() for tau in vectors) / agreeing


def formulas(
    method: object, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Formula]]:
    """By tensor that is coded and by task that moved it, what a method rebuilds."""
    moved = moved_tensors(base, experts)
    floats = {
        task: [task_vector(base[name], expert[name]) for name in _floats(base)] for task, expert in experts.items()
    }
    own: dict[str, float] = {}
    if isinstance(method, TallMask) and method.merge == "ties":
        own = {task: threshold_of(vectors, 0.2) for task, vectors in floats.items()}
    elif isinstance(method, Localize) and method.masks is None:
        own = {task: threshold_of(vectors, method.density) for task, vectors in floats.items()}
    elif isinstance(method, Emr) and method.gain == "published":
        merged = {name: elected(list(vectors.values())) for name, vectors in moved.items()}
        for task in experts:
            names = [name for name, vectors in moved.items() if task in vectors]
            own[task] = rescaler_of([moved[name][task] for name in names], [merged[name] for name in names])
    return {
        name: dict(zip(vectors, _formulas(method, name, base[name], vectors, own), strict=True))
        for name, vectors in moved.items()
    }


def _formulas(
    method: object, name: str, base: Tensor, by_task: Mapping[str, Tensor], own: Mapping[str, float]
) -> list[Formula]:
    vectors = list(by_task.values())
    match method:
        case SignedMask():
            found = signed_mask(vectors, method.threshold, method.scale)
        case TallMask():
            given = method.given[name] if isinstance(method.given, Mapping) else None
            found = tall_mask(
                vectors,
                [method.lambdas[0]] * len(vectors),
                str(method.merge) if given is None else "sum",
                thresholds=[own.get(task, 0.0) for task in by_task],
                given=None if given is None else task_vector(base, given),
                normalise=method.normalise,
                scaled_back=method.gain != "published",
            )
        case Emr():
            found = emr(vectors, [own.get(task, 1.0) for task in by_task])
        case LeastSquares():
            found = least_squares(vectors, method.levels, method.scale)
        case Sign():
            found = sign(vectors, method.scale, centre=method.centre)
        case Uniform():
            found = uniform(vectors, method.levels, method.scale, threshold=method.threshold, centre=method.centre)
        case Localize(masks=None):
            kept = [tau.abs() >= own[task] for task, tau in by_task.items()]
            found = localize(vectors, kept, method.values_dtype)
        case Localize():
            nothing = torch.zeros(base.shape, dtype=torch.bool)
            kept = [method.masks[task].get(name, nothing) for task in by_task]
            found = localize(vectors, kept, method.values_dtype)
        case _:
            raise AssertionError(method)
    return found


# --- codes, from shared vectors as they were stored -------------------------------------------------------------------


def at_unit(vector: Tensor, scale: str = "tensor") -> Tensor:
    """v: the task vector, or its rows, at unit root mean square, in float32 as the fits round it."""
    if scale == "tensor":
        return vector * np.float32(1.0 / rms(vector)).item()
    each = row_rms(vector).float()
    unit = torch.where(each > SMALLEST, 1 / each, 0.0)
    return (rows(vector) * unit).view(vector.shape)


def mean_magnitude(vectors: Sequence[Tensor], scale: str = "tensor") -> Tensor:
    """Mean over the tasks of |v_t|."""
    return in_order([at_unit(vector, scale).abs() for vector in vectors]) / len(vectors)


def signed_sides(
    vector: Tensor, stored: Tensor, threshold: float, scale: str = "tensor", *, alone: bool = False
) -> Tensor:
    """sign(v_t) where |v_t| > threshold * merged, else 0; all signs where no other task moved. int8."""
    kept = at_unit(vector, scale).abs() > np.float32(0.0 if alone else threshold).item() * stored
    return torch.where(kept & (stored > 0), torch.sign(vector), 0.0).to(torch.int8)


def merge(vectors: Sequence[Tensor], how: str, thresholds: Sequence[float] = ()) -> Tensor:
    """The sum or mean of task vectors, or their TIES merge for the smallest magnitudes that its trim keeps."""
    if how == "ties":
        trimmed = [
            torch.where(vector.abs() >= threshold, vector, 0.0)
            for vector, threshold in zip(vectors, thresholds, strict=True)
        ]
        elected_sign = torch.sign(in_order(trimmed))
        return in_order([torch.where(values * elected_sign > 0, values, 0.0) for values in trimmed])
    return in_order(vectors) / (len(vectors) if how == "mean" else 1)


def tall_sides(vector: Tensor, stored: Tensor, mask_lambda: float) -> Tensor:
    """1 where |tau| > mask_lambda * |merged - tau| and merged is not 0, else 0. int8."""
    limit = np.float32(mask_lambda).item() * (stored - vector).abs()
    return ((vector.abs() > limit) & (stored != 0)).to(torch.int8)


def emr_sides(vector: Tensor, stored: Tensor) -> Tensor:
    """1 where tau and merged have one sign, else 0. int8."""
    return ((vector > 0) & (stored > 0) | (vector < 0) & (stored < 0)).to(torch.int8)


def nearer_sides(unit: Tensor, stored: Tensor, other: Tensor | None = None) -> Tensor:
    """1 where merged is nearer to v than the other level, or than 0; else 0. int8."""
    far = unit.abs() if other is None else (unit - other).abs()
    return ((unit - stored).abs() < far).to(torch.int8)


def up_sides(vector: Tensor, centre: Tensor | None = None) -> Tensor:
    """1 where what is left of tau does not go down, else 0. int8."""
    return (~((vector if centre is None else vector - centre) < 0)).to(torch.int8)


def codes_due(method: object, vector: Tensor, stored: Mapping[str, Tensor], *, alone: bool) -> Tensor:
    """The codes of one task's tensor, from its shared vectors as stored: uint8, of the tensor's shape."""
    match method:
        case SignedMask():
            sides = signed_sides(vector, stored["merged"], method.threshold, method.scale, alone=alone)
            return torch.where(sides < 0, 2, sides).to(torch.uint8)
        case TallMask():
            unit = at_unit(vector) if method.normalise else vector
            return tall_sides(unit, stored["merged"], method.lambdas[0]).to(torch.uint8)
        case Emr():
            return emr_sides(vector, stored["merged"]).to(torch.uint8)
        case LeastSquares():
            unit = at_unit(vector, method.scale)
            return nearer_sides(unit, stored["merged"], stored.get("merged_lo")).to(torch.uint8)
        case Sign():
            return up_sides(vector, stored.get("centre")).to(torch.uint8)
    raise AssertionError(method)


# --- experts ----------------------------------------------------------------------------------------------------------


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
    """Of reconstructions on task vectors, over all tensors together: (cosine, gain); 0 for what is nothing."""
    projection = sum((one.double() * other.double()).sum().item() for one, other in pairs)
    ours = sum((one.double() ** 2).sum().item() for one, _ in pairs)
    theirs = sum((other.double() ** 2).sum().item() for _, other in pairs)
    return projection / math.sqrt(ours * theirs) if ours else 0.0, projection / theirs


def in_order(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum in float32, from the first to the last."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total = total + tensor
    return total


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
    for name, vectors in moved_tensors(base, experts).items():
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
            task: threshold_of([task_vector(base[name], expert[name]) for name in _floats(base)], 0.2)
            for task, expert in experts.items()
        }
    found = {}
    for name, vectors in moved_tensors(base, experts).items():
        merged = merge(list(vectors.values()), how, [thresholds.get(task, 0.0) for task in vectors])
        shared = store(merged, dtype)
        sides = {task: tall_sides(tau, shared.values, lambdas[task]) for task, tau in vectors.items()}
        found[name] = Fitted(shared, vectors, sides)
    return found


def _floats(base: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel()]


def moved_tensors(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """By tensor of at least 4,096 elements, the vectors of the tasks that moved it."""
    moved = {}
    for name in _floats(base):
        if base[name].numel() >= 4096:
            vectors = {task: task_vector(base[name], expert[name]) for task, expert in experts.items()}
            vectors = {task: tau for task, tau in vectors.items() if tau.any()}
            if vectors:
                moved[name] = vectors
    return moved
