"""Gains: the one number a tensor that scales a reconstruction after a fit has shaped it.

With R the reconstruction at the fit's own scale, tau the task vector, and F what is added unscaled (a centre):

    one              <F + gain * R, tau> = ||tau||^2              the whole way along the task vector
    least-squares    gain minimises ||tau - F - gain * R||^2
    published        1: the scale that the fit's own formula gives

Squared error is the wrong criterion for an expert's behaviour: its minimum shrinks the step along the task vector, and
too short a step hurts more than noise across it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeGuard, get_args

from tallstore.errors import OptionError

Gain = Literal["one", "least-squares", "published"]
# A gain beyond it, or below one part in as many: the fit degenerated. Where a fit's own scale is of least squares, gain
# one makes ||R||^2 = gain * ||tau||^2: noise of 16 times the task vector's length. A tenth of that does little harm.
WIDEST = 256.0


@dataclass(frozen=True)
class Projections:
    """Inner products over one task's tensor, or over a part of it; they add up.

    Attributes:
        along: <R, tau>.
        energy: <R, R>.
        fixed_along: <F, tau>.
        fixed_energy: <F, R>.
    """

    along: float = 0.0
    energy: float = 0.0
    fixed_along: float = 0.0
    fixed_energy: float = 0.0

    def __add__(self, other: Projections) -> Projections:
        """Over both parts together."""
        return Projections(
            self.along + other.along,
            self.energy + other.energy,
            self.fixed_along + other.fixed_along,
            self.fixed_energy + other.fixed_energy,
        )

    def times(self, scale: float) -> Projections:
        """Those of scale * R."""
        return Projections(scale * self.along, scale**2 * self.energy, self.fixed_along, scale * self.fixed_energy)


def solve(gain: Gain, sum_squares: float, projections: Projections) -> float:
    """The gain of a tensor whose task vector has *sum_squares*; NaN where there is none."""
    if projections.along <= 0 or projections.energy <= 0:
        return math.nan
    if gain == "one":
        return (sum_squares - projections.fixed_along) / projections.along
    if gain == "least-squares":
        return (projections.along - projections.fixed_energy) / projections.energy
    return 1.0


def check_gain(method: str, gain: object) -> None:
    """Refuse what is no gain.

    Raises:
        OptionError: naming *method*.
    """
    check_choice(method, "gain", gain, get_args(Gain))


def check_choice(method: str, option: str, value: object, known: tuple[object, ...]) -> None:
    """Refuse a value of an option that is not one of *known*.

    Raises:
        OptionError: naming *method* and *option*.
    """
    if type(value) not in set(map(type, known)) or value not in known:  # 4.0 is 4, but no number of levels
        raise OptionError(f"{method}: {option} is {value!r}; give one of {', '.join(map(repr, known))}")


def is_number(value: Any) -> TypeGuard[float]:  # noqa: ANN401 - whatever the user gave
    """Whether *value* is a finite number, numpy's included."""
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def check_number(method: str, option: str, value: object, example: float) -> None:
    """Refuse a value that is no finite number from 0.

    Raises:
        OptionError: naming *method* and *option*.
    """
    if not is_number(value) or value < 0:
        raise OptionError(f"{method}: {option} is {value!r}; give a number from 0, such as {example}")
