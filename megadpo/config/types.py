"""Types of the config fields, with the ranges that the reader checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Range:
    """Bounds of a number; None leaves that side open."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        """True when the value is inside every bound."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        bounds = [(">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)]
        shown = [
            (sign, bound if isinstance(bound, int) else f"{bound:g}") for sign, bound in bounds if bound is not None
        ]
        return " and ".join(f"{sign} {bound}" for sign, bound in shown)


@dataclass(frozen=True)
class NotEmpty:
    """Marks a string that must hold something other than blanks."""


PositiveInt = Annotated[int, Range(ge=1)]
CountOrZero = Annotated[int, Range(ge=0)]
Seed = Annotated[int, Range(ge=0, le=2**31 - 1)]
"""Random generators take 32 bits, and each rank adds a little to it."""
PositiveFloat = Annotated[float, Range(gt=0)]
FloatOrZero = Annotated[float, Range(ge=0)]
Proportion = Annotated[float, Range(ge=0, lt=1)]
Text = Annotated[str, NotEmpty()]

Precision = Literal["bfloat16", "float32"]
"""NeMo RL's names. float16 is not offered: it needs a loss scaler, which bfloat16 makes unnecessary."""
