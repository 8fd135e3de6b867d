"""A law of overfitting that ends: once all is memorised, more epochs cannot make it worse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.scaling.chinchilla import CHINCHILLA
from megatron.scaling.penalty import CROWDING, log_repetitions
from megatron.scaling.points import Array, Points, Reference, columns


@dataclass(frozen=True)
class Memorisation:
    """L = E + A/N^alpha + B/D^beta + M * share memorised; our own form, made for the runs of arXiv 2305.16264.

    What having memorised all data costs is ``M = S*ln(1 + P*(N/U)^kappa/S)``: a power of the parameters per unique token, as
    in arXiv 2605.01640, that turns into a logarithm beyond S nats (a model that is sure and wrong pays the logarithm of its
    odds). The share memorised is ``1/(1 + (H/R)^delta)``, R = D/U - 1: half of it after H repetitions, fewer for larger
    models and data sets, ``H = h/(N*U)^nu``. Without S and with H beyond all runs this is a penalty P*R^delta*(N/U)^kappa.
    """

    name: str = "memorisation"
    names: tuple[str, ...] = ("E", "A", "alpha", "B", "beta", "P", "kappa", "S", "h", "nu", "delta")
    equation: str = "L = E + A/N^alpha + B/D^beta + S*ln(1 + P*(N/U)^kappa/S)/(1 + (H/(D/U - 1))^delta), H = h/(N*U)^nu"
    can_rise: bool = True

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        """See :class:`megatron.scaling.points.Law`."""
        base, base_gradient = CHINCHILLA.loss(phi[:, :5], points, reference)
        p, kappa, s, half, nu, delta = columns(phi[:, 5:])
        kappa, s, nu, delta = np.exp(kappa), np.exp(s), np.exp(nu), np.exp(delta)
        crowding = CROWDING.of(points) - CROWDING.at(reference)
        scale = np.log(points.parameters * points.unique_tokens) - reference.log_n - reference.log_u
        linear = np.exp(np.minimum(p + kappa * crowding, 50.0))
        most = s * np.log1p(linear / s)
        by_p = linear / (1 + linear / s)
        odds = np.clip(delta * (log_repetitions(points) - half + nu * scale), -700.0, 50.0)
        share = 1 / (1 + np.exp(-odds))
        by_odds = most * share * (1 - share)
        gradient = [
            by_p * share,
            by_p * share * kappa * crowding,
            (most - by_p) * share,
            -by_odds * delta,
            by_odds * delta * nu * scale,
            by_odds * odds,
        ]
        return base + most * share, np.concatenate([base_gradient, np.stack(gradient, axis=-1)], axis=-1)

    def to_theta(self, phi: Array, reference: Reference) -> Array:
        """The exponentials of ``phi``, with A, B, P and h taken from the reference point."""
        theta = CHINCHILLA.to_theta(phi, reference)
        theta[..., 5] = np.exp(phi[..., 5] - theta[..., 6] * CROWDING.at(reference))
        theta[..., 8] = np.exp(phi[..., 8] + theta[..., 9] * (reference.log_n + reference.log_u))
        return theta

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        """The inverse of :meth:`to_theta`."""
        phi = CHINCHILLA.to_phi(theta, reference)
        phi[..., 5] += theta[..., 6] * CROWDING.at(reference)
        phi[..., 8] -= theta[..., 9] * (reference.log_n + reference.log_u)
        return phi

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        """As Chinchilla; of P, kappa, S, h, nu and delta what is plausible."""
        low, high = CHINCHILLA.start_range(lowest)
        return (
            np.append(low, np.log([lowest * 0.01, 0.5, lowest * 0.1, 10.0, 0.05, 0.5])),
            np.append(high, np.log([lowest * 1.0, 2.0, lowest * 3.0, 300.0, 0.5, 2.5])),
        )

    def limits(self) -> tuple[Array, Array]:
        """As Chinchilla; wide bounds of P, kappa, S, h, nu and delta."""
        low, high = CHINCHILLA.limits()
        return (
            np.append(low, np.log([1e-9, 0.005, 0.01, 0.1, 0.001, 0.05])),
            np.append(high, np.log([150.0, 6.0, 1e3, 1e6, 4.0, 6.0])),
        )


MEMORISATION = Memorisation()
