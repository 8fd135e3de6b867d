"""Adaptive stopping: spend draws only where the ranking of a question's answers is still undecided.

A race: all answers of a question get a few draws with common random numbers; an answer drops out once the paired
difference to the leader is more than ``z`` standard errors, for each normalisation that the metric looks at; the rest
get twice the draws, until one is left or the budget is spent (sequential paired elimination as in Maron & Moore 1997,
"The Racing Algorithm", with normal instead of Hoeffding intervals). The budget is per answer, so that the outcome of a
question depends on no other question.

What a race finds is the winner. The likelihoods it leaves behind are biased, because an answer leaves when its draws happen
to be low: those of dropped answers are too low, those of winners too high (0.1 to 0.5 nats; docs/evaluation.md). So they are
labelled ``ranking`` instead of ``bound``, and metrics that need likelihoods are computed without a race.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.errors import require
from megatron.evaluation.estimators import Estimator
from megatron.evaluation.scorer import Estimate, MaskedScorer, Request, Tally


@dataclass(frozen=True)
class Ranking:
    """How the metrics of a task choose an answer: by its log-likelihood and, with ``per_character``, also by that over its
    length; an answer is its continuation without ``delimiter``."""

    per_character: bool = True
    delimiter: str = " "

    def lengths(self, continuations: Sequence[str]) -> tuple[float, ...] | None:
        """Characters of each answer; None where only the sum ranks."""
        if not self.per_character:
            return None
        return tuple(float(len(text.removeprefix(self.delimiter))) for text in continuations)


@dataclass(frozen=True)
class Question:
    """Answer choices to rank.

    Attributes:
        choices: one request each; they share their key, and so their masks.
        lengths: what the length-normalised ranking divides by (lm-eval: characters of the answer); None: only the sum
            of log-likelihoods ranks.
    """

    choices: tuple[Request, ...]
    lengths: tuple[float, ...] | None = None

    def scales(self) -> list[np.ndarray]:
        """Factors on the log-likelihoods, one array ``[choices]`` for each ranking that must be decided."""
        scales = [np.ones(len(self.choices))]
        if self.lengths is not None:
            scales.append(1.0 / np.maximum(np.array(self.lengths, dtype=np.float64), 1.0))
        return scales


@dataclass(frozen=True)
class RaceSettings:
    """When to stop.

    Attributes:
        first_draws: draws of every answer before the first decision.
        max_draws: draws of an answer at most (the budget).
        z: standard errors between the leader and an answer that is dropped.
    """

    first_draws: int = 4
    max_draws: int = 128
    z: float = 2.0

    def __post_init__(self) -> None:
        require(
            2 <= self.first_draws <= self.max_draws,
            f"first_draws {self.first_draws} and max_draws {self.max_draws}",
            "an error bar needs 2 draws and the budget must hold the first round",
            "raise --num-mc or lower the first round",
        )


def race(
    scorer: MaskedScorer, questions: Sequence[Question], estimator: Estimator, *, settings: RaceSettings
) -> list[list[Tally]]:
    """Score the answers of every question adaptively; returns their tallies (see :func:`raced`)."""
    result: list[list[Tally]] = []
    for start in range(0, len(questions), scorer.chunk_size):
        chunk = questions[start : start + scorer.chunk_size]
        tallies = [
            [scorer.tally(choice, estimator, num_draws=settings.first_draws) for choice in question.choices]
            for question in chunk
        ]
        num_draws, open_tallies = settings.first_draws, [tally for group in tallies for tally in group]
        while open_tallies:
            scorer.extend(open_tallies, num_draws=num_draws)
            if num_draws >= settings.max_draws:
                break
            num_draws = min(2 * num_draws, settings.max_draws)
            open_tallies = [
                group[index]
                for question, group in zip(chunk, tallies)
                for index in sorted(undecided(question, group, z=settings.z))
            ]
        result.extend(tallies)
    return result


def raced(tally: Tally) -> Estimate:
    """The estimate of an answer after a race: good for ranking it, and labelled so; without sampling it stays what it is."""
    estimate = tally.estimate()
    if tally.is_complete():
        return estimate
    return dataclasses.replace(estimate, kind="ranking", standard_error=math.nan)


def undecided(question: Question, tallies: Sequence[Tally], *, z: float) -> set[int]:
    """Answers that need more draws: for some ranking, the leader and all those not yet clearly behind it."""
    waiting: set[int] = set()
    for scale in question.scales():
        means = np.array([tally.values.mean() for tally in tallies]) * scale
        leader = int(means.argmax())
        rivals = set()
        for index in range(len(tallies)):
            lead, error = _lead(tallies[leader], tallies[index], scales=(scale[leader], scale[index]))
            if index != leader and lead <= z * error:
                rivals.add(index)
        waiting |= rivals | ({leader} if rivals else set())
    return {index for index in waiting if not tallies[index].is_complete()}


def _lead(leader: Tally, rival: Tally, *, scales: tuple[float, float]) -> tuple[float, float]:
    """How far the leader is ahead and the standard error of that.

    Paired over the draws that both have (a rival that left earlier is judged on its draws, so it stays out unless the
    leader changes); an answer without sampling error has no draws to pair.
    """
    if leader.is_complete() or rival.is_complete():
        lead = leader.values.mean() * scales[0] - rival.values.mean() * scales[1]
        return float(lead), math.hypot(leader.standard_error() * scales[0], rival.standard_error() * scales[1])
    shared = min(len(leader.values), len(rival.values))
    differences = leader.values[:shared] * scales[0] - rival.values[:shared] * scales[1]
    strata = leader.strata[:shared]
    stratified = getattr(leader.estimator, "stratified", False)
    error = neighbour_error(differences, strata) if stratified else leader.estimator.standard_error(differences, strata)
    return float(differences.mean()), error


def neighbour_error(values: np.ndarray, strata: np.ndarray) -> float:
    """The error that the threshold ``z`` is compared with: from differences of neighbours in order of the stratum, all with
    equal weight. A part of the stopping rule, whose agreement was measured as a whole; estimates report another one."""
    if len(values) < 2:
        return math.nan
    ordered = values[np.argsort(strata, kind="stable")]
    return math.sqrt(float(np.square(np.diff(ordered)).mean()) / 2 / len(values))
