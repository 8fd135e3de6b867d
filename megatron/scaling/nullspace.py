"""What runs do not show of a law: directions in which its parameters move and no loss at the runs does.

With every token read once nothing moves R_D; with models of one size E and A/N^alpha are one number. Such directions are the
null space of the Jacobian of the log loss at the optimum. No refit to noise leaves its start along them, so they are gone
along on purpose: parameters far apart on them that fit the runs as well (:func:`equivalents`) are where refits begin, and what
they disagree about is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.scaling.laws import Law, Reference
from megatron.scaling.solve import Problem, minimize

Array = np.ndarray
UNSEEN = 1e-6
"""A column below this share of the largest is not seen, nor a direction whose singular value, columns being of length 1, is
below this share of the largest. The ridge of solve.py (1e-12 of a squared column) drowns the former."""
LEAST_WEIGHT = 1e-4
"""Cosine between a parameter and the null space from which on it is open."""
NUM_EQUIVALENTS, LEAST_EQUIVALENTS = 64, 8
AS_GOOD = 0.1
"""Rms distance at the runs, in residual standard deviations, up to which parameters fit as well."""


@dataclass(frozen=True)
class Sight:
    """What a Jacobian [n, p] sees.

    Attributes:
        seen: orthonormal basis [n, r] of the losses that parameters move.
        null: orthonormal basis [p, p - r] of what moves no loss, in parameters times ``scale``.
        scale: [p], lengths of the columns.
    """

    seen: Array
    null: Array
    scale: Array

    @property
    def rank(self) -> int:
        """Directions that are seen: as many parameters as the runs determine."""
        return self.seen.shape[1]

    @staticmethod
    def of(jacobian: Array) -> Sight:
        """Singular vectors of the Jacobian with columns of length 1, unseen ones 0."""
        length = np.linalg.norm(jacobian, axis=0)
        least = UNSEEN * length.max()
        jacobian, length = np.where(length > least, jacobian, 0.0), np.maximum(length, least)
        left, values, right = np.linalg.svd(jacobian / length, full_matrices=False)
        rank = int(np.sum(values > UNSEEN * values[0]))
        return Sight(left[:, :rank], right[rank:].T, length)


def open_parameters(law: Law, phi: Array, reference: Reference, sight: Sight) -> list[str]:
    """Names of the natural parameters at ``phi`` [p] with a part in the null space."""
    step = 1e-6 * np.eye(len(phi))
    by_phi = (np.log(law.to_theta(phi + step, reference)) - np.log(law.to_theta(phi - step, reference))).T / 2e-6
    rows = by_phi / sight.scale
    weight = np.linalg.norm(rows @ sight.null, axis=1) / np.linalg.norm(rows, axis=1)
    return [name for name, part in zip(law.names, weight) if part > LEAST_WEIGHT]


def equivalents(problem: Problem, phi: Array, sight: Sight, *, noise: float, rng: np.random.Generator) -> Array:
    """Parameters [k, p] that fit the runs as ``phi`` [p] does, itself first: alone where the null space is empty.

    The others are drawn along the null space, half of them anywhere between the limits of the search, half nearer. It bends, so
    each is then fitted to the losses of ``phi``; kept is what gets there, and the nearest where little does.
    """
    if not sight.null.size:
        return phi[None]
    along = np.linalg.qr(sight.null / sight.scale[:, None])[0]
    away = rng.uniform(*problem.law.limits(), size=(NUM_EQUIVALENTS, len(phi))) - phi
    share = np.minimum(np.geomspace(0.01, 100.0, NUM_EQUIVALENTS), 1.0)[:, None]
    starts = phi + share * (away @ along @ along.T)
    with np.errstate(all="ignore"):
        losses = np.log(problem.law.loss(phi[None], problem.points, problem.reference)[0][0])
        found = minimize(problem, starts, losses, huber_delta=1.0, iterations=150)[0]
        distance = np.nan_to_num(np.sqrt(np.mean(problem.residuals(found, losses)[0] ** 2, axis=1)), nan=np.inf)
    order = np.argsort(distance)
    kept = max(LEAST_EQUIVALENTS, int(np.sum(distance <= AS_GOOD * noise)))
    return np.concatenate([phi[None], found[order[:kept]]])
