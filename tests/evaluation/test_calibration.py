"""Reported errors against the scatter of estimates, and what a race does to likelihoods, on a model that is a formula.

The model has 12 positions and a log-likelihood for every position under every mask, so that the bound is known exactly
(4,095 masks) and thousands of replications take seconds. Its figures stand in docs/evaluation.md.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from megatron.evaluation.adaptive import Question, RaceSettings, race, raced
from megatron.evaluation.estimators import MaskedBound, make_estimator
from megatron.evaluation.scorer import MaskedScorer, Request, Tally

LENGTH, SEEDS = 12, 1000
ALL_MASKS = np.array(list(itertools.product([False, True], repeat=LENGTH))[1:])


class Formula:
    """log p of every position [masks, LENGTH]: worse the more is masked, by amounts that depend on what is shown."""

    def __init__(self, seed: int, level: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.alone, self.crowd = 0.6 * rng.gamma(2, 1.0, LENGTH), rng.gamma(2, 1.0, LENGTH)
        self.mixing, self.level = rng.normal(size=(LENGTH, LENGTH)) * 0.35, level

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        context = np.tanh((~masks).astype(float) @ self.mixing)
        return -self.level * (self.alone + self.crowd * masks.mean(-1, keepdims=True)) * np.exp(0.5 * context)

    def bound(self) -> float:
        """Every mask M with its probability times L/|M|."""
        weights = [1 / (size * math.comb(LENGTH, size)) for size in ALL_MASKS.sum(-1).tolist()]
        return float((self(ALL_MASKS) * ALL_MASKS).sum(-1) @ weights)


def replicate(mask: str, num_draws: int, model: Formula) -> tuple[np.ndarray, np.ndarray]:
    """Estimates and their reported errors over SEEDS seeds."""
    means, errors = np.zeros(SEEDS), np.zeros(SEEDS)
    for seed in range(SEEDS):
        estimator = MaskedBound(mask=mask, seed=seed)
        draws = estimator.draws(LENGTH, key="q", start=0, count=num_draws)
        values = (model(draws.masks[:, 0]) * draws.weights[:, 0]).sum(-1)
        means[seed], errors[seed] = values.mean(), estimator.standard_error(values, draws.strata)
    return means, errors


@pytest.mark.parametrize("mask", ["exact_count", "bernoulli"])
def test_reported_errors_are_those_of_the_estimates(mask) -> None:
    """Root mean square of the reported errors over the real one, and how often ±t·error holds the mean, t of Student's
    distribution with K - 1 degrees of freedom."""
    model = Formula(0)
    for num_draws in (2, 4, 8, 16, 32):
        means, errors = replicate(mask, num_draws, model)
        centre = model.bound() if mask == "exact_count" else means.mean()  # Bernoulli masks leave out p < 0.001
        ratio = math.sqrt(np.square(errors).mean()) / means.std()
        quantile = stats.t.ppf(0.975, num_draws - 1)
        student, normal = (float((np.abs(means - centre) <= q * errors).mean()) for q in (quantile, 1.96))
        print(f"{mask} K={num_draws}: reported/real {ratio:.2f}, ±t covers {student:.3f}, ±1.96 {normal:.3f}")
        assert student > 0.89
        assert 0.9 < ratio < (1.2 if num_draws >= 8 else 1.7)
        assert abs(means.mean() - model.bound()) < 4 * means.std() / math.sqrt(SEEDS) + 0.002 * abs(model.bound())


class FormulaScorer(MaskedScorer):
    """Looks log p up in formulas instead of running a model; the target's first token says which."""

    def __init__(self, models: list[Formula]) -> None:
        super().__init__(None, mask_id=99, max_length=LENGTH + 1, batch_size=10**9)  # type: ignore[arg-type]
        self.models = models

    def _forward(self, batch: list[tuple[Tally, np.ndarray, bytes]]) -> None:
        for index, model in enumerate(self.models):
            rows = [row for row in batch if row[0].request.target[0] == index]
            if rows:
                logprobs = model(np.stack([mask[0] for _, mask, _ in rows]))
                for (tally, (_, wanted), name), own in zip(rows, logprobs):
                    tally.token_logprobs[name] = np.where(wanted, own, 0.0)


def test_a_race_biases_likelihoods_and_says_so_and_plain_draws_do_not() -> None:
    """2,000 replications: dropped answers come out too low and the leader too high; without a race there is no bias."""
    models = [Formula(seed, level / -Formula(seed).bound()) for seed, level in ((0, 24.0), (3, 24.5), (5, 26.0))]
    truth = np.array([model.bound() for model in models])
    targets = [(index, *[5] * (LENGTH - 1)) for index in range(3)]
    number, settings = 2000, RaceSettings(first_draws=4, max_draws=8)
    questions = [Question(tuple(Request((7,), t, f"q{i}") for t in targets)) for i in range(number)]
    groups = race(FormulaScorer(models), questions, make_estimator("exact-count"), settings=settings)
    values = np.array([[tally.values.mean() for tally in group] for group in groups])
    winner = values.argmax(-1)
    chosen = values[np.arange(number), winner] - truth[winner]
    dropped = np.concatenate([(row - truth)[[len(t.values) < 8 for t in group] & (np.arange(3) != best)]
                              for row, group, best in zip(values, groups, winner)])  # fmt: skip
    right = np.mean(winner == truth.argmax())
    print(f"race: winner {chosen.mean():+.3f} nats, dropped {dropped.mean():+.3f} nats, right {right:.3f}")
    assert chosen.mean() > 4 * chosen.std() / math.sqrt(number)
    assert dropped.mean() < -4 * dropped.std() / math.sqrt(len(dropped))
    labels = {raced(tally).kind for group in groups for tally in group}
    assert labels == {"ranking"}
    assert all(math.isnan(raced(tally).standard_error) for tally in groups[0])

    scorer = FormulaScorer(models)
    requests = [choice for question in questions for choice in question.choices]
    plain = scorer.score(requests, make_estimator("exact-count"), num_draws=4)
    assert {estimate.kind for estimate in plain} == {"bound"}
    error = np.array([estimate.value for estimate in plain]).reshape(number, 3) - truth
    print(f"plain draws: {error.mean():+.3f} nats")
    assert (np.abs(error.mean(0)) < 4 * error.std(0) / math.sqrt(number)).all()
