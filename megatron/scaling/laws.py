"""Laws of the validation loss: L(N, D, U) in nats per token for N parameters, D training tokens, U unique tokens.

Every law is a function of the logarithms of its positive parameters, with an analytic gradient, evaluated for many
parameter vectors at once: fits with many starts and bootstraps are then a few array operations (see fit.py).
The coefficients A, B and P are carried as the value of their term at a reference point (N0, D0, U0) near the data,
which removes most of the correlation between a coefficient and its exponent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        return 6.0 * self.parameters * self.tokens

    @property
    def epochs(self) -> Array:
        return self.tokens / self.unique_tokens

    def __len__(self) -> int:
        return len(self.parameters)

    def take(self, index: Array) -> Points:
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
    def name(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def equation(self) -> str: ...

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        """Loss [s, n] and its gradient [s, n, p] for ``phi`` [s, p]."""
        ...

    def to_theta(self, phi: Array, reference: Reference) -> Array: ...

    def to_phi(self, theta: Array, reference: Reference) -> Array: ...

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        """Lower and upper ends [p] of random starts for ``phi``, for data whose lowest loss is ``lowest``."""
        ...

    def limits(self) -> tuple[Array, Array]:
        """Bounds [p] of ``phi``: far outside of sensible values, so that a parameter that the data do not determine
        ends at a bound instead of overflowing."""
        ...


@dataclass(frozen=True)
class Chinchilla:
    """L = E + A/N^alpha + B/D^beta (Hoffmann et al., arXiv 2203.15556, eq. 2): every token counts as new."""

    name: str = "chinchilla"
    names: tuple[str, ...] = ("E", "A", "alpha", "B", "beta")
    equation: str = "L = E + A/N^alpha + B/D^beta"

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        e, a, alpha, b, beta = _columns(phi)
        x = np.log(points.parameters) - reference.log_n
        y = np.log(points.tokens) - reference.log_d
        term_n = np.exp(a - np.exp(alpha) * x)
        term_d = np.exp(b - np.exp(beta) * y)
        constant = np.broadcast_to(np.exp(e), term_n.shape)
        gradient = np.stack(
            [constant, term_n, -term_n * x * np.exp(alpha), term_d, -term_d * y * np.exp(beta)], axis=-1
        )
        return constant + term_n + term_d, gradient

    def to_theta(self, phi: Array, reference: Reference) -> Array:
        theta = np.exp(phi)
        theta[..., 1] = np.exp(phi[..., 1] + theta[..., 2] * reference.log_n)
        theta[..., 3] = np.exp(phi[..., 3] + theta[..., 4] * reference.log_d)
        return theta

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        phi = np.log(theta)
        phi[..., 1] -= theta[..., 2] * reference.log_n
        phi[..., 3] -= theta[..., 4] * reference.log_d
        return phi

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        low = np.array([lowest * 0.1, lowest * 0.02, 0.1, lowest * 0.02, 0.1])
        high = np.array([lowest * 0.98, lowest * 1.0, 1.0, lowest * 1.0, 1.0])
        return np.log(low), np.log(high)

    def limits(self) -> tuple[Array, Array]:
        return _LIMITS[:, 0], _LIMITS[:, 1]


@dataclass(frozen=True)
class DataConstrained:
    """Chinchilla with repeated tokens and excess parameters worth less (Muennighoff et al., arXiv 2305.16264, eq. 5-7).

    ``D' = U + U*R_D*(1 - exp(-(D/U - 1)/R_D))`` and ``N' = U_N + U_N*R_N*(1 - exp(-(N/U_N - 1)/R_N))`` with
    ``U_N = min(N_opt(U), N)``, where ``N_opt(U) = (alpha*A/(beta*B))^(1/alpha) * U^(beta/alpha)`` is the model for
    which U tokens are compute-optimal. The loss never rises with epochs: this form cannot show overfitting.
    """

    name: str = "data_constrained"
    names: tuple[str, ...] = ("E", "A", "alpha", "B", "beta", "R_D", "R_N")
    equation: str = "L = E + A/N'^alpha + B/D'^beta"

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        e, a, alpha, b, beta, r_d, r_n = _columns(phi)
        alpha, beta = np.exp(alpha), np.exp(beta)
        log_a, log_b = a + alpha * reference.log_n, b + beta * reference.log_d
        log_n, log_u = np.log(points.parameters), np.log(points.unique_tokens)
        log_optimal = (np.log(alpha) + log_a - np.log(beta) - log_b + beta * log_u) / alpha
        excess = log_optimal < log_n
        useful = np.where(excess, np.exp(np.minimum(log_optimal, log_n)), points.parameters)
        n, n_by_useful, n_by_r = _saturating(points.parameters, useful, np.exp(r_n))
        d, _, d_by_r = _saturating(points.tokens, points.unique_tokens, np.exp(r_d))
        term_n = np.exp(log_a - alpha * np.log(n))
        term_d = np.exp(log_b - beta * np.log(d))
        # d log N' / d log U_N, zero where all parameters are useful and U_N = N does not move
        slide = np.where(excess, n_by_useful * useful / n, 0.0)
        by_alpha = (1 / alpha + reference.log_n - log_optimal) / alpha
        by_beta = (log_u - 1 / beta - reference.log_d) / alpha
        gradient = np.stack(
            [
                np.broadcast_to(np.exp(e), term_n.shape),
                term_n * (1 - slide),  # alpha * d log U_N / d a = 1
                term_n * alpha * (reference.log_n - np.log(n) - alpha * slide * by_alpha),
                term_d + term_n * slide,
                beta * (term_d * (reference.log_d - np.log(d)) - term_n * alpha * slide * by_beta),
                -term_d * beta / d * d_by_r,
                -term_n * alpha / n * n_by_r,
            ],
            axis=-1,
        )
        return np.exp(e) + term_n + term_d, gradient

    def to_theta(self, phi: Array, reference: Reference) -> Array:
        return CHINCHILLA.to_theta(phi, reference)

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        return CHINCHILLA.to_phi(theta, reference)

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        low, high = CHINCHILLA.start_range(lowest)
        return np.append(low, np.log([2.0, 1.0])), np.append(high, np.log([1000.0, 100.0]))

    def limits(self) -> tuple[Array, Array]:
        low, high = CHINCHILLA.limits()
        return np.append(low, np.log([0.1, 0.1])), np.append(high, np.log([1e5, 1e5]))


@dataclass(frozen=True)
class UShaped:
    """L = E + A/N^alpha + B/D^beta + P*R^kappa*N^gamma/U^delta, with R = D/U - 1 repetitions: can show overfitting.

    Chinchilla for one epoch, plus a penalty that grows with repetitions and model size and falls with unique data.
    Additive penalties of this kind are used by arXiv 2605.01640 (one coefficient) and arXiv 2605.09189 (a separate
    term c*N^gamma/D^delta); free exponents are our choice, because for many epochs the minimum is then at

        e_opt = (beta*B/(kappa*P) * U^(delta - beta) / N^gamma)^(1/(kappa + beta)),

    a power law in U and N as measured for MDM by Quokka (arXiv 2510.03280: e ~ U^0.39/N^0.55).
    """

    name: str = "u_shaped"
    names: tuple[str, ...] = ("E", "A", "alpha", "B", "beta", "P", "kappa", "gamma", "delta")
    equation: str = "L = E + A/N^alpha + B/D^beta + P*(D/U - 1)^kappa*N^gamma/U^delta"

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        base, base_gradient = CHINCHILLA.loss(phi[:, :5], points, reference)
        p, kappa, gamma, delta = _columns(phi[:, 5:])
        kappa, gamma, delta = np.exp(kappa), np.exp(gamma), np.exp(delta)
        repeats = points.tokens / points.unique_tokens - 1
        log_r = np.log(np.maximum(repeats, 1e-300)) - _PENALTY_LOG_R
        x = np.log(points.parameters) - reference.log_n
        u = np.log(points.unique_tokens) - reference.log_u
        exponent = np.minimum(p + kappa * log_r + gamma * x - delta * u, 50.0)
        penalty = np.where(repeats > 1e-9, np.exp(exponent), 0.0)
        gradient = np.stack([penalty, penalty * kappa * log_r, penalty * gamma * x, -penalty * delta * u], axis=-1)
        return base + penalty, np.concatenate([base_gradient, gradient], axis=-1)

    def to_theta(self, phi: Array, reference: Reference) -> Array:
        theta = CHINCHILLA.to_theta(phi, reference)
        theta[..., 5] = np.exp(phi[..., 5] - self._shift(theta, reference))
        return theta

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        phi = CHINCHILLA.to_phi(theta, reference)
        phi[..., 5] += self._shift(theta, reference)
        return phi

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        low, high = CHINCHILLA.start_range(lowest)
        return (
            np.append(low, np.log([lowest * 1e-4, 0.3, 0.1, 0.1])),
            np.append(high, np.log([lowest * 0.3, 2.0, 1.0, 1.5])),
        )

    def limits(self) -> tuple[Array, Array]:
        low, high = CHINCHILLA.limits()
        return np.concatenate([low, low[[1, 2, 2, 2]]]), np.concatenate([high, high[[1, 2, 2, 2]]])

    @staticmethod
    def _shift(theta: Array, reference: Reference) -> Array:
        kappa, gamma, delta = theta[..., 6], theta[..., 7], theta[..., 8]
        return kappa * _PENALTY_LOG_R + gamma * reference.log_n - delta * reference.log_u


_PENALTY_LOG_R = float(np.log(10.0))
"""The penalty's coefficient is carried at ten repetitions."""

_LIMITS = np.log([[1e-6, 150.0], [1e-9, 150.0], [0.005, 4.0], [1e-9, 150.0], [0.005, 4.0]])
"""Of E, the terms of A and B at the reference point, and the exponents."""

CHINCHILLA = Chinchilla()
DATA_CONSTRAINED = DataConstrained()
U_SHAPED = UShaped()
LAWS: dict[str, Law] = {law.name: law for law in (CHINCHILLA, DATA_CONSTRAINED, U_SHAPED)}


@dataclass(frozen=True)
class Coefficients:
    """Published values of one law. ``theta`` in the order of the law's ``names``; R_N may be infinite (N' = N)."""

    law: Law
    theta: tuple[float, ...]
    source: str
    values: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", dict(zip(self.law.names, self.theta)))

    def loss(self, parameters: object, tokens: object, unique_tokens: object) -> Array:
        """Loss in nats per token; arguments broadcast; shape [points]."""
        phi = self.law.to_phi(np.array([self.theta]), Reference())
        return self.law.loss(phi, Points.of(parameters, tokens, unique_tokens), Reference())[0][0]


def _columns(phi: Array) -> list[Array]:
    """The parameters of ``phi`` [s, p] as arrays [s, 1], to broadcast against points [n]."""
    return [phi[:, index, None] for index in range(phi.shape[1])]


def _saturating(total: Array, unique: Array, rate: Array) -> tuple[Array, Array, Array]:
    """Effective amount ``unique*(1 + rate*(1 - exp(-x/rate)))`` with x = total/unique - 1, and its derivatives by
    ``unique`` and by log ``rate``."""
    rate = np.minimum(rate, 1e12)  # infinite: never saturates
    x = np.maximum(total / unique - 1, 0.0)
    decay = np.exp(-x / rate)
    value = unique * (1 - rate * np.expm1(-x / rate))
    by_unique = value / unique - decay * total / unique
    by_log_rate = unique * (-rate * np.expm1(-x / rate) - decay * x)
    return value, by_unique, by_log_rate
