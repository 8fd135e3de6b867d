"""Fit a law to measured losses: robust, from many starts, with bootstrap intervals and held-out error.

Losses are fitted in the logarithm with a Huber penalty (as Hoffmann et al., arXiv 2203.15556, section D.2, with the
penalty's width set from the data instead of fixed). Intervals come from a wild bootstrap: the fitted curve plus its
residuals, each inflated for leverage and with a random sign per run, refitted. Signs are shared within a run, because
losses along one run err together. Refits begin all over what the runs leave open (nullspace.py). Starts, signs and folds have
random streams of their own: every law is judged on the same left-out runs, under the same noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import UserError
from megatron.files import make_folder, replace_file
from megatron.runs.sums import t_quantile
from megatron.scaling.adequacy import doubts, r_squared
from megatron.scaling.interval import Interval
from megatron.scaling.laws import LAWS, Law, Points, Reference
from megatron.scaling.nullspace import Sight, equivalents, open_parameters
from megatron.scaling.solve import Problem, minimize

Array = np.ndarray
FORMAT = 1
HUBER_IN_SD = 1.345
"""Huber's width in residual standard deviations: 95 % efficient for Gaussian noise, still blunt to outliers."""
SAME = 1e-3
"""Relative difference of two losses that no run tells apart: what seeds differ by."""
AT_BOUND = 0.025
"""Share of refits at a bound of the search from which on an end of the 95 % interval is that bound, not the data's."""


@dataclass(frozen=True)
class Fit:
    """One fitted law.

    Attributes:
        law: the law.
        theta: fitted parameters [p], in the order of ``law.names``.
        samples: bootstrap refits [b, p].
        noise: residual standard deviation of the log loss (a relative error).
        cross_validation, extrapolation: relative error (rms of log residuals) on left-out runs, and on the runs with
            the most compute when fitted to the others; None with too few points.
        ranges: {"parameters" | "tokens" | "unique_tokens" | "epochs" | "flops": (low, high)} of the data.
        objective, label: whose losses these are and what they are ("NLL (exact)", "NLL bound").
        num_points, num_runs: size of the data.
        r_squared: share of the variance of the loss (not of its logarithm) that the law explains.
        doubts: why not to believe it, in words (adequacy.py); empty where nothing speaks against it.
        source: whose runs these are, where they were imported; "" for own runs.
        open: parameters that the runs do not see, alone or together, or whose refits end at a bound of the search.
        equivalents: parameters [k, p] that fit the runs as well as ``theta``, all over what is open; none where nothing is.
    """

    law: Law
    theta: Array
    samples: Array
    noise: float
    cross_validation: float | None
    extrapolation: float | None
    ranges: dict[str, tuple[float, float]]
    objective: str = ""
    label: str = ""
    num_points: int = 0
    num_runs: int = 0
    r_squared: float | None = None
    doubts: tuple[str, ...] = ()
    source: str = ""
    open: tuple[str, ...] = ()
    equivalents: Array | None = None

    def interval(self, name: str) -> Interval:
        """Value and 95 % interval of one parameter."""
        index = self.law.names.index(name)
        low, high = np.quantile(self.samples[:, index], [0.025, 0.975])
        return Interval(float(self.theta[index]), float(low), float(high), is_open=name in self.open)

    @property
    def undetermined(self) -> list[str]:
        """Parameters that these runs do not determine: open ones, and those whose interval spans a factor of 100."""
        return [name for name in self.law.names if not self.interval(name).is_determined]

    def joint_intervals(self) -> dict[str, Interval]:
        """Wider intervals that hold all parameters at once with 95 % confidence (maximum deviation over refits)."""
        logs = np.log(self.samples)
        spread = logs.std(axis=0, ddof=1)
        deviation = np.abs(logs - np.log(self.theta)) / np.maximum(spread, 1e-12)
        reach = float(np.quantile(deviation.max(axis=1), 0.95)) * spread
        return {
            name: Interval(
                float(value), float(value * math.exp(-half)), float(value * math.exp(half)), name in self.open
            )
            for name, value, half in zip(self.law.names, self.theta, reach)
        }

    def loss(self, points: Points) -> Array:
        """Fitted loss [n], nats per token."""
        return _evaluate(self.law, self.theta[None], points)[0]

    def loss_samples(self, points: Points) -> Array:
        """Loss [b, n] of every bootstrap refit."""
        return _evaluate(self.law, self.samples, points)

    def knows(self, points: Points) -> Array:
        """Whether [n] the runs determine the loss at points: all that fits them as well agrees on it, within the residuals."""
        if self.equivalents is None or not len(self.equivalents):
            return np.ones(len(points), dtype=bool)
        apart = np.abs(np.log(_evaluate(self.law, self.equivalents, points) / self.loss(points)))
        return np.all(apart <= max(self.noise, SAME), axis=0)

    def outside(self, points: Points) -> list[str]:
        """What about these points lies outside of the fitted range, in words; empty inside."""
        found = []
        for name, (low, high) in self.ranges.items():
            largest, smallest = float(getattr(points, name).max()), float(getattr(points, name).min())
            if largest > high * 1.01:
                found.append(f"{name} {largest:.3g} is {largest / high:.1f} times the largest fitted ({high:.3g})")
            elif smallest < low * 0.99:
                found.append(f"{name} {smallest:.3g} is below the smallest fitted ({low:.3g})")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON form; samples are kept so that every later quantity has an interval."""
        return {
            "format": FORMAT,
            "law": self.law.name,
            "equation": self.law.equation,
            "objective": self.objective,
            "label": self.label,
            "parameters": {name: vars(self.interval(name)) for name in self.law.names},
            "open": list(self.open),
            "samples": _rounded(self.samples),
            "equivalents": [] if self.equivalents is None else _rounded(self.equivalents),
            "noise": self.noise,
            "cross_validation": self.cross_validation,
            "extrapolation": self.extrapolation,
            "ranges": self.ranges,
            "num_points": self.num_points,
            "num_runs": self.num_runs,
            "r_squared": self.r_squared,
            "doubts": list(self.doubts),
            "source": self.source,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Fit:
        """Inverse of :meth:`to_dict`.

        Raises:
            UserError: another format or an unknown law.
        """
        if data.get("format") != FORMAT or data.get("law") not in LAWS:
            raise UserError(
                f"a fit of format {data.get('format')} and law {data.get('law')!r} was given",
                f"this version reads format {FORMAT} with law {', '.join(LAWS)}",
                "fit again with tools/fit_laws.py",
            )
        law = LAWS[data["law"]]
        samples = np.array(data["samples"])
        # Files from before open parameters were told: those that no refit moved.
        still = np.ptp(samples, axis=0) == 0
        unmoved = [] if still.all() else [name for name, stays in zip(law.names, still) if stays]
        return Fit(
            law=law,
            theta=np.array([data["parameters"][name]["value"] for name in law.names]),
            samples=samples,
            open=tuple(data.get("open", unmoved)),
            equivalents=np.array(data["equivalents"]) if data.get("equivalents") else None,
            noise=data["noise"],
            cross_validation=data["cross_validation"],
            extrapolation=data["extrapolation"],
            ranges={name: (low, high) for name, (low, high) in data["ranges"].items()},
            objective=data["objective"],
            label=data["label"],
            num_points=data["num_points"],
            num_runs=data["num_runs"],
            r_squared=data.get("r_squared"),
            doubts=tuple(data.get("doubts", ())),
            source=data.get("source", ""),
        )


def fit_law(
    law: Law,
    points: Points,
    losses: Array,
    *,
    groups: Sequence[int] | None = None,
    num_starts: int = 64,
    num_bootstrap: int = 400,
    seed: int = 0,
) -> Fit:
    """Fit ``law`` to ``losses`` [n] (nats per token) at ``points``.

    Args:
        groups: run of every point; points of one run are resampled and left out together. Default: each its own.
        num_starts: random starting points.
        num_bootstrap: refits for the intervals.
        seed: of starts, folds and bootstrap signs, a stream each.

    Raises:
        UserError: fewer points than parameters + 2, or a loss that is not positive and finite.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if len(points) < len(law.names) + 2:
        raise UserError(
            f"{len(points)} losses were given",
            f"the law {law.name} has {len(law.names)} parameters and needs at least {len(law.names) + 2} losses",
            "run more sizes, budgets or epochs, or fit a law with fewer parameters",
        )
    if not np.all(np.isfinite(losses) & (losses > 0)):
        raise UserError("a loss is not positive and finite", "a fit needs positive losses", "leave diverged runs out")
    group = np.arange(len(points)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    folds, starts, along, signs = (np.random.default_rng([seed, stream]) for stream in range(4))
    reference = Reference.of(points)
    problem = Problem(law, points, reference)
    log_loss = np.log(losses)
    phi, noise = _best_fit(problem, log_loss, num_starts=num_starts, rng=starts)
    sight = Sight.of(problem.residuals(phi[None], log_loss)[1][0])
    equal = equivalents(problem, phi, sight, noise=noise, rng=along)
    data = _Data(problem, log_loss, group, noise)
    samples = _bootstrap(data, equal, sight, size=num_bootstrap, rng=signs)
    held_out = _held_out(data, phi, sight.rank, rng=folds)
    predicted = law.loss(phi[None], points, reference)[0][0]
    return Fit(
        law=law,
        theta=law.to_theta(phi[None], reference)[0],
        samples=law.to_theta(samples, reference),
        noise=noise,
        cross_validation=held_out[0],
        extrapolation=held_out[1],
        ranges=_ranges(points),
        num_points=len(points),
        num_runs=int(group.max()) + 1,
        r_squared=r_squared(predicted, losses),
        doubts=doubts(law, points, losses, predicted, groups=group, noise=noise),
        open=_open(law, samples, open_parameters(law, phi, reference, sight)),
        equivalents=law.to_theta(equal, reference) if len(equal) > 1 else None,
    )


def save_fits(fits: Sequence[Fit], path: Path) -> None:
    """Write fits as JSON, complete or not at all."""
    make_folder(path.parent)
    replace_file(path, json.dumps({"format": FORMAT, "fits": [fit.to_dict() for fit in fits]}))


def load_fits(path: Path) -> list[Fit]:
    """Read what :func:`save_fits` wrote.

    Raises:
        UserError: not such a file.
    """
    try:
        entries = json.loads(path.read_bytes())["fits"]
        return [Fit.from_dict(entry) for entry in entries]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a file of fits ({type(error).__name__}: {error})",
            "laws come from fitted runs",
            "write such a file with tools/fit_laws.py --output",
        ) from None


def of_one_source(fits: Sequence[Fit], objectives: Sequence[str] = ("ar", "mdm")) -> dict[str, Fit]:
    """Fits of these objectives, by name, of the source that has most of them; of own runs, which come last, where several do."""
    by_source: dict[str, dict[str, Fit]] = {}
    for fit in fits:
        if fit.objective in objectives:
            by_source.setdefault(fit.source, {})[fit.objective] = fit
    return max(reversed(by_source.values()), key=len, default={})


def _evaluate(law: Law, theta: Array, points: Points) -> Array:
    reference = Reference()
    return law.loss(law.to_phi(theta, reference), points, reference)[0]


@dataclass(frozen=True)
class _Data:
    """What refits are made from: the log losses [n], the run [n] of each, and their residual standard deviation."""

    problem: Problem
    log_loss: Array
    group: Array
    noise: float


def _rounded(table: Array) -> list[list[float]]:
    return [[float(f"{value:.7g}") for value in row] for row in table]


def _open(law: Law, samples: Array, unseen: Sequence[str]) -> tuple[str, ...]:
    """What no loss moves, and what ends at a bound of the search in too many refits ``samples`` [b, p]."""
    low, high = law.limits()
    bound = np.maximum(np.mean(samples <= low + 1e-9, axis=0), np.mean(samples >= high - 1e-9, axis=0)) > AT_BOUND
    return tuple(name for name, ends in zip(law.names, bound) if ends or name in unseen)


def _best_fit(problem: Problem, log_loss: Array, *, num_starts: int, rng: np.random.Generator) -> tuple[Array, float]:
    """Best of many starts under a wide Huber penalty, then again with the width that its residuals give."""
    low, high = problem.law.start_range(float(np.exp(log_loss.min())))
    starts = rng.uniform(low, high, size=(num_starts, len(low)))
    phi, cost = minimize(problem, starts, log_loss, huber_delta=0.05, iterations=25)
    phi = phi[np.argsort(cost)[: max(4, num_starts // 8)]]
    phi, cost = minimize(problem, phi, log_loss, huber_delta=0.05, iterations=100)
    best = phi[np.argsort(cost)[:2]]
    noise = _noise(problem, best[0], log_loss)
    for _ in range(2):
        best, cost = minimize(problem, best, log_loss, huber_delta=HUBER_IN_SD * noise, iterations=200)
        best = best[np.argsort(cost)]
        noise = _noise(problem, best[0], log_loss)
    return best[0], noise


def _noise(problem: Problem, phi: Array, log_loss: Array) -> float:
    """Robust standard deviation of the residuals, corrected for the parameters that they see."""
    residual, jacobian = (value[0] for value in problem.residuals(phi[None], log_loss))
    n, rank = len(residual), Sight.of(jacobian).rank
    spread = 1.4826 * float(np.median(np.abs(residual)))
    return max(spread * math.sqrt(n / max(1, n - rank)), 1e-6)


def _bootstrap(data: _Data, equal: Array, sight: Sight, *, size: int, rng: np.random.Generator) -> Array:
    """Wild bootstrap refits [size, p], begun from one of the parameters ``equal`` [k, p], the best fit first."""
    residual = data.problem.residuals(equal[:1], data.log_loss)[0][0]
    leverage = np.clip(np.sum(sight.seen**2, axis=1), 0.0, 0.95)
    inflated = residual / (1 - leverage)
    num_runs = int(data.group.max()) + 1
    signs = rng.choice([-1.0, 1.0], size=(size, num_runs))[:, data.group]
    # Student-t instead of the normal for few points: the spread of refits is that of a known noise level.
    widen = t_quantile(0.975, max(1, num_runs - sight.rank)) / t_quantile(0.975, math.inf)
    observations = (data.log_loss + residual) + widen * signs * inflated
    starts = equal[rng.integers(len(equal), size=size)]
    width = HUBER_IN_SD * data.noise * widen
    return minimize(data.problem, starts, observations, huber_delta=width, iterations=80)[0]


def _held_out(data: _Data, phi: Array, rank: int, *, rng: np.random.Generator) -> tuple[float | None, float | None]:
    """Relative errors of five-fold cross-validation over runs, and of predicting the fifth of runs with most compute."""
    problem, group = data.problem, data.group
    num_groups = int(group.max()) + 1
    folds = rng.permutation(np.arange(num_groups) % 5)[group]
    compute = np.array([problem.points.flops[group == index].max() for index in range(num_groups)])
    largest = (compute >= np.quantile(compute, 0.8))[group]
    masks = [folds != fold for fold in range(5)] + [~largest]
    if min(mask.sum() for mask in masks) < rank + 1 or num_groups < 6:
        return None, None
    weights = np.array(masks, dtype=np.float64)
    starts = np.repeat(phi[None], len(masks), axis=0)
    width = HUBER_IN_SD * data.noise
    solutions, _ = minimize(problem, starts, data.log_loss, huber_delta=width, weights=weights, iterations=150)
    residual = problem.residuals(solutions, data.log_loss)[0]
    left_out = np.concatenate([residual[index][~masks[index]] for index in range(5)])
    rms = [float(np.sqrt(np.mean(np.square(values)))) for values in (left_out, residual[5][largest])]
    return rms[0], rms[1]


def _ranges(points: Points) -> dict[str, tuple[float, float]]:
    names = ("parameters", "tokens", "unique_tokens", "epochs", "flops")
    return {name: (float(getattr(points, name).min()), float(getattr(points, name).max())) for name in names}
