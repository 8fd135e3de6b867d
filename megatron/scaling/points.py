"""What a law of the validation loss is: L(N, D, U) in nats per token for N parameters, D training tokens, U unique tokens.

Every law is a function of the logarithms of its positive parameters, with an analytic gradient, evaluated for many
parameter vectors at once: fits with many starts and bootstraps are then a few array operations (see fit.py).
The coefficients A, B and P are carried as the value of their term at a reference point (N0, D0, U0) near the data,
which removes most of the correlation between a coefficient and its exponent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Points:
    """Where losses are known or wanted: fp64 arrays of one shape [points].

    Attributes:
        parameters: N, the parameters of C = 6*N*D.
        tokens: D, training tokens with repetitions.
        unique_tokens: U, tokens of one epoch. More than D counts as D: what is not read is not there.
    """

    parameters: Array
    tokens: Array
    unique_tokens: Array

    @staticmethod
    def of(parameters: object, tokens: object, unique_tokens: object) -> Points:
        """Points from numbers or arrays that broadcast together."""
        n, d, u = np.broadcast_arrays(
            *(np.asarray(value, dtype=np.float64) for value in (parameters, tokens, unique_tokens))
        )
        return Points(n.ravel(), d.ravel(), np.minimum(u, d).ravel())

    @property
    def flops(self) -> Array:
        """C = 6*N*D."""
        return 6.0 * self.parameters * self.tokens

    @property
    def epochs(self) -> Array:
        """D/U, at least 1."""
        return self.tokens / self.unique_tokens

    def __len__(self) -> int:
        return len(self.parameters)

    def take(self, index: Array) -> Points:
        """Some of them: ``index`` is of integers or bool [points]."""
        return Points(self.parameters[index], self.tokens[index], self.unique_tokens[index])


@dataclass(frozen=True)
class Reference:
    """The point at which the coefficients are carried (natural logarithms)."""

    log_n: float = 0.0
    log_d: float = 0.0
    log_u: float = 0.0

    @staticmethod
    def of(points: Points) -> Reference:
        """The geometric mean of the data."""
        means = [float(np.log(value).mean()) for value in (points.parameters, points.tokens, points.unique_tokens)]
        return Reference(*means)


class Law(Protocol):
    """A law; ``theta`` are its natural parameters, ``phi`` the logarithms that fits work with, both [..., p]."""

    @property
    def name(self) -> str:
        """In tables and JSON."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, in the order of ``theta``."""

    @property
    def equation(self) -> str:
        """In plain text."""

    @property
    def can_rise(self) -> bool:
        """Whether the loss may rise with epochs, so that the law can show overfitting."""

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        """Loss [s, n] and its gradient [s, n, p] for ``phi`` [s, p]."""

    def to_theta(self, phi: Array, reference: Reference) -> Array:
        """Natural parameters of ``phi``."""

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        """The inverse of :meth:`to_theta`."""

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        """Lower and upper ends [p] of random starts for ``phi``, for data whose lowest loss is ``lowest``."""

    def limits(self) -> tuple[Array, Array]:
        """Bounds [p] of ``phi``: far outside of sensible values, so that a parameter that the data do not determine
        ends at a bound instead of overflowing."""


def columns(phi: Array) -> list[Array]:
    """The parameters of ``phi`` [s, p] as arrays [s, 1], to broadcast against points [n]."""
    return [phi[:, index, None] for index in range(phi.shape[1])]
