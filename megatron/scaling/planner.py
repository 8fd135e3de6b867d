"""Before training: which objective, size and epochs for given data and compute, what loss to expect, and the cost.

Works from fits of own runs (with bootstrap intervals) or from published coefficients (without). A search over sizes
and training lengths replaces calculus: it serves every law, and stopping early is one of the options. Near an optimum
losses are flat and laws are not that exact, so beside the plan of lowest predicted loss stands the cheapest one that is
within one standard error of it (the one-standard-error rule of Breiman et al., 1984).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from megatron.config.shape import PRESETS
from megatron.errors import require
from megatron.scaling.fit import Fit
from megatron.scaling.interval import Interval
from megatron.scaling.laws import Coefficients, Points
from megatron.scaling.literature import (
    CRITICAL_RANGE_TOKENS,
    PAPER_BEST,
    PAPER_BEST_UNIQUE_TOKENS,
    PAPER_VOCAB_SIZE,
    PUBLISHED,
    PUBLISHED_RANGES,
    critical_flops,
    preset_parameters,
    quokka_overfitting_epochs,
)
from megatron.scaling.predict import Model, best_epochs, central_losses, critical_compute, knows, losses

Array = np.ndarray


@dataclass(frozen=True)
class Choice:
    """A run of one objective within the budget.

    Attributes:
        parameters, tokens, epochs, flops: what to train; ``flops`` may be less than the budget where stopping earlier
            is better, or no worse. ``epochs`` below 1 read a part of the data.
        loss: predicted validation loss, nats per token, with a 95 % interval (of the fitted curve; for published
            coefficients the interval spans their error at the paper's own best run). Never above guessing.
        optimal_epochs: where the loss is lowest for this size, or None where the law cannot show overfitting or the runs do not
            determine it.
        notes: warnings and remarks, in words.
        cheapest: the run of least compute whose predicted loss is within one standard error (a quarter of the interval) of
            this one's; None where that is this one.
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
    cheapest: Choice | None = None

    @property
    def advised(self) -> Choice:
        """The cheapest run that cannot be told from the best."""
        return self.cheapest or self


@dataclass(frozen=True)
class Plan:
    """What to train. ``choices``: the lowest predicted loss of each objective. ``probability``: share of bootstrap refits in
    which MDM is better; None without fits. ``is_close``: neither can be called the better one."""

    unique_tokens: float
    flops: float
    choices: Mapping[str, Choice]
    recommended: str
    reason: str
    critical: Interval
    probability: float | None = None
    notes: tuple[str, ...] = field(default=())
    is_close: bool = False


@dataclass(frozen=True)
class Budget:
    """What there is to choose from.

    Attributes:
        unique_tokens: tokens of data.
        flops: compute, at most.
        sizes: parameters by name.
        vocab_size: guessing among that many tokens costs its logarithm, more than which no training ends at.
    """

    unique_tokens: float
    flops: float
    sizes: Mapping[str, float]
    vocab_size: int = PAPER_VOCAB_SIZE

    def __post_init__(self) -> None:
        for name, value in (("unique tokens", self.unique_tokens), ("FLOPs", self.flops), *self.sizes.items()):
            require(
                math.isfinite(value) and value > 0,
                f"{name}: {value:g} was given",
                "tokens, FLOPs and sizes are positive and finite",
                "write 100M or 1e20",
            )
        require(len(self.sizes), "no size was given", "a plan chooses among sizes", "name presets or parameter counts")
        require(
            self.vocab_size > 1,
            f"a vocabulary of {self.vocab_size}",
            "it has at least two tokens",
            "give its true size",
        )

    @property
    def guessing(self) -> float:
        """Loss of a uniform guess, nats per token."""
        return math.log(self.vocab_size)


def preset_sizes() -> dict[str, float]:
    """Parameters N of every preset, as the paper counts them."""
    return {name: float(preset_parameters(name)) for name in PRESETS}


def device_hours(flops: float, *, peak_flops: float, mfu: float, devices: int = 1) -> tuple[float, float]:
    """(device hours, wall-clock hours) of ``flops`` at a utilisation ``mfu`` of each device's peak."""
    hours = flops / (peak_flops * mfu) / 3600
    return hours, hours / devices


def choose(objective: str, model: Model, budget: Budget) -> Choice:
    """The size and length with the lowest predicted loss, and beside it the cheapest that is as good by all that is known.

    Only where the runs determine the prediction: what a law with open parameters says elsewhere is that of a random start.

    Raises:
        UserError: that is nowhere.
    """
    n = np.array(list(budget.sizes.values()))
    affordable = budget.flops / (6 * n[:, None])
    lengths = budget.unique_tokens * np.append(np.geomspace(1e-3, 1e5, 400), math.inf)
    tokens = np.minimum(lengths, affordable)
    points = Points.of(n[:, None], tokens, budget.unique_tokens)
    known = knows(model, points).reshape(tokens.shape)
    require(
        bool(known.any()),
        f"the fit of {objective} leaves {', '.join(getattr(model, 'undetermined', ()))} of {model.law.name} open, and with that "
        "the loss of every size and length to choose from",
        "a plan is made where the runs determine the law",
        "fit runs of more sizes, amounts of data and epochs, a law with fewer parameters (--law), or plan without --fits",
    )
    central = np.where(known, central_losses(model, points).reshape(tokens.shape), np.inf)
    cost = n[:, None] * tokens
    lowest = central <= central.min() * (1 + 1e-9)  # on a plateau of the floating-point numbers the cheapest
    best = _choice(objective, model, budget, *_cheapest(cost, lowest, tokens))
    error = (best.loss.high - best.loss.low) / 4
    allowed = lowest | (central <= best.loss.value + error)
    other = _choice(objective, model, budget, *_cheapest(cost, allowed, tokens))
    return replace(best, cheapest=other) if other.flops < 0.99 * best.flops else best


def make_plan(models: Mapping[str, Model], budget: Budget) -> Plan:
    """Compare AR and MDM within one compute budget on one amount of unique data.

    With fits of both, the lower predicted loss decides. Otherwise the published critical-compute line decides, because
    published AR and MDM coefficients come from different data and tokenizers and cannot be compared with each other.

    Args:
        models: "ar" and "mdm", each a fit or published coefficients.
        budget: data, compute and sizes.

    Raises:
        UserError: an objective is missing, a law says that nothing is learned within the budget, or the fits are of two sources.
    """
    missing = {"ar", "mdm"} - models.keys()
    require(not missing, f"no law for {', '.join(sorted(missing))}", "a plan compares ar and mdm", "fit runs of both")
    sources = {model.source for model in models.values() if isinstance(model, Fit)}
    whose = " and ".join(f"runs of {source}" if source else "own runs" for source in sorted(sources))
    require(
        len(sources) < 2,
        f"fits of {whose}",
        "losses of two sources are not compared",
        "fit runs of one source (--fits)",
    )
    choices = {name: choose(name, models[name], budget) for name in ("ar", "mdm")}
    require(
        any(choice.loss.value < budget.guessing for choice in choices.values()),
        f"{budget.flops:.3g} FLOPs on {budget.unique_tokens:.3g} unique tokens were given",
        f"the laws predict no loss below guessing (ln {budget.vocab_size} = {budget.guessing:.2f}) there, far outside of the "
        "runs that they come from",
        "give more compute, smaller sizes, or fits of runs of this scale (--fits)",
    )
    ar, mdm = models["ar"], models["mdm"]
    if isinstance(ar, Fit) and isinstance(mdm, Fit):
        return _plan_from_fits(ar, mdm, choices, budget)
    return _plan_from_line(choices, budget)


def _plan_from_fits(ar: Fit, mdm: Fit, choices: Mapping[str, Choice], budget: Budget) -> Plan:
    unique, ceiling = budget.unique_tokens, budget.guessing
    points = [Points.of(c.parameters, c.tokens, unique) for c in (choices["ar"], choices["mdm"])]
    samples = [losses(model, point, ceiling=ceiling)[1][:, 0] for model, point in zip((ar, mdm), points)]
    # The refits of the two fits are independent: compare each with each.
    probability = float(np.mean(samples[1][None, :] < samples[0][:, None]))
    better = "mdm" if choices["mdm"].loss.value < choices["ar"].loss.value else "ar"
    sure = probability if better == "mdm" else 1 - probability
    reason = f"lower predicted loss, in {sure:.0%} of the bootstrap refits"
    notes = ["AR is an exact NLL and MDM an upper bound: a predicted tie favours MDM."]
    notes += [
        f"{model.objective.upper()} is planned only where its runs determine its law: it may do better elsewhere."
        for model in (ar, mdm)
        if model.equivalents is not None
    ]
    critical = critical_compute(ar, mdm, unique)
    return Plan(unique, budget.flops, choices, better, reason, critical, probability, tuple(notes), sure < 0.9)


def _plan_from_line(choices: Mapping[str, Choice], budget: Budget) -> Plan:
    unique, flops = budget.unique_tokens, budget.flops
    threshold = critical_flops(unique)
    better = "mdm" if flops > threshold else "ar"
    ratio = max(flops / threshold, threshold / flops)
    reason = (
        f"the budget is {ratio:.3g} times {'above' if better == 'mdm' else 'below'} the published critical compute of "
        f"{threshold:.3g} FLOPs for this much data (arXiv 2507.15857)"
    )
    notes = [
        "No fit of both objectives was given: published coefficients are used, and the published line decides.",
        "The two predicted losses come from different data and tokenizers: do not compare them with each other.",
    ]
    low, high = CRITICAL_RANGE_TOKENS
    if not low / 2 <= unique <= high * 2:
        notes.append(
            f"{unique:.3g} unique tokens is outside of the data of that line ({low:.3g} to {high:.3g}): extrapolated."
        )
    # The line is published without an interval.
    return Plan(
        unique, flops, choices, better, reason, Interval(threshold, math.nan, math.nan), None, tuple(notes), ratio < 3
    )


def _cheapest(cost: Array, allowed: Array, tokens: Array) -> tuple[int, float]:
    """(index of the size, tokens) of the cheapest point that is allowed; all arrays [sizes, lengths]."""
    row, column = np.unravel_index(int(np.argmin(np.where(allowed, cost, np.inf))), cost.shape)
    return int(row), float(tokens[row, column])


def _choice(objective: str, model: Model, budget: Budget, row: int, tokens: float) -> Choice:
    """One size and length with everything that is to be said about it."""
    names = list(budget.sizes)
    n = float(budget.sizes[names[row]])
    point = Points.of(n, tokens, budget.unique_tokens)
    value, samples = losses(model, point, ceiling=budget.guessing)
    optimum = best_epochs(model, n, budget.unique_tokens)
    return Choice(
        objective=objective,
        size=names[row],
        parameters=n,
        tokens=tokens,
        epochs=tokens / budget.unique_tokens,
        flops=6 * n * tokens,
        loss=_published_interval(objective, float(value[0]), budget.guessing)
        if isinstance(model, Coefficients)
        else Interval.of(float(value[0]), samples[:, 0]),
        label=model.label if isinstance(model, Fit) else ("NLL (exact)" if objective == "ar" else "NLL bound"),
        source=model.source
        if isinstance(model, Coefficients)
        else f"fit of {model.num_runs} runs{' imported from ' * bool(model.source)}{model.source}, {model.law.equation}",
        optimal_epochs=optimum.value if optimum and optimum.is_determined else None,
        notes=tuple(_notes(objective, model, point, budget, names[row])),
    )


def _published_interval(objective: str, loss: float, ceiling: float) -> Interval:
    """± the error that the published coefficients make at the paper's own best run on 100M tokens."""
    size, epochs, measured = PAPER_BEST[objective]
    unique = PAPER_BEST_UNIQUE_TOKENS
    predicted = float(PUBLISHED[objective].loss(preset_parameters(size), epochs * unique, unique)[0])
    error = abs(predicted - measured)
    return Interval(loss, loss - error, min(loss + error, ceiling))


def _notes(objective: str, model: Model, point: Points, budget: Budget, size: str) -> list[str]:
    notes = []
    if float(losses(model, point)[0][0]) > budget.guessing:
        notes.append(
            f"the law gives more than guessing (ln {budget.vocab_size} = {budget.guessing:.2f}), which is shown instead: it "
            "does not reach here"
        )
    if isinstance(model, Fit):
        notes += [f"outside of the fitted range: {text}" for text in model.outside(point)]
        notes += [f"the law does not describe its runs well: {text}" for text in model.doubts]
        if model.undetermined:
            only = "; planned only where that changes no prediction" * (model.equivalents is not None)
            notes.append(
                f"these runs leave {', '.join(model.undetermined)} of the law open: trust no extrapolation{only}"
            )
        if model.extrapolation is not None:
            notes.append(f"relative error when predicting the largest left-out runs: {model.extrapolation:.1%}")
    else:
        notes += _published_notes(objective, point)
    ends = [min(budget.sizes, key=budget.sizes.__getitem__), max(budget.sizes, key=budget.sizes.__getitem__)]
    if size in ends and len(budget.sizes) > 1:
        notes.append(f"{size} is the {'smallest' if size == ends[0] else 'largest'} size to choose from")
    return notes


def _published_notes(objective: str, point: Points) -> list[str]:
    """Where published coefficients are used beyond their runs, and that they cannot show overfitting."""
    parameters, epochs = float(point.parameters[0]), float(point.epochs[0])
    notes = []
    for name, (low, high) in PUBLISHED_RANGES[objective].items():
        value = float(getattr(point, name)[0])
        if not low / 1.5 <= value <= high * 1.5:
            notes.append(f"{value:.3g} {name}: outside of the published runs ({low:.3g} to {high:.3g}), extrapolated")
    if objective == "mdm":
        limit = quokka_overfitting_epochs(parameters, float(point.unique_tokens[0]))
        if epochs > limit:
            notes.append(
                f"Quokka expects overfitting after about {limit:.0f} epochs here, which these coefficients cannot show: "
                "validate often and keep the best checkpoint"
            )
    elif epochs > 16:
        notes.append(
            f"{epochs:.0f} epochs: AR may overfit before (the paper's best is at 50 epochs on 100M "
            "tokens), which these coefficients cannot show: validate often and keep the best checkpoint"
        )
    return notes
