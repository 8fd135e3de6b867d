"""Laws with an overfitting penalty that grows without end: Chinchilla for one epoch plus P times a product of powers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron.scaling.chinchilla import CHINCHILLA
from megatron.scaling.points import Array, Points, Reference

MANY = float(np.log(10.0))
"""Coefficients of penalties are carried at ten repetitions."""


@dataclass(frozen=True)
class Factor:
    """A positive quantity that a penalty grows with, as its logarithm: at points [n], and at the reference."""

    of: Callable[[Points], Array]
    at: Callable[[Reference], float]


REPETITIONS = Factor(lambda points: log_repetitions(points), lambda _: MANY)
SIZE = Factor(lambda points: np.log(points.parameters), lambda reference: reference.log_n)
SCARCITY = Factor(lambda points: -np.log(points.unique_tokens), lambda reference: -reference.log_u)
CROWDING = Factor(
    lambda points: np.log(points.parameters / points.unique_tokens), lambda reference: reference.log_n - reference.log_u
)
"""Parameters per unique token."""


@dataclass(frozen=True)
class Penalised:
    """L = E + A/N^alpha + B/D^beta + P * product of the factors to their exponents; zero penalty in the first epoch.

    ``starts``: (low, high) of random starts of the exponents.
    """

    name: str
    names: tuple[str, ...]
    equation: str
    factors: tuple[Factor, ...]
    starts: tuple[tuple[float, float], ...]
    can_rise: bool = True

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        """See :class:`megatron.scaling.points.Law`."""
        base, base_gradient = CHINCHILLA.loss(phi[:, :5], points, reference)
        distances = np.stack([factor.of(points) - factor.at(reference) for factor in self.factors])
        exponents = np.exp(phi[:, 6:])
        size = np.exp(np.minimum(phi[:, 5, None] + exponents @ distances, 50.0))
        penalty = np.where(points.epochs - 1 > 1e-9, size, 0.0)
        gradient = penalty[..., None] * exponents[:, None, :] * distances.T
        return base + penalty, np.concatenate([base_gradient, penalty[..., None], gradient], axis=-1)

    def to_theta(self, phi: Array, reference: Reference) -> Array:
        """The exponentials of ``phi``, with A, B and P taken from the reference point."""
        theta = CHINCHILLA.to_theta(phi, reference)
        theta[..., 5] = np.exp(phi[..., 5] - self._shift(theta, reference))
        return theta

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        """The inverse of :meth:`to_theta`."""
        phi = CHINCHILLA.to_phi(theta, reference)
        phi[..., 5] += self._shift(theta, reference)
        return phi

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        """As Chinchilla; P of up to 0.3 of the lowest loss, exponents from ``starts``."""
        low, high = CHINCHILLA.start_range(lowest)
        exponents = np.log(self.starts)
        return (
            np.concatenate([low, np.log([lowest * 1e-4]), exponents[:, 0]]),
            np.concatenate([high, np.log([lowest * 0.3]), exponents[:, 1]]),
        )

    def limits(self) -> tuple[Array, Array]:
        """As Chinchilla; P and its exponents between the bounds of A and alpha's."""
        low, high = CHINCHILLA.limits()
        places = [1, *[2] * len(self.factors)]
        return np.concatenate([low, low[places]]), np.concatenate([high, high[places]])

    def _shift(self, theta: Array, reference: Reference) -> Array:
        return theta[..., 6:] @ np.array([factor.at(reference) for factor in self.factors])


def log_repetitions(points: Points) -> Array:
    """Logarithm of R = D/U - 1 [n]; a very small number for none."""
    return np.log(np.maximum(points.tokens / points.unique_tokens - 1, 1e-300))


PRESCRIPTIVE = Penalised(
    "prescriptive",
    ("E", "A", "alpha", "B", "beta", "P", "delta", "kappa"),
    "L = E + A/N^alpha + B/D^beta + P*(D/U - 1)^delta*(N/U)^kappa",
    (REPETITIONS, CROWDING),
    ((0.3, 2.0), (0.3, 2.0)),
)
"""The overfitting penalty of arXiv 2605.01640 with both exponents free: repetitions, and parameters per unique token."""

U_SHAPED = Penalised(
    "u_shaped",
    ("E", "A", "alpha", "B", "beta", "P", "kappa", "gamma", "delta"),
    "L = E + A/N^alpha + B/D^beta + P*(D/U - 1)^kappa*N^gamma/U^delta",
    (REPETITIONS, SIZE, SCARCITY),
    ((0.3, 2.0), (0.1, 1.0), (0.1, 1.5)),
)
"""The same with separate exponents of N and U, which is our choice (arXiv 2605.09189 has a separate term c*N^gamma/D^delta):
for many epochs the minimum is then at

    e_opt = (beta*B/(kappa*P) * U^(delta - beta) / N^gamma)^(1/(kappa + beta)),

a power law in U and N as measured for MDM by Quokka (arXiv 2510.03280: e ~ U^0.39/N^0.55)."""
