"""Fits: how task vectors become shared vectors and codes. Pure functions on tiles; no files, no formats.

A *method* is what the user chooses (`SignedMask`, `TallMask`, …); a *fit* is the method at work on one set of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tallstore.fit.auto import Auto
from tallstore.fit.base import Fit
from tallstore.fit.emr import Emr, EmrFit, Tiles
from tallstore.fit.gain import Gain, Projections, solve
from tallstore.fit.least_squares import LeastSquares, LeastSquaresFit
from tallstore.fit.localize import Localize, LocalizeFit
from tallstore.fit.sides import Kind, Levels, exceeds, present, select, side_values
from tallstore.fit.sign import Sign, SignFit
from tallstore.fit.signed_mask import SignedMask, SignedMaskFit
from tallstore.fit.tall_mask import PUBLISHED_GRID, Chunks, TallMask, TallMaskFit
from tallstore.fit.tile import SMALLEST_RMS, Coded, Shared, TaskStatistics, Tile, row_sums
from tallstore.fit.uniform import Uniform, UniformFit

__all__ = [
    "PUBLISHED_GRID",
    "SMALLEST_RMS",
    "Auto",
    "Coded",
    "Emr",
    "EmrFit",
    "Fit",
    "Gain",
    "Inputs",
    "Kind",
    "LeastSquares",
    "LeastSquaresFit",
    "Levels",
    "Localize",
    "LocalizeFit",
    "Method",
    "Projections",
    "Shared",
    "Sign",
    "SignFit",
    "SignedMask",
    "SignedMaskFit",
    "TallMask",
    "TallMaskFit",
    "TaskStatistics",
    "Tile",
    "Uniform",
    "UniformFit",
    "described",
    "exceeds",
    "prepare",
    "present",
    "row_sums",
    "select",
    "side_values",
    "solve",
]

Method = SignedMask | TallMask | Emr | LeastSquares | Sign | Uniform | Localize | Auto


def described(method: Method) -> str:
    """A method as it would be written down: without what is as by default."""
    given = [field for field in fields(method) if getattr(method, field.name) != field.default]
    shown = (f"{field.name}={_shown(getattr(method, field.name))}" for field in given)
    return f"{type(method).__name__}({', '.join(shown)})"


def _shown(value: object) -> str:
    return "…" if isinstance(value, Mapping) else repr(value)


#: Maps a function over items, in their order: `map`, or an executor's.
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Inputs:
    """What a fit may have to know before it begins.

    Attributes:
        chunks: by task, a function that streams its whole task vector.
        tensors: for each tensor that will be coded, a function that streams its tiles.
        run: maps a function over tasks or tensors, as `map` does or as an executor's.
    """

    chunks: Mapping[str, Chunks]
    tensors: Sequence[Tiles] = ()
    run: Run = map


def prepare(method: Method, inputs: Inputs, lambdas: Mapping[str, float] | None = None) -> Fit:
    """Set *method* to work on a set of tasks.

    Args:
        method: what the user chose.
        inputs: the task vectors; read only by the methods that need all of them first.
        lambdas: mask_lambda by task, for TallMask; None takes the method's only one.
    """
    fit: Fit
    match method:
        case SignedMask():
            fit = SignedMaskFit(method)
        case TallMask():
            chosen = dict.fromkeys(inputs.chunks, method.lambdas[0]) if lambdas is None else lambdas
            fit = TallMaskFit.prepare(method, inputs.chunks, chosen, inputs.run)
        case Emr():
            fit = EmrFit.prepare(method, inputs.tensors, inputs.run)
        case LeastSquares():
            fit = LeastSquaresFit(method)
        case Sign():
            fit = SignFit(method)
        case Uniform():
            fit = UniformFit(method)
        case Localize():
            fit = LocalizeFit.prepare(method, inputs.chunks, inputs.run)
        case Auto():
            raise AssertionError("a choice of fits is none")  # the packer resolves it
    return fit
