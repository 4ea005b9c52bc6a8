"""Fits: how task vectors become shared vectors and codes. Pure functions on tiles; no files, no formats.

A *method* is what the user chooses (`SignedMask`, `TallMask`); a *fit* is the method at work on one set of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from torch import Tensor

from tallstore.fit.signed_mask import SignedMask, SignedMaskFit
from tallstore.fit.tall_mask import PUBLISHED_GRID, Run, TallMask, TallMaskFit
from tallstore.fit.tile import TaskStatistics, Tile

__all__ = [
    "PUBLISHED_GRID",
    "Fit",
    "Method",
    "SignedMask",
    "SignedMaskFit",
    "TallMask",
    "TallMaskFit",
    "TaskStatistics",
    "Tile",
    "prepare",
]

Method = SignedMask | TallMask


class Fit(Protocol):
    """What packing asks of a method at work."""

    def merge(self, tile: Tile) -> Tensor:
        """The shared vector of a tile, before it is stored: float32, of the tile's length."""

    def code(self, tile: Tile, position: int, merged: Tensor) -> Tensor:
        """Codes of the task at *position*, uint8, from *merged* as stored."""

    def fitted_scale(self, statistics: TaskStatistics, shared_by: int) -> float:
        """The scale that the fit itself gives a task's tensor, which *shared_by* tasks moved.

        A gain far from it says that the fit degenerated.
        """

    def gain(self, statistics: TaskStatistics, projection: float) -> float:
        """A task's gain in one tensor, where its reconstruction R at scale one has *projection* = <R, tau> > 0."""


def prepare(
    method: Method,
    chunks: Mapping[str, Callable[[], Iterable[Tensor]]],
    lambdas: Mapping[str, float] | None = None,
    run: Run = map,
) -> Fit:
    """Set *method* to work on a set of tasks.

    Args:
        method: what the user chose.
        chunks: by task, a function that streams its whole task vector, for what must be known of all of it.
        lambdas: mask_lambda by task, for TallMask; None takes the method's only one.
        run: maps a function over the tasks, as `map` does or as an executor's.
    """
    if isinstance(method, SignedMask):
        return SignedMaskFit(method)
    if lambdas is None:
        lambdas = dict.fromkeys(chunks, method.lambdas[0])
    return TallMaskFit.prepare(method, chunks, lambdas, run)
