"""Data efficiency: with how many times its unique data would the baseline recipe have reached a run's loss?

The baseline is a table of losses at several amounts of unique data, each the best that the recipe reaches there. Its loss is
taken to fall with data; between its rows the logarithm of the data is a monotone cubic of the loss (Fritsch and Carlson,
1980). Beyond its rows nothing is said, nor of runs of another source or on other validation data. Multipliers of this kind:
arXiv 2509.14786, section 5.

The lower a run's loss, the larger its multiplier; the lower the baseline's losses, the smaller. So it is one from below where
the run's loss is a bound from above, one from above where the baseline's are, and not determined where both are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron.errors import UserError, require
from megatron.runs.comparison import best_of
from megatron.runs.counts import format_count
from megatron.runs.matching import incomparable
from megatron.runs.run import Run
from megatron.scaling.interval import Interval

Array = np.ndarray
DRAWS = 400
"""Of the noise of run and baseline, for the interval."""
NOWHERE = Interval(math.nan, math.nan, math.nan)
MOST_RISE_IN_SE = 3.0
"""A baseline whose loss rises from one row to the next by more than this many standard errors is no baseline."""


@dataclass(frozen=True)
class Baseline:
    """A recipe's best loss [rows] at growing amounts of unique tokens.

    Attributes:
        errors: standard errors, 0 where not known.
        is_bound: whether the losses are bounds from above.
        run: one of the runs that the table is of, for where they come from and what they were judged on.
    """

    name: str
    unique_tokens: Array
    losses: Array
    errors: Array
    is_bound: bool = False
    run: Run | None = None

    @staticmethod
    def of(
        name: str, unique_tokens: Sequence[float], losses: Sequence[float], errors: Sequence[float] = ()
    ) -> Baseline:
        """A table, sorted by its data.

        Raises:
            UserError: fewer than two amounts of data, one of them twice, or a loss that rises with data beyond its noise.
        """
        unique, loss = (np.asarray(values, dtype=np.float64) for values in (unique_tokens, losses))
        error = np.nan_to_num(np.asarray(errors if len(errors) else np.zeros_like(loss), dtype=np.float64))
        order = np.argsort(unique)
        unique, loss, error = unique[order], loss[order], error[order]
        require(
            len(unique) > 1 and bool(np.all(np.diff(unique) > 0)),
            f"{name} has {len(set(unique))} amounts of unique tokens in {len(unique)} rows",
            "a baseline has one loss at each of two or more amounts of unique data",
            "run the baseline on more data, or keep its best run of each amount",
        )
        rise = np.diff(loss) - MOST_RISE_IN_SE * np.hypot(error[1:], error[:-1])
        worst = int(np.argmax(rise))
        require(
            rise[worst] <= 0,
            f"{name} goes from {loss[worst]:.3f} to {loss[worst + 1]:.3f} between {format_count(unique[worst])} and "
            f"{format_count(unique[worst + 1])} unique tokens",
            "more data must not make a baseline worse",
            "tune it at each amount of data, and keep the best run",
        )
        return Baseline(name, unique, loss, error)

    @staticmethod
    def of_runs(runs: Sequence[Run], name: str = "the baseline") -> Baseline:
        """The best validation of these runs at each amount of unique tokens. They are of one objective and source, judged on
        one set.

        Raises:
            UserError: two kinds of runs, two validation sets, losses that are no likelihoods, or no table (:meth:`of`).
        """
        kinds = {(run.objective, run.label, run.source) for run in runs}
        require(
            len(kinds) == 1,
            f"runs of {', '.join(sorted(' '.join(filter(None, kind)) for kind in kinds)) or 'no kind'}",
            "a baseline is one recipe: one objective, one kind of loss, one source",
            "name the folders of its runs alone",
        )
        rule, fix = "a multiplier compares likelihoods on one validation set", "name runs that share one"
        first = runs[0]
        require(first.is_likelihood, f"{name} has losses that are {first.label}", rule, "name runs with a likelihood")
        apart = next((f"{run.name}: {why}" for run in runs if (why := incomparable(first, run))), "")
        require(not apart, f"{name} has runs that are not compared; {apart}", rule, fix)
        rivals: dict[int, list[Run]] = {}
        for run in runs:
            if run.result is not None and run.unique_tokens:
                rivals.setdefault(run.unique_tokens, []).append(run)
        best = [result for group in rivals.values() if (result := best_of(group).result)]
        table = Baseline.of(name, list(rivals), [own.nll for own in best], [own.nll_se for own in best])
        return replace(table, is_bound=not first.is_exact, run=first)

    def equivalent_tokens(self, losses: Array, *, table: Array | None = None) -> Array:
        """Unique tokens [n] with which the baseline reaches ``losses`` [n]: 0 below the table's data, infinite beyond it.

        Args:
            losses: nats per token.
            table: losses of the baseline's rows, instead of its own.
        """
        from scipy.interpolate import PchipInterpolator

        falling, logs = _falling(self.losses if table is None else table, np.log(self.unique_tokens))
        inside = (losses <= falling[0]) & (losses >= falling[-1])
        found = np.where(losses > falling[0], 0.0, np.inf)
        if len(falling) > 1:
            curve = PchipInterpolator(falling[::-1], logs[::-1])
            found[inside] = np.exp(curve(losses[inside]))
        else:
            found[inside] = np.exp(logs[0])
        return found


@dataclass(frozen=True)
class Multiplier:
    """``times``: equivalent over own unique data, with its 95 % interval (0 or infinite where it leaves the table);
    ``refusal``: why there is none, in words, else ""; ``at_least``, ``at_most``: the loss of the run, or of the baseline, is a
    bound from above."""

    times: Interval
    equivalent_tokens: float
    refusal: str = ""
    at_least: bool = False
    at_most: bool = False

    @property
    def side(self) -> str:
        """What stands before the number."""
        return "≥ " * self.at_least + "≤ " * self.at_most

    def text(self) -> str:
        """Such as "≥ 2.3 [1.9, 2.9]"."""
        if self.refusal:
            return self.refusal
        if self.at_least and self.at_most:
            return f"not determined: the losses of both are bounds from above, by which it would be {self.times}"
        return f"{self.side}{self.times}"


def multiplier(
    loss: float, error: float, unique_tokens: float, baseline: Baseline, *, at_least: bool = False, seed: int = 0
) -> Multiplier:
    """The data-efficiency multiplier of one run.

    Args:
        loss: the run's, nats per token; ``error`` its standard error.
        unique_tokens: the run's.
        baseline: what it is measured by.
        at_least: whether the loss is a bound from above, so that the multiplier is one from below.
        seed: of the noise.

    Returns:
        the multiplier; its interval has the noise of the run and of the baseline's rows, taken as independent (none where
        neither is known). Where the loss lies outside of the baseline's rows, a refusal in words.

    Raises:
        UserError: the loss is no number, or the run has no data.
    """
    if not (math.isfinite(loss) and unique_tokens > 0):
        raise UserError(
            f"a loss of {loss} on {unique_tokens:g} tokens", "a multiplier needs both", "name a finished run"
        )
    value = float(baseline.equivalent_tokens(np.array([loss]))[0])
    if not 0 < value < math.inf:
        end = 0 if value == 0 else -1
        side = (
            "worse than the baseline with the least data" if end == 0 else "better than the baseline with the most data"
        )
        refusal = f"none: {loss:.3f} is {side}, {baseline.losses[end]:.3f} at {format_count(baseline.unique_tokens[end])} tokens"
        return Multiplier(NOWHERE, value, refusal)
    at_most = baseline.is_bound
    if not (np.nan_to_num(error) > 0 or baseline.errors.any()):
        return Multiplier(
            Interval(value / unique_tokens, math.nan, math.nan), value, at_least=at_least, at_most=at_most
        )
    rng = np.random.default_rng(seed)
    runs = loss + np.nan_to_num(error) * rng.standard_normal(DRAWS)
    tables = baseline.losses + baseline.errors * rng.standard_normal((DRAWS, len(baseline.losses)))
    draws = [baseline.equivalent_tokens(run[None], table=table)[0] for run, table in zip(runs, tables)]
    ends = np.quantile(draws, [0.025, 0.975], method="nearest") / unique_tokens
    times = value / unique_tokens
    low, high = min(float(ends[0]), times), max(float(ends[1]), times)
    return Multiplier(Interval(times, low, high), value, at_least=at_least, at_most=at_most)


def of_run(run: Run, baseline: Baseline) -> Multiplier | None:
    """That of a run's result; None for one without a likelihood or training data."""
    if run.result is None or not run.is_likelihood or not run.unique_tokens:
        return None
    if baseline.run is not None and (why := incomparable(baseline.run, run)):
        return Multiplier(NOWHERE, math.nan, f"none: {why}")
    return multiplier(run.result.nll, run.result.nll_se, run.unique_tokens, baseline, at_least=not run.is_exact)


def _falling(losses: Array, logs: Array) -> tuple[Array, Array]:
    """Rows whose loss falls strictly: neighbours that do not are averaged (pooling of adjacent violators)."""
    blocks: list[list[float]] = []  # mean loss, mean log data, rows
    for loss, log in zip(losses, logs):
        blocks.append([float(loss), float(log), 1.0])
        while len(blocks) > 1 and blocks[-1][0] >= blocks[-2][0]:
            (one, at, count), (other, there, more) = blocks.pop(-2), blocks.pop()
            total = count + more
            blocks.append([(one * count + other * more) / total, (at * count + there * more) / total, total])
    return np.array([block[0] for block in blocks]), np.array([block[1] for block in blocks])
