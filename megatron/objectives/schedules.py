"""Noise schedules of masked diffusion: which share of the tokens is masked at time t.

With α_t the probability that a token is still visible at time t (α_0 = 1, α_1 = 0), the continuous-time bound is
``∫₀¹ −α'_t / (1 − α_t) · E[Σ_masked ce] dt`` (Sahoo et al., arXiv 2406.07524, equation 10; Shi et al., arXiv 2406.04329,
equation 5). Written with the masked share s = 1 − α the weight of a masked token is s'(t) / s(t), and with s itself as the
variable of integration the bound is ``∫₀¹ E[Σ_masked ce | s] / s ds``: no schedule appears in it. A schedule decides only
where the noise draws are spent, that is, the variance of the estimate. In other words: a schedule is a density of the
share. To draw the share from a density f with distribution function F, and to weigh a draw with 1/f, is to take
``s = F⁻¹``, for which s' = 1/f(s): exact importance weights, and the bound stays one.

The masked share is kept away from 0 by a floor, ``p(t) = (1 − ε)·s(t) + ε`` with ε = 1e-3 as in the recipe of
arXiv 2507.15857, and a masked token weighs ``s'(t) / p(t)``. So every schedule estimates the same integral over
p ∈ [ε, 1], times 1/(1 − ε); the linear one has weight 1/p; and the expected weight of every token is ∫ s'(t) dt = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np

MIN_MASK_PROB = 1e-3


class Schedule(Protocol):
    """A share s(t) of masked tokens that grows from s(0) = 0 to s(1) = 1."""

    def share(self, t: np.ndarray) -> np.ndarray:
        """s(t)."""

    def rate(self, t: np.ndarray) -> np.ndarray:
        """s'(t)."""

    @property
    def mean_share(self) -> float:
        """∫₀¹ s(t) dt."""


@dataclass(frozen=True)
class Linear:
    """s = t (arXiv 2502.09992)."""

    mean_share: float = 0.5

    def share(self, t: np.ndarray) -> np.ndarray:
        """s(t)."""
        return t

    def rate(self, t: np.ndarray) -> np.ndarray:
        """s'(t)."""
        return np.ones_like(t)


SCHEDULES = {
    "linear": "schedules.Linear",
    "cosine": "curves.Cosine",
    "polynomial": "curves.Polynomial",
    "bell": "densities.Bell",
    "measured": "densities.Measured",
}
"""Schedules by name: module of this package and class; a run imports its own."""


def build_schedule(name: str, **parameters: object) -> Schedule:
    """The schedule called ``name``, one of :data:`SCHEDULES`; of its parameters those that are not None."""
    module, _, cls = SCHEDULES[name].partition(".")
    given = {key: value for key, value in parameters.items() if value is not None}
    return getattr(import_module(f"megatron.objectives.{module}"), cls)(**given)


def is_symmetric(schedule: Schedule) -> bool:
    """Whether s(t) + s(1 − t) = 1: whether masks at t and at 1 − t can be each other's complement."""
    t = np.linspace(0, 1, 257)
    return bool(np.allclose(schedule.share(t) + schedule.share(1 - t), 1.0, atol=1e-9))


def mask_probability(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    """Probability p(t) of masking a token, fp64 in [ε, 1]."""
    return (1 - MIN_MASK_PROB) * schedule.share(t) + MIN_MASK_PROB


def bound_weight(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    """Weight s'(t) / p(t) of a masked token in the bound, fp64."""
    return schedule.rate(t) / mask_probability(schedule, t)


def mean_mask_probability(schedule: Schedule) -> float:
    """∫₀¹ p(t) dt: the expected share of tokens in the loss."""
    return (1 - MIN_MASK_PROB) * schedule.mean_share + MIN_MASK_PROB


def flat_weight(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    """The same weight 1 / E[p] for every masked token, fp64 (Chang et al., arXiv 2202.04200; arXiv 2602.15014).

    The divisor is the expected number of masked tokens, not the drawn one: a loss must not depend on how a step is split
    into micro-batches.
    """
    return np.full_like(t, 1 / mean_mask_probability(schedule))


BOUND_WEIGHTING = "elbo"
WEIGHTINGS: dict[str, Callable[..., np.ndarray]] = {BOUND_WEIGHTING: bound_weight, "flat": flat_weight}
"""Weights of a masked token at time t; each token weighs 1 in expectation. A loss by any but the first is no bound."""
