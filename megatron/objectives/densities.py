"""Noise schedules that are given by the density of the masked share, see ``schedules.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron.errors import require


@dataclass(frozen=True)
class Bell:
    """Shares of the density f(s) = 1 − depth · cos(2π·s): a raised cosine on a floor, most draws near one half.

    Attributes:
        depth: in [0, 1); the density is 1 − depth at both ends, and importance weights are at most 1 / (1 − depth).
    """

    depth: float = 0.8
    mean_share: ClassVar[float] = 0.5

    def share(self, t: np.ndarray) -> np.ndarray:
        """F⁻¹(t) of F(s) = s − depth · sin(2π·s) / 2π, by bisection to the last bit."""
        low, high = np.zeros_like(t, dtype=np.float64), np.ones_like(t, dtype=np.float64)
        for _ in range(60):
            middle = (low + high) / 2
            is_below = middle - self.depth * np.sin(2 * np.pi * middle) / (2 * np.pi) < t
            low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
        return high

    def rate(self, t: np.ndarray) -> np.ndarray:
        """s'(t) = 1 / f(s(t))."""
        return 1 / (1 - self.depth * np.cos(2 * np.pi * self.share(t)))


@dataclass(frozen=True)
class Measured:
    """Shares of a density that is constant on n equal parts of [0, 1] and proportional to the spread of the loss there.

    Of all densities with n such steps it is the one of least variance, if the spread is the standard deviation of what a
    draw adds at that share (times are stratified: Neyman's allocation), and, with independent times, if it is the root mean
    square (importance sampling; Owen, "Monte Carlo theory, methods and examples", section 9.1).

    Attributes:
        spread: of each part, in any unit: numbers, or a text of numbers with commas between them.

    Raises:
        UserError: fewer than two numbers, or one that is not positive and finite.
    """

    spread: tuple[float, ...] | str

    def __post_init__(self) -> None:
        given = self.spread.split(",") if isinstance(self.spread, str) else self.spread
        try:
            values = tuple(float(word) for word in given)
        except ValueError:
            values = ()
        require(
            len(values) > 1 and all(0 < value < math.inf for value in values) and max(values) <= 1000 * min(values),
            f"--noise-schedule-spread {str(self.spread)[:60]}",
            "it is the spread of the loss in two or more equal parts of [0, 1], positive and none above 1000 times another",
            "give for instance 1.4,1.0,0.8,0.9",
        )
        object.__setattr__(self, "spread", values)

    @property
    def density(self) -> np.ndarray:
        """f in each part, fp64 [n]."""
        spread = np.array(self.spread, dtype=np.float64)
        return spread / spread.mean()

    @property
    def _ends(self) -> np.ndarray:
        """F at the n + 1 ends of the parts."""
        return np.append(0.0, np.cumsum(self.density) / len(self.spread)).clip(0, 1)

    def share(self, t: np.ndarray) -> np.ndarray:
        """F⁻¹(t), linear in each part."""
        return np.interp(t, self._ends, np.linspace(0, 1, len(self.spread) + 1))

    def rate(self, t: np.ndarray) -> np.ndarray:
        """s'(t) = 1 / f(s(t))."""
        return 1 / self.density[np.searchsorted(self._ends[1:-1], t, side="right")]

    @property
    def mean_share(self) -> float:
        """The mean of the density."""
        middles = (np.arange(len(self.spread)) + 0.5) / len(self.spread)
        return float((self.density * middles).mean())
