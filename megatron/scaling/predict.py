"""What a law, fitted or published, says about runs that nobody has made: losses, optima and where two objectives cross."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from megatron.scaling.fit import Fit
from megatron.scaling.interval import Interval
from megatron.scaling.laws import Coefficients, Points

Array = np.ndarray
Model = Fit | Coefficients

MAX_REFITS = 200
"""Bootstrap refits used for intervals of derived quantities."""


def losses(model: Model, points: Points, *, ceiling: float = math.inf) -> tuple[Array, Array]:
    """Predicted loss [n] and that of up to 200 bootstrap refits [b, n]; published coefficients count as one refit.

    Args:
        ceiling: no loss above this, ln of the vocabulary: what guessing costs.
    """
    if isinstance(model, Coefficients):
        central = np.minimum(model.loss(points.parameters, points.tokens, points.unique_tokens), ceiling)
        return central, central[None]
    refits = replace(model, samples=model.samples[:MAX_REFITS]).loss_samples(points)
    return np.minimum(model.loss(points), ceiling), np.minimum(refits, ceiling)


def central_losses(model: Model, points: Points) -> Array:
    """Predicted loss [n] alone: for searches over many points."""
    return losses(model if isinstance(model, Coefficients) else replace(model, samples=model.samples[:1]), points)[0]


def knows(model: Model, points: Points) -> Array:
    """Whether [n] a prediction follows from the runs, whatever the parameters are that they leave open."""
    return model.knows(points) if isinstance(model, Fit) else np.ones(len(points), dtype=bool)


def compute_optimal(model: Model, flops: float, unique_tokens: float = math.inf) -> tuple[Interval, Interval]:
    """Compute-optimal parameters N and tokens D = C/(6N), each with its interval, for ``unique_tokens`` of data; N from 10^4 to
    10^13, to 1e-5 of itself where the law is smooth."""
    sizes = np.geomspace(1e4, 1e13, 1801)
    points = Points.of(sizes, flops / (6 * sizes), unique_tokens)
    best, refits = (_between(sizes, _lowest(values)[0]) for values in losses(model, points))
    parameters = Interval.of(float(best), refits)
    value, low, high = (float(flops / (6 * size)) for size in (parameters.value, parameters.high, parameters.low))
    return parameters, Interval(value, low, high)


def best_epochs(model: Model, parameters: float, unique_tokens: float) -> Interval | None:
    """Epochs at which the loss is lowest, with its interval; None for a law that cannot show overfitting.

    Infinite where the loss still falls after 100,000 epochs.
    """
    if not model.law.can_rise:
        return None
    epochs = np.geomspace(1, 1e5, 1501)
    found = losses(model, Points.of(parameters, epochs * unique_tokens, unique_tokens))
    places = [_lowest(values)[0] for values in found]
    best, refits = (np.where(place < len(epochs) - 1, _between(epochs, place), math.inf) for place in places)
    return Interval.of(float(best), refits)


def critical_compute(ar: Model, mdm: Model, unique_tokens: float) -> Interval:
    """FLOPs from which the best MDM is at or below the best AR on this much data, with its interval.

    At each budget both choose size and length freely, up to the budget. Infinite where AR stays ahead up to 1e28 FLOPs.
    """
    budgets = np.geomspace(1e10, 1e28, 217)
    paths = [_best_by_budget(model, budgets, unique_tokens) for model in (ar, mdm)]
    central = _crossing(budgets, (paths[0][0] - paths[1][0])[None])[0]
    # Refits of the two fits are independent of each other, so every pairing is as good: several make the ends steadier.
    count = min(len(paths[0][1]), len(paths[1][1]))
    refits = [_crossing(budgets, paths[0][1][:count] - np.roll(paths[1][1][:count], shift, axis=0))
              for shift in range(min(count, 8))]  # fmt: skip
    return Interval.of(float(central), np.concatenate(refits))


def _best_by_budget(model: Model, budgets: Array, unique_tokens: float) -> tuple[Array, Array]:
    """Lowest loss within each budget: [c] and, per bootstrap refit, [b, c]. Spending less is allowed."""
    sizes = np.geomspace(1e5, 1e12, 57)
    points = Points.of(sizes[None, :], budgets[:, None] / (6 * sizes[None, :]), unique_tokens)
    shape = (len(budgets), len(sizes))
    inside = points.tokens.reshape(shape) >= 1e3  # fewer tokens than one sample is no training
    central, samples = losses(model, points)
    best, spread = (_lowest(np.where(inside, found.reshape(-1, *shape), np.inf))[1] for found in (central, samples))
    return np.minimum.accumulate(best[0]), np.minimum.accumulate(spread, axis=1)


def _lowest(values: Array) -> tuple[Array, Array]:
    """(place, value) of the minimum along the last axis [..., n], the place in steps of the grid: of the parabola through the
    lowest value and its two neighbours; at an end of the grid, and beside infinite values, of the grid itself."""
    place = values.argmin(axis=-1)
    middle = np.clip(place, 1, values.shape[-1] - 2)[..., None]
    before, lowest, after = (np.take_along_axis(values, middle + i, axis=-1)[..., 0] for i in (-1, 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        slope, bend = (after - before) / 2, before - 2 * lowest + after
        shift = np.where((place == middle[..., 0]) & (bend > 0) & (bend < math.inf), -slope / bend, 0.0)
        change = np.where(shift, slope * shift / 2, 0.0)
    return place + shift, values.min(axis=-1) + change


def _between(grid: Array, place: Array) -> Array:
    """What is at a place of :func:`_lowest` on a geometric grid."""
    return np.exp(np.interp(place, np.arange(len(grid)), np.log(grid)))


def _crossing(budgets: Array, lead: Array) -> Array:
    """Where MDM's lead [b, c] (AR's loss minus MDM's) becomes positive for good, [b]; infinite where AR is ahead at the
    end. Between two budgets of the grid the lead is a line in log C."""
    behind = ~(lead >= 0)
    last = behind.shape[1] - 1 - np.argmax(behind[:, ::-1], axis=1)
    last = np.where(behind.any(axis=1), last, -1)
    found = np.full(len(lead), budgets[0])
    found[last == len(budgets) - 1] = np.inf
    rows = np.nonzero((last >= 0) & (last < len(budgets) - 1))[0]
    start = last[rows]
    before, after = lead[rows, start], lead[rows, start + 1]
    share = np.where(np.isfinite(before), before / (before - after), 1.0)
    logs = np.log(budgets)
    found[rows] = np.exp(logs[start] + share * (logs[start + 1] - logs[start]))
    return found
