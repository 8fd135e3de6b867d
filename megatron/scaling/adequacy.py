"""Whether a fitted law describes its losses at all, in words: what no interval of its parameters tells."""

from __future__ import annotations

import numpy as np

from megatron.scaling.points import Array, Law, Points

LEAST_EXPLAINED = 0.9
"""R² of the log loss below which a law leaves too much open."""
MOST_RISE = 0.02
"""Relative rise along epochs that a law which cannot rise may miss: more than seeds and validation noise give."""
LEAST_Z, LEAST_SHARED = 3.0, 0.01
"""Neighbours whose residuals agree beyond three standard errors, and by more than 1 % of the loss, show a wrong shape."""
MAX_POINTS = 1000
"""Points among which neighbours are sought."""


def r_squared(predicted: Array, losses: Array) -> float:
    """Share of the variance of ``losses`` [n] that ``predicted`` [n] explains; negative where their mean does better."""
    spread = float(np.sum((losses - losses.mean()) ** 2))
    return 1.0 - float(np.sum((losses - predicted) ** 2)) / spread if spread > 0 else float("nan")


def doubts(
    law: Law, points: Points, losses: Array, predicted: Array, *, groups: Array, noise: float
) -> tuple[str, ...]:
    """Why not to believe a fit, in words; empty where nothing speaks against it.

    1. R² of the log loss is below 0.9.
    2. The losses of one size and data set rise along epochs by more than 2 %, and the law cannot rise.
    3. Residuals have structure: those of neighbouring runs, nearest in (log N, log D, log U), agree beyond three standard
       errors and by more than 1 % of the loss. Intervals take the runs for independent and are then too narrow.

    Args:
        law: what was fitted.
        points: where losses are known.
        losses: nats per token [n].
        predicted: the fitted loss [n].
        groups: run of every point [n]; points of one run are no neighbours.
        noise: residual standard deviation of the log loss; residuals beyond three of it count as three.
    """
    found = []
    explained = r_squared(np.log(predicted), np.log(losses))
    if explained < LEAST_EXPLAINED:
        found.append(f"it explains {max(explained, 0.0):.0%} of the variance of the log loss; a law should reach 90 %")
    rises = [] if law.can_rise else _rises(points, losses)
    if rises:
        found.append(
            f"for {len(rises)} of the sizes and data sets the loss rises with epochs, by up to {max(rises):.0%}, which this "
            "form cannot show"
        )
    shared, z = _shared_residual(points, np.log(predicted / losses), groups=groups, noise=noise)
    if z > LEAST_Z and shared > LEAST_SHARED:
        found.append(
            f"neighbouring runs miss it on the same side, by about {shared:.1%} of the loss ({z:.0f} standard errors): it has "
            "not their shape, and the intervals are too narrow"
        )
    return tuple(found)


def _rises(points: Points, losses: Array) -> list[float]:
    """Relative rises above the lowest loss so far along D, one for each (N, U) where it is more than noise."""
    keys = np.stack([points.parameters, points.unique_tokens], axis=1)
    series = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    found = []
    for index in np.unique(series[np.isfinite(losses)]):
        members = np.nonzero(series == index)[0]
        log_loss = np.log(losses[members[np.argsort(points.tokens[members], kind="stable")]])
        rise = float(np.expm1((log_loss - np.minimum.accumulate(log_loss)).max()))
        if rise > MOST_RISE:
            found.append(rise)
    return found


def _shared_residual(points: Points, residual: Array, *, groups: Array, noise: float) -> tuple[float, float]:
    """(what nearest neighbours of other runs share of their residuals, its standard errors from zero)."""
    kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).astype(int))
    residual, groups = np.clip(residual, -3 * noise, 3 * noise)[kept], np.asarray(groups)[kept]
    place = np.log(np.stack([points.parameters, points.tokens, points.unique_tokens], axis=1)[kept])
    distance = np.sum((place[:, None] - place[None]) ** 2, axis=-1)
    distance[groups[:, None] == groups[None]] = np.inf
    nearest = np.argmin(distance, axis=1)
    pairs = np.unique(np.sort(np.stack([np.arange(len(kept)), nearest], axis=1), axis=1), axis=0)
    pairs = pairs[np.isfinite(distance[pairs[:, 0], pairs[:, 1]])]
    spread = float(np.mean(residual**2))
    if len(pairs) < 8 or spread == 0:
        return 0.0, 0.0
    product = float(np.mean(residual[pairs[:, 0]] * residual[pairs[:, 1]]))
    return float(np.sqrt(max(product, 0.0))), product / spread * float(np.sqrt(len(pairs)))
