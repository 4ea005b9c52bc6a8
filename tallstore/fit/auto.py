"""Auto: no fit of its own, but the choice of one for each tensor under a budget of bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tallstore.errors import OptionError
from tallstore.fit.gain import is_number
from tallstore.format.manifest import Scalar, SharedDtype


@dataclass(frozen=True)
class Auto:
    """The truest bundle under a budget: each tensor gets the method that serves the whole best.

    With gain one, ||R||^2 = ||tau||^2 / cosine^2 in every tensor, and a task's cosine is that of the sums. So the
    budget goes where it lowers the tasks' mean of ||R||^2 / ||tau||^2 most, measured on a sample of every tensor.

    Args:
        max_bits: a coded parameter of an expert may cost, its share of the shared vectors included.
    """

    max_bits: float

    name: ClassVar = "auto"
    merged_dtype: ClassVar[SharedDtype] = "LOG4"
    allowed_dtypes: ClassVar[frozenset[SharedDtype]] = frozenset()
    minimum_experts: ClassVar = 2

    def __post_init__(self) -> None:
        """Refuse what is no budget."""
        if not is_number(self.max_bits) or self.max_bits <= 0:
            raise OptionError(f"Auto: max_bits is {self.max_bits!r}; give a number above 0, such as 1.1")

    @property
    def parameters(self) -> dict[str, Scalar | list[Scalar]]:
        """What group.json records."""
        return {"max_bits": float(self.max_bits)}
