"""Estimators against likelihoods enumerated on a model with 5 tokens and targets of up to 5."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.evaluation.estimators import (
    ESTIMATORS,
    MIN_MASK_PROB,
    EnumeratedBound,
    LeftToRight,
    MaskedBound,
    RandomOrder,
    for_length,
    independent_standard_error,
    make_estimator,
    stratified_standard_error,
)
from megatron.evaluation.scorer import MaskedScorer, Request
from megatron.testing.checks import check_sums_to_one
from megatron.testing.oracles import all_masks, all_texts, bound_nll, chain_rule, conditionals, mixture_nll
from tests.evaluation import toy

CONTEXT, TARGET = (3,), (1, 4, 0, 2, 2)


@pytest.fixture(scope="module")
def model() -> toy.ToyMaskedModel:
    return toy.ToyMaskedModel(seed=1)


def scorer_of(model: toy.ToyMaskedModel, **options) -> MaskedScorer:
    return MaskedScorer(model, mask_id=model.mask_id, max_length=6, batch_size=64, **options)


def table_of(model, target=TARGET) -> np.ndarray:
    return conditionals(model, target, model.mask_id, context=CONTEXT)


def values(model, estimator, *, num_draws: int, target=TARGET) -> np.ndarray:
    scorer = scorer_of(model)
    tally = scorer.tally(Request(CONTEXT, target, "question"), estimator, num_draws=1)
    tally.estimator = estimator  # no replacement by enumeration
    scorer.extend([tally], num_draws=num_draws)
    return tally.values


def test_enumerated_bound_is_the_mean_over_all_orders(model) -> None:
    for length in range(1, 6):
        truth = -bound_nll(table_of(model, TARGET[:length]))
        (estimate,) = scorer_of(model).score([Request(CONTEXT, TARGET[:length])], EnumeratedBound(), num_draws=1)
        assert estimate.value == pytest.approx(truth, abs=1e-5)
        assert (estimate.standard_error, estimate.num_passes, estimate.kind) == (0.0, 2**length - 1, "bound")


def test_left_to_right_is_the_chain_rule(model) -> None:
    (estimate,) = scorer_of(model).score([Request(CONTEXT, TARGET)], LeftToRight(), num_draws=7)
    assert estimate.value == pytest.approx(chain_rule(table_of(model), range(5)), abs=1e-5)
    assert (estimate.kind, estimate.standard_error, estimate.num_passes) == ("exact", 0.0, 5)


def test_left_to_right_is_a_distribution(model) -> None:
    """Exact likelihoods of all 5^3 targets add up to one; a bound's exponentials cannot exceed one."""

    def score(texts, estimator) -> list[float]:
        requests = [Request(CONTEXT, text) for text in texts]
        return [found.value for found in scorer_of(model).score(requests, estimator, num_draws=1)]

    check_sums_to_one(lambda texts: score(texts, LeftToRight()), vocab_size=5, length=3, tolerance=1e-5)
    assert sum(map(math.exp, score(all_texts(5, 3), EnumeratedBound()))) < 1.0


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "left-to-right"])
@pytest.mark.parametrize("length", [2, 5])
def test_bounds_agree_with_the_truth(model, name, length) -> None:
    target, estimator = TARGET[:length], make_estimator(name, seed=5)
    sample = values(model, estimator, num_draws=4096, target=target)
    strata = estimator.draws(length, key="question", start=0, count=4096).strata
    table = table_of(model, target)
    truth = -bound_nll(table)
    assert truth <= -mixture_nll(table)
    if name.startswith("bernoulli"):
        full = -bound_nll(table, floor=MIN_MASK_PROB)
        assert full == pytest.approx(truth, rel=2e-3)  # bias of the floor
        assert abs(sample.mean() - full) < 3 * sample.std(ddof=1) / math.sqrt(len(sample))
        # Weights up to 1000 make that a weak test: once more over masks with p > 0.05, whose mean is known as well.
        if name == "bernoulli":
            sample, strata = sample[strata > 0.05], strata[strata > 0.05]
            truth = -bound_nll(table, floor=(1 - MIN_MASK_PROB) * 0.05 + MIN_MASK_PROB)
        else:
            return
    # The plain sd is an upper bound for stratified draws and cannot hide a bias behind a wrong stratified error.
    error = sample.std(ddof=1) / math.sqrt(len(sample))
    assert abs(sample.mean() - truth) < 3 * error
    assert error < (0.25 if name == "bernoulli" else 0.12)
    assert abs(sample.mean() - truth) < 4 * max(estimator.standard_error(sample, strata), 1e-6)


@pytest.mark.parametrize(
    "name", ["exact-count", "exact-count-antithetic", "bernoulli", "bernoulli-independent", "random-order"]
)
def test_standard_error_matches_the_scatter(model, name) -> None:
    """Over 300 seeds the reported error is that of the mean: within a third, never much too small."""
    means, errors = [], []
    for seed in range(300):
        estimator = make_estimator(name, seed=seed)
        draws = estimator.draws(5, key="q", start=0, count=16)
        sample = values_from_cache(model, draws)
        means.append(sample.mean())
        errors.append(estimator.standard_error(sample, draws.strata))
    ratio = math.sqrt(np.mean(np.square(errors))) / np.std(means)
    assert 0.8 < ratio < 1.5, f"{name}: reported / actual error {ratio:.2f}"


_logprobs: dict[bytes, np.ndarray] = {}


def values_from_cache(model, draws) -> np.ndarray:
    """Eq. (1) with the 31 masks of a 5-token target looked up: a reference that shares no code with the scorer."""
    if not _logprobs:
        _logprobs.update(zip((mask.tobytes() for mask in all_masks(5).numpy()), table_of(model)))
    zeros = np.zeros(5)
    return np.array(
        [
            sum(weight @ _logprobs.get(mask.tobytes(), zeros) for mask, weight in zip(masks, weights))
            for masks, weights in zip(draws.masks, draws.weights)
        ]
    )


def variance_at_equal_passes(model, estimator, *, passes: int, seeds: int = 400) -> float:
    means = []
    for seed in range(seeds):
        own = type(estimator)(**{**estimator.__dict__, "seed": seed})
        per_draw = own.draws(5, key="q", start=0, count=1).masks.shape[1]
        draws = own.draws(5, key="q", start=0, count=passes // per_draw)
        means.append(values_from_cache(model, draws).mean())
    return float(np.var(means))


def test_variance_is_at_most_half_of_independent_bernoulli(model) -> None:
    worst = variance_at_equal_passes(model, make_estimator("bernoulli-independent"), passes=20)
    figures = {
        name: variance_at_equal_passes(model, make_estimator(name), passes=20) / worst
        for name in ("bernoulli", "exact-count", "exact-count-antithetic", "random-order")
    }
    print("variance relative to independent-t Bernoulli at 20 passes:", figures)
    assert figures["exact-count"] < 0.5
    assert figures["exact-count-antithetic"] < 0.5


def test_noise_is_shared_by_key_and_prefix() -> None:
    estimator = MaskedBound(mask="bernoulli")
    long, short = (estimator.draws(n, key="a", start=3, count=4) for n in (9, 6))
    np.testing.assert_array_equal(long.masks[..., :6], short.masks)
    np.testing.assert_array_equal(long.strata, short.strata)
    other = estimator.draws(9, key="b", start=3, count=4)
    assert (other.masks != long.masks).any()
    whole = estimator.draws(9, key="a", start=0, count=7)
    np.testing.assert_array_equal(whole.masks[3:], long.masks)


def test_draw_shapes_and_counts() -> None:
    draws = MaskedBound(antithetic=True).draws(7, key="q", start=0, count=8)
    assert draws.masks.shape == (8, 2, 7)
    sizes = draws.masks.sum(-1)
    np.testing.assert_array_equal(sizes.sum(-1), np.full(8, 8))  # m and L + 1 - m
    assert (draws.masks.any(1)).all(), "an antithetic pair masks every token at least once"
    sizes = MaskedBound().draws(8, key="q", start=0, count=64).masks.sum((1, 2))
    np.testing.assert_array_equal(np.bincount(sizes)[1:], np.full(8, 8))  # stratified m: each count equally often


def test_errors_by_hand() -> None:
    """Neighbours are those of the strata, whatever the order of the draws; the differences at both ends count twice."""
    values, strata = np.array([5.0, 1.0, 2.0, 4.0]), np.array([0.9, 0.1, 0.3, 0.6])
    assert stratified_standard_error(values, strata) == pytest.approx(math.sqrt((1 + 1 + 4 + 1 + 1) / 2) / 4)
    assert stratified_standard_error(values[:2], strata[:2]) == pytest.approx(4 / 2)
    assert independent_standard_error(values) == pytest.approx(math.sqrt((4 + 4 + 1 + 1) / 3) / 2)


def test_antithetic_draws_run_over_half_of_the_times() -> None:
    assert MaskedBound(antithetic=True).draws(7, key="q", start=0, count=64).strata.max() < 0.5
    assert MaskedBound().draws(7, key="q", start=0, count=64).strata.max() > 0.9
    mask, weight = MaskedBound()._mask(1.0, np.linspace(0, 0.9, 7))  # the other pass of a time of zero
    assert mask.all() and weight == 1


def test_stratified_error_ignores_the_trend() -> None:
    strata = np.linspace(0, 1, 64, endpoint=False)
    rng = np.random.default_rng(0)
    noisy = 100 * strata + rng.normal(size=64)
    assert stratified_standard_error(noisy, strata) == pytest.approx(
        math.sqrt((1 + 0.5 * (100 / 64) ** 2) / 64), rel=0.3
    )
    assert math.isnan(stratified_standard_error(noisy[:1], strata[:1]))


def test_short_targets_are_enumerated() -> None:
    assert isinstance(for_length(MaskedBound(), 3, num_draws=7), EnumeratedBound)
    assert isinstance(for_length(MaskedBound(), 3, num_draws=6), MaskedBound)
    assert isinstance(for_length(MaskedBound(antithetic=True), 3, num_draws=4), EnumeratedBound)
    for estimator in (MaskedBound(), MaskedBound(mask="bernoulli"), RandomOrder()):
        assert isinstance(for_length(estimator, 1, num_draws=1), EnumeratedBound)
    assert isinstance(for_length(RandomOrder(), 3, num_draws=3), EnumeratedBound)
    assert isinstance(for_length(LeftToRight(), 3, num_draws=99), LeftToRight)


def test_names_choose_the_estimator() -> None:
    chosen = {name: make_estimator(name).name for name in ESTIMATORS}
    assert chosen == {
        "exact-count": "exact-count, stratified", "exact-count-antithetic": "exact-count, stratified, antithetic",
        "bernoulli": "bernoulli, stratified", "bernoulli-independent": "bernoulli, independent",
        "left-to-right": "left-to-right chain rule", "random-order": "random-order chain rule",
    }  # fmt: skip


def test_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match="exact-count"):
        make_estimator("mc")
    with pytest.raises(ValueError, match="bernoulli"):
        MaskedBound(mask="uniform")
