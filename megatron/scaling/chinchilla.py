"""Laws whose loss never rises with training: Chinchilla, and with repeated tokens and excess parameters worth less."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.scaling.points import Array, Points, Reference, columns

LIMITS = np.log([[1e-6, 150.0], [1e-9, 150.0], [0.005, 4.0], [1e-9, 150.0], [0.005, 4.0]])
"""Of E, the terms of A and B at the reference point, and the exponents."""


@dataclass(frozen=True)
class Chinchilla:
    """L = E + A/N^alpha + B/D^beta (Hoffmann et al., arXiv 2203.15556, eq. 2): every token counts as new."""

    name: str = "chinchilla"
    names: tuple[str, ...] = ("E", "A", "alpha", "B", "beta")
    equation: str = "L = E + A/N^alpha + B/D^beta"
    can_rise: bool = False

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        """See :class:`megatron.scaling.points.Law`."""
        e, a, alpha, b, beta = columns(phi)
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
        """The exponentials of ``phi``, A and B taken from the reference point to N = D = 1."""
        theta = np.exp(phi)
        theta[..., 1] = np.exp(phi[..., 1] + theta[..., 2] * reference.log_n)
        theta[..., 3] = np.exp(phi[..., 3] + theta[..., 4] * reference.log_d)
        return theta

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        """The inverse of :meth:`to_theta`."""
        phi = np.log(theta)
        phi[..., 1] -= theta[..., 2] * reference.log_n
        phi[..., 3] -= theta[..., 4] * reference.log_d
        return phi

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        """Terms of up to the lowest loss, exponents between 0.1 and 1."""
        low = np.array([lowest * 0.1, lowest * 0.02, 0.1, lowest * 0.02, 0.1])
        high = np.array([lowest * 0.98, lowest * 1.0, 1.0, lowest * 1.0, 1.0])
        return np.log(low), np.log(high)

    def limits(self) -> tuple[Array, Array]:
        """See :data:`LIMITS`."""
        return LIMITS[:, 0], LIMITS[:, 1]


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
    can_rise: bool = False

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        """See :class:`megatron.scaling.points.Law`."""
        e, a, alpha, b, beta, r_d, r_n = columns(phi)
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
        """As Chinchilla; R_D and R_N are plain exponentials."""
        return CHINCHILLA.to_theta(phi, reference)

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        """The inverse of :meth:`to_theta`."""
        return CHINCHILLA.to_phi(theta, reference)

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        """As Chinchilla; R_D from 2 to 1000 and R_N from 1 to 100."""
        low, high = CHINCHILLA.start_range(lowest)
        return np.append(low, np.log([2.0, 1.0])), np.append(high, np.log([1000.0, 100.0]))

    def limits(self) -> tuple[Array, Array]:
        """As Chinchilla; R_D and R_N between 0.1 and 100,000."""
        low, high = CHINCHILLA.limits()
        return np.append(low, np.log([0.1, 0.1])), np.append(high, np.log([1e5, 1e5]))


CHINCHILLA = Chinchilla()
DATA_CONSTRAINED = DataConstrained()


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
