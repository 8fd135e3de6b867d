"""Noise schedules that are given by the masked share as a function of time, see ``schedules.py``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.errors import require


@dataclass(frozen=True)
class Cosine:
    """s = cos(π/2 · (1 − t)) (Chang et al., arXiv 2202.04200; arXiv 2406.04329, table 4): many highly masked draws."""

    mean_share: float = 2 / np.pi

    def share(self, t: np.ndarray) -> np.ndarray:
        """s(t)."""
        return np.sin(np.pi / 2 * t)

    def rate(self, t: np.ndarray) -> np.ndarray:
        """s'(t)."""
        return np.pi / 2 * np.cos(np.pi / 2 * t)


@dataclass(frozen=True)
class Polynomial:
    """s = t^power (arXiv 2406.04329, table 4): a power above 1 gives many lightly masked draws.

    Attributes:
        power: exponent, at least 1: below it s'(0) is infinite, and the floor on p does not bound s'(t) / p(t).

    Raises:
        UserError: such a power.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        require(
            self.power >= 1,
            f"--noise-schedule-power {self.power}",
            "below 1 the weights of the loss are unbounded at t = 0",
            "choose 1 (linear) or more",
        )

    def share(self, t: np.ndarray) -> np.ndarray:
        """s(t)."""
        return t**self.power

    def rate(self, t: np.ndarray) -> np.ndarray:
        """s'(t)."""
        return self.power * t ** (self.power - 1)

    @property
    def mean_share(self) -> float:
        """1 / (power + 1)."""
        return 1 / (self.power + 1)
