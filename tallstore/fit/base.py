"""What every fit is: a method at work on one set of tasks, asked tile by tile."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from tallstore.fit.gain import WIDEST, Gain
from tallstore.fit.sides import Kind, Levels
from tallstore.fit.tile import Coded, Shared, Tile
from tallstore.format.manifest import Role


class Fit(abc.ABC):
    """What packing asks of a method at work; what most fits have in common is here.

    Attributes:
        method: what was chosen.
    """

    method: Any

    @property
    @abc.abstractmethod
    def kind(self) -> Kind:
        """Of the codes."""

    @property
    def levels(self) -> Levels | None:
        """Of `uniform` codes."""
        return None

    @property
    def roles(self) -> tuple[Role, ...]:
        """The shared vectors that `merge` makes."""
        return ()

    @property
    def gain(self) -> Gain:
        """How a tensor's reconstruction is scaled."""
        gain: Gain = self.method.gain
        return gain

    @property
    def widest(self) -> float:
        """The gain beyond which the fit degenerated."""
        return WIDEST

    @property
    def fallback(self) -> Fit | None:
        """What to code a task with, over the same shared vectors, where this fit degenerates."""
        return None

    def chosen(self, task: str) -> Mapping[str, float]:  # noqa: ARG002 - most fits choose nothing for a task
        """The parameters that are the task's own, to be recorded with it."""
        return {}

    def merge(self, tile: Tile) -> Shared:  # noqa: ARG002 - some fits share nothing
        """The shared vectors of a tile, before they are stored: one for each role, float32, of the tile's length."""
        return {}

    @abc.abstractmethod
    def code(self, tile: Tile, position: int, shared: Shared) -> Coded:
        """Codes of the task at *position*, from the shared vectors as stored. The same however often it is asked."""
