"""A value with its 95 % interval, printed with the digits that it carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

UNDETERMINED = 100.0
"""A positive quantity whose interval spans more than this factor is not known."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; without one both ends are NaN. ``is_open``: the data do not see the value at all, and
    the ends are those of the search."""

    value: float
    low: float
    high: float
    is_open: bool = False

    @staticmethod
    def of(value: float, refits: np.ndarray) -> Interval:
        """The interval that bootstrap refits [b] of a quantity give; none for a single one."""
        if len(refits) < 2:
            return Interval(value, math.nan, math.nan)
        low, high = np.quantile(refits, [0.025, 0.975], method="nearest")
        return Interval(value, min(float(low), value), max(float(high), value))

    @property
    def is_determined(self) -> bool:
        """Whether the interval, where there is one, is the data's and narrow enough to mean something."""
        return not self.is_open and (math.isnan(self.low) or self.high <= UNDETERMINED * self.low)

    def __str__(self) -> str:
        """As many digits as half of the interval is worth, between two and six."""
        if math.isnan(self.low):
            return f"{self.value:.3g}"
        half = (self.high - self.low) / 2
        digits = 2
        if self.is_determined and half > 0 and math.isfinite(half) and self.value:
            digits = min(6, max(2, 1 + math.floor(math.log10(abs(self.value))) - math.floor(math.log10(half / 3))))
        ends = ", ".join("∞" if math.isinf(end) else f"{end:.{digits}g}" for end in (self.low, self.high))
        value = "∞" if math.isinf(self.value) else f"{self.value:.{digits}g}"
        return f"{value} [{ends}]" + ("" if self.is_determined else ", not determined")
