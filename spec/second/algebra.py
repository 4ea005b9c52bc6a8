"""The algebra: an expert from its base, the side of each element, and the centre (REC-1 to REC-7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from second.elements import NBYTES, Array, Booleans, Integers, Singles, array, cast, r13, wide


@dataclass(frozen=True)
class Vector:
    """A shared vector as its readers see it: values before the steps, and a step a row, or none."""

    values: Singles
    steps: Sequence[float] | None
    row_axes: int

    def rows(self, shape: tuple[int, ...]) -> Vector:
        """Its part for the leading rows of a tensor, which have that shape."""
        steps = None if self.steps is None else self.steps[: row_count(shape, self.row_axes)]
        return Vector(self.values[: math.prod(shape)], steps, self.row_axes)


@dataclass(frozen=True)
class Scale:
    """One gain, or where *by_row* is set a gain a row of the tensor's *row_axes*."""

    gains: Sequence[float]
    row_axes: int
    by_row: bool


def row_count(shape: tuple[int, ...], row_axes: int) -> int:
    """Rows of a tensor (REC-7)."""
    return 1 if len(shape) <= 1 else math.prod(shape[:row_axes])


def by_element(rows: Sequence[float], count: int) -> Singles:
    """A number a row, repeated for each of the *count* elements of the tensor."""
    return np.repeat(np.array(rows, np.float32), count // len(rows))


def products(values: Singles, shape: tuple[int, ...], scale: Scale, vector: Vector | None = None) -> Singles:
    """rn32(scale[r] * value[i]); *vector* is the one whose values they are, if they are one's (REC-4)."""
    axes = scale.row_axes if scale.by_row or vector is None else vector.row_axes
    rows = row_count(shape, axes)
    gains = list(scale.gains) if scale.by_row else [scale.gains[0]] * rows
    if vector is not None and vector.steps is not None:
        gains = [r13(gain * step) for gain, step in zip(gains, vector.steps, strict=True)]
    if len(gains) != rows:
        raise ValueError(f"{len(gains)} gains for {rows} rows")
    with np.errstate(over="ignore"):
        return by_element(gains, values.size) * values  # float32 times float32, rounded once


def sides(
    kind: str,
    codes: Integers,
    shape: tuple[int, ...],
    scale: Scale,
    vectors: Mapping[str, Vector],
    *,
    levels: int = 0,
    own: Singles | None = None,
) -> tuple[Booleans, Singles]:
    """For each element whether it has a side, and its delta.

    Args:
        kind: mask, signed, two-level, sign, sparse or uniform.
        codes: one an element: bits, levels' codes, or for signed 1, -1 and 0.
        shape: of the tensor.
        scale: its gains.
        vectors: the group's, by role.
        levels: of uniform.
        own: the values of sparse, one a set bit.
    """
    everywhere = np.ones(codes.size, np.bool_)
    chosen = codes != 0
    match kind:
        case "mask" | "signed":
            merged = vectors["merged"]
            return chosen, products(codes.astype(np.float32) * merged.values, shape, scale, merged)
        case "two-level":
            high, low = (
                products(vectors[role].values, shape, scale, vectors[role]) for role in ("merged", "merged_lo")
            )
            return everywhere, np.where(chosen, high, low)
        case "sign":
            return everywhere, products(np.where(chosen, np.float32(1), np.float32(-1)), shape, scale)
        case "sparse":
            values = np.zeros(codes.size, np.float32)
            values[chosen] = own if own is not None else ()
            return chosen, products(values, shape, scale)
        case _:
            lowest = 1.0 if levels == 3 else (levels - 1) / 2
            return everywhere, products((codes - lowest).astype(np.float32), shape, scale)


def centre(vector: Vector, shape: tuple[int, ...]) -> Singles:
    """The centre of each element: rn32(step[r] * value[i]), by the vector's own rows; no gain scales it."""
    if vector.steps is None:
        return vector.values
    return products(vector.values, shape, Scale(vector.steps, vector.row_axes, by_row=True))


def reconstruct(base: Array, present: Booleans, delta: Singles, dtype: str, middle: Singles | None = None) -> Array:
    """The expert's tensor.

    Args:
        base: the base's, F16, BF16, F32 or F64.
        present: which elements have a side.
        delta: of each element.
        dtype: of the result.
        middle: the centre of each element, where the group has one.
    """
    moved = present & (delta != 0)
    with np.errstate(over="ignore", invalid="ignore"):
        number = wide(base)  # float64 for an F64 base, float32 for the others: so are the two sums
        start = number if middle is None else number + middle.astype(number.dtype)
        total = start + delta.astype(number.dtype)
    if np.isnan(total[moved]).any():
        raise ValueError("a NaN that is added to has any payload: no vector can hold it [REC-6]")
    width = NBYTES[dtype]
    kept = np.frombuffer(recast(base, dtype).raw, np.uint8).reshape(-1, width)
    summed = np.frombuffer(cast(total, dtype), np.uint8).reshape(-1, width)
    return Array(dtype, base.shape, np.where(moved[:, None], summed, kept).tobytes())


def recast(tensor: Array, dtype: str) -> Array:
    """*tensor* in *dtype*: bit for bit where that is its own (REC-1), else each element cast."""
    return tensor if dtype == tensor.dtype else array(dtype, tensor.shape, wide(tensor))
