"""Robust least squares for many parameter vectors at once: batched Levenberg-Marquardt with Huber weights.

A fit with many starts, all bootstrap refits and all cross-validation folds are each one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.scaling.laws import Law, Points, Reference

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """A law, the points [n] and their reference; residuals are log(predicted) - log(observed)."""

    law: Law
    points: Points
    reference: Reference

    def residuals(self, phi: Array, log_loss: Array) -> tuple[Array, Array]:
        """Residuals [s, n] and their gradient [s, n, p] for ``phi`` [s, p]; ``log_loss`` is [n] or [s, n]."""
        loss, gradient = self.law.loss(phi, self.points, self.reference)
        return np.log(loss) - log_loss, gradient / loss[..., None]


def minimize(
    problem: Problem,
    phi: Array,
    log_loss: Array,
    *,
    huber_delta: float,
    weights: Array | float = 1.0,
    iterations: int = 60,
) -> tuple[Array, Array]:
    """Minimise ``sum(weights * huber(residual))`` for every row of ``phi``.

    Args:
        problem: law and points.
        phi: starts [s, p].
        log_loss: observations [n] or [s, n], natural logarithm of the loss.
        huber_delta: residual beyond which the penalty is linear.
        weights: weight of every point, scalar or [s, n]; 0 leaves a point out.
        iterations: upper limit; rows stop when a step no longer helps.

    Returns:
        the solutions [s, p] and their costs [s].
    """
    num_rows, num_points = len(phi), len(problem.points)
    observed = np.broadcast_to(log_loss, (num_rows, num_points))
    weight = np.broadcast_to(np.asarray(weights, dtype=np.float64), (num_rows, num_points))
    lower, upper = problem.law.limits()
    solution, final_cost = np.clip(phi, lower, upper), np.full(num_rows, np.inf)
    active = np.arange(num_rows)  # rows that still move; finished ones cost nothing
    damping = np.full(num_rows, 1e-2)
    with np.errstate(all="ignore"):
        phi = solution.copy()
        residual, jacobian = problem.residuals(phi, observed)
        cost = _cost(residual, huber_delta, weight)
        for _ in range(iterations):
            step = _step(residual, jacobian, damping, huber_delta=huber_delta, weights=weight)
            trial = np.clip(phi + np.clip(step, -2.0, 2.0), lower, upper)
            new_residual, new_jacobian = problem.residuals(trial, observed)
            new_cost = _cost(new_residual, huber_delta, weight)
            better = new_cost < cost
            gain = np.where(better, (cost - new_cost) / np.maximum(cost, 1e-300), 1.0)
            if better.all():  # nothing to copy
                phi, cost, residual, jacobian = trial, new_cost, new_residual, new_jacobian
            else:
                phi[better], cost[better] = trial[better], new_cost[better]
                residual[better], jacobian[better] = new_residual[better], new_jacobian[better]
            damping = np.clip(np.where(better, damping / 4, damping * 5), 1e-9, 1e9)
            solution[active], final_cost[active] = phi, cost
            moving = (gain > 1e-8) & (damping < 1e6)
            if not moving.any():
                break
            if not moving.all():
                active, phi, cost, damping = active[moving], phi[moving], cost[moving], damping[moving]
                residual, jacobian = residual[moving], jacobian[moving]
                observed, weight = observed[moving], weight[moving]
    return solution, final_cost


def _step(residual: Array, jacobian: Array, damping: Array, *, huber_delta: float, weights: Array) -> Array:
    """Levenberg-Marquardt step [s, p] with iteratively reweighted residuals."""
    size = np.maximum(np.abs(residual), 1e-300)
    robust = np.sqrt(np.minimum(1.0, huber_delta / size) * weights)
    scaled = jacobian * robust[..., None]
    normal = np.swapaxes(scaled, 1, 2) @ scaled
    gradient = np.einsum("snp,sn->sp", scaled, residual * robust)
    diagonal = np.einsum("spp->sp", normal)
    ridge = damping[:, None] * diagonal + 1e-12 * (diagonal.max(axis=1, keepdims=True) + 1e-300)
    normal = normal + ridge[:, :, None] * np.eye(normal.shape[-1])
    bad = ~np.isfinite(normal).all(axis=(1, 2)) | ~np.isfinite(gradient).all(axis=1)
    normal[bad], gradient[bad] = np.eye(normal.shape[-1]), 0.0
    return -np.linalg.solve(normal, gradient[..., None])[..., 0]


def _cost(residual: Array, delta: float, weights: Array) -> Array:
    size = np.abs(residual)
    value = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    total = np.sum(np.where(weights > 0, value, 0.0) * weights, axis=1)
    return np.where(np.isfinite(total), total, np.inf)
