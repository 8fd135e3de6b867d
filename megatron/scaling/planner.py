"""Before training: which objective, size and epochs for given data and compute, what loss to expect, and the cost.

Works from fits of own runs (with bootstrap intervals) or from published coefficients (without). A search over sizes
and training lengths replaces calculus: it serves every law, and stopping early is one of the options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron.config.presets import PRESETS
from megatron.errors import UserError
from megatron.model.arithmetic import preset_parameters
from megatron.scaling.fit import Fit, Interval
from megatron.scaling.laws import Coefficients, Points, UShaped
from megatron.scaling.literature import (
    CRITICAL_RANGE_TOKENS,
    PAPER_BEST,
    PAPER_BEST_UNIQUE_TOKENS,
    PUBLISHED,
    critical_flops,
    quokka_overfitting_epochs,
)

Array = np.ndarray
Model = Fit | Coefficients

DEVICES = {"H100": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 peak of one device in FLOP/s, as in the vendors' data sheets."""

_SAMPLES = 200
"""Bootstrap refits used for intervals of derived quantities."""


@dataclass(frozen=True)
class Choice:
    """The best run of one objective within the budget.

    Attributes:
        parameters, tokens, epochs, flops: what to train; ``flops`` may be less than the budget where stopping earlier
            is better.
        loss: predicted validation loss, nats per token, with a 95 % interval (of the fitted curve; for published
            coefficients the interval spans their error at the paper's own best run).
        optimal_epochs: where the loss is lowest for this size, or None where the law cannot show overfitting.
        notes: warnings and remarks, in words.
    """

    objective: str
    size: str
    parameters: float
    tokens: float
    epochs: float
    flops: float
    loss: Interval
    label: str
    source: str
    optimal_epochs: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to train. ``probability``: share of bootstrap refits in which MDM is better; None without fits."""

    unique_tokens: float
    flops: float
    choices: Mapping[str, Choice]
    recommended: str
    reason: str
    critical: Interval
    probability: float | None = None
    notes: tuple[str, ...] = field(default=())


def preset_sizes() -> dict[str, float]:
    """Parameters N of every preset, as the paper counts them."""
    return {name: float(preset_parameters(name)) for name in PRESETS}


def device_hours(flops: float, *, peak_flops: float, mfu: float, devices: int = 1) -> tuple[float, float]:
    """(device hours, wall-clock hours) of ``flops`` at a utilisation ``mfu`` of each device's peak."""
    hours = flops / (peak_flops * mfu) / 3600
    return hours, hours / devices


def losses(model: Model, points: Points) -> tuple[Array, Array]:
    """Predicted loss [n] and that of up to 200 bootstrap refits [b, n]; published coefficients count as one refit."""
    if isinstance(model, Coefficients):
        central = model.loss(points.parameters, points.tokens, points.unique_tokens)
        return central, central[None]
    thinned = Fit(**{**vars(model), "samples": model.samples[:_SAMPLES]})
    return model.loss(points), thinned.loss_samples(points)


def compute_optimal(model: Model, flops: float, unique_tokens: float = math.inf) -> tuple[Interval, Interval]:
    """Compute-optimal parameters N and tokens D = C/(6N), each with its interval, for ``unique_tokens`` of data."""
    sizes = np.geomspace(1e4, 1e13, 1801)
    points = Points.of(sizes, flops / (6 * sizes), unique_tokens)
    central, samples = losses(model, points)
    best = sizes[np.argmin(central)]
    low, high = _quantiles(sizes[np.argmin(samples, axis=1)])
    tokens = [flops / (6 * value) for value in (best, high, low)]
    return Interval(float(best), float(low), float(high)), Interval(*map(float, tokens))


def best_epochs(model: Model, parameters: float, unique_tokens: float) -> Interval | None:
    """Epochs at which the loss is lowest, with its interval; None for a law that cannot show overfitting.

    Infinite where the loss still falls after 100,000 epochs.
    """
    if not isinstance(model.law, UShaped):
        return None
    epochs = np.geomspace(1, 1e5, 1501)
    central, samples = losses(model, Points.of(parameters, epochs * unique_tokens, unique_tokens))
    steps = np.append(epochs[:-1], math.inf)
    low, high = _quantiles(steps[np.argmin(samples, axis=1)])
    return Interval(float(steps[np.argmin(central)]), low, high)


def critical_compute(ar: Model, mdm: Model, unique_tokens: float) -> Interval:
    """FLOPs from which the best MDM is at or below the best AR on this much data, with its interval.

    At each budget both choose size and length freely, up to the budget. Infinite where AR stays ahead up to 1e28 FLOPs.
    """
    budgets = np.geomspace(1e10, 1e28, 217)
    paths = [_best_by_budget(model, budgets, unique_tokens) for model in (ar, mdm)]
    central = _first_crossing(budgets, paths[0][0], paths[1][0])
    count = min(len(paths[0][1]), len(paths[1][1]))
    crossings = [_first_crossing(budgets, paths[0][1][i], paths[1][1][i]) for i in range(count)]
    low, high = _quantiles(np.array(crossings))
    return Interval(central, low, high)


def choose(objective: str, model: Model, *, unique_tokens: float, flops: float, sizes: Mapping[str, float]) -> Choice:
    """The size of ``sizes`` and the length with the lowest predicted loss within ``flops``."""
    names, n = list(sizes), np.array(list(sizes.values()))
    affordable = flops / (6 * n[:, None])
    lengths = unique_tokens * np.append(np.geomspace(1e-3, 1e5, 400), math.inf)
    tokens = np.minimum(lengths, affordable)
    central = losses(_without_samples(model), Points.of(n[:, None], tokens, unique_tokens))[0].reshape(tokens.shape)
    row, column = np.unravel_index(int(np.argmin(central)), central.shape)
    point = Points.of(n[row], tokens[row, column], unique_tokens)
    value, samples = losses(model, point)
    low, high = _quantiles(samples[:, 0])
    optimum = best_epochs(model, float(n[row]), unique_tokens)
    return Choice(
        objective=objective,
        size=names[row],
        parameters=float(n[row]),
        tokens=float(point.tokens[0]),
        epochs=float(point.epochs[0]),
        flops=float(point.flops[0]),
        loss=_published_interval(objective, float(value[0]))
        if isinstance(model, Coefficients)
        else Interval(float(value[0]), low, high),
        label=model.label if isinstance(model, Fit) else ("NLL (exact)" if objective == "ar" else "NLL bound"),
        source=model.source
        if isinstance(model, Coefficients)
        else f"fit of {model.num_runs} runs, {model.law.equation}",
        optimal_epochs=optimum.value if optimum else None,
        notes=tuple(_notes(objective, model, point, [names[0], names[-1]], names[row])),
    )


def make_plan(
    models: Mapping[str, Model], *, unique_tokens: float, flops: float, sizes: Mapping[str, float] | None = None
) -> Plan:
    """Compare AR and MDM within one compute budget on one amount of unique data.

    With fits of both, the lower predicted loss decides. Otherwise the published critical-compute line decides, because
    published AR and MDM coefficients come from different data and tokenizers and cannot be compared with each other.

    Args:
        models: "ar" and "mdm", each a fit or published coefficients.
        sizes: names and parameters to choose from; default: the presets.

    Raises:
        ValueError: an objective is missing, or data or compute is not positive.
    """
    if not (unique_tokens > 0 and flops > 0):
        raise ValueError(f"unique tokens {unique_tokens:g} and FLOPs {flops:g} were given; both must be positive")
    if missing := {"ar", "mdm"} - models.keys():
        raise UserError(f"no law for {', '.join(sorted(missing))}", "a plan compares ar and mdm", "fit runs of both")
    sizes = sizes or preset_sizes()
    choices = {
        name: choose(name, models[name], unique_tokens=unique_tokens, flops=flops, sizes=sizes)
        for name in ("ar", "mdm")
    }
    ar, mdm = models["ar"], models["mdm"]
    if isinstance(ar, Fit) and isinstance(mdm, Fit):
        return _plan_from_fits(ar, mdm, choices, unique_tokens=unique_tokens, flops=flops)
    return _plan_from_line(choices, unique_tokens=unique_tokens, flops=flops)


def _plan_from_fits(ar: Fit, mdm: Fit, choices: Mapping[str, Choice], *, unique_tokens: float, flops: float) -> Plan:
    points = [Points.of(c.parameters, c.tokens, unique_tokens) for c in (choices["ar"], choices["mdm"])]
    samples = [losses(model, point)[1][:, 0] for model, point in zip((ar, mdm), points)]
    count = min(map(len, samples))
    probability = float(np.mean(samples[1][:count] < samples[0][:count]))
    better = "mdm" if choices["mdm"].loss.value < choices["ar"].loss.value else "ar"
    sure = probability if better == "mdm" else 1 - probability
    reason = f"lower predicted loss, in {sure:.0%} of the bootstrap refits" + (
        "; too close to call" if sure < 0.9 else ""
    )
    notes = ["AR is an exact NLL and MDM an upper bound: a predicted tie favours MDM."]
    return Plan(
        unique_tokens,
        flops,
        choices,
        better,
        reason,
        critical_compute(ar, mdm, unique_tokens),
        probability,
        tuple(notes),
    )


def _plan_from_line(choices: Mapping[str, Choice], *, unique_tokens: float, flops: float) -> Plan:
    threshold = critical_flops(unique_tokens)
    better = "mdm" if flops > threshold else "ar"
    ratio = max(flops / threshold, threshold / flops)
    reason = (
        f"the budget is {ratio:.3g} times {'above' if better == 'mdm' else 'below'} the published critical compute of "
        f"{threshold:.3g} FLOPs for this much data (arXiv 2507.15857)" + ("; too close to call" if ratio < 3 else "")
    )
    notes = [
        "No fit of both objectives was given: published coefficients are used, and the published line decides.",
        "The two predicted losses come from different data and tokenizers: do not compare them with each other.",
    ]
    low, high = CRITICAL_RANGE_TOKENS
    if not low / 2 <= unique_tokens <= high * 2:
        notes.append(
            f"{unique_tokens:.3g} unique tokens is outside of the data of that line ({low:.3g} to {high:.3g}): extrapolated."
        )
    # The line is published without an interval.
    return Plan(
        unique_tokens, flops, choices, better, reason, Interval(threshold, math.nan, math.nan), None, tuple(notes)
    )


def _published_interval(objective: str, loss: float) -> Interval:
    """± the error that the published coefficients make at the paper's own best run on 100M tokens."""
    size, epochs, measured = PAPER_BEST[objective]
    unique = PAPER_BEST_UNIQUE_TOKENS
    predicted = float(PUBLISHED[objective].loss(preset_parameters(size), epochs * unique, unique)[0])
    error = abs(predicted - measured)
    return Interval(loss, loss - error, loss + error)


def _notes(objective: str, model: Model, point: Points, ends: Sequence[str], size: str) -> list[str]:
    notes = []
    if isinstance(model, Fit):
        notes += [f"outside of the fitted range: {text}" for text in model.outside(point)]
        if model.extrapolation is not None:
            notes.append(f"relative error when predicting the largest left-out runs: {model.extrapolation:.1%}")
    elif objective == "mdm":
        limit = quokka_overfitting_epochs(float(point.parameters[0]), float(point.unique_tokens[0]))
        if float(point.epochs[0]) > limit:
            notes.append(
                f"Quokka expects overfitting after about {limit:.0f} epochs here, which these coefficients cannot show: "
                "validate often and keep the best checkpoint"
            )
    elif float(point.epochs[0]) > 16:
        notes.append(
            f"{float(point.epochs[0]):.0f} epochs: AR overfits long before (the paper's best is at 50 epochs on 100M "
            "tokens), which these coefficients cannot show: validate often and keep the best checkpoint"
        )
    if size in ends:
        notes.append(f"{size} is the {'smallest' if size == ends[0] else 'largest'} size to choose from")
    return notes


def _quantiles(values: Array) -> tuple[float, float]:
    """95 % interval of bootstrap values; NaN for a single value, which published coefficients are."""
    if len(values) < 2:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def _best_by_budget(model: Model, budgets: Array, unique_tokens: float) -> tuple[Array, Array]:
    """Lowest loss within each budget: [c] and, per bootstrap refit, [b, c]. Spending less is allowed."""
    sizes = np.geomspace(1e5, 1e12, 57)
    points = Points.of(sizes[None, :], budgets[:, None] / (6 * sizes[None, :]), unique_tokens)
    shape = (len(budgets), len(sizes))
    inside = points.tokens.reshape(shape) >= 1e3  # fewer tokens than one sample is no training
    central, samples = losses(model, points)
    best = np.where(inside, central.reshape(shape), np.inf).min(axis=1)
    spread = np.where(inside, samples.reshape(-1, *shape), np.inf).min(axis=2)
    return np.minimum.accumulate(best), np.minimum.accumulate(spread, axis=1)


def _first_crossing(budgets: Array, ar: Array, mdm: Array) -> float:
    """Start of the last stretch in which MDM is at or below AR; infinite where AR is ahead at the end."""
    ahead = (ar < mdm) | ~np.isfinite(mdm)
    if ahead[-1]:
        return math.inf
    last = int(np.max(np.nonzero(ahead)[0], initial=-1))
    return float(budgets[last + 1])


def _without_samples(model: Model) -> Model:
    return model if isinstance(model, Coefficients) else Fit(**{**vars(model), "samples": model.samples[:1]})
