"""Errors of means and differences, against document bootstraps, against repeated draws of documents and noise, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.objectives.mdm import MaskedDiffusion
from megatron.runs.sums import difference, reach
from megatron.statistics import ValidationSums, fingerprint, half_of, mean_loss

SEQ = 64


def corpus(seed: int, *, documents: int, median: float = 60, spread: float = 0.8, effect: float = 0.5):
    """(document of every token [samples, SEQ], effect of every document): packed documents of very different lengths."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(4, rng.lognormal(math.log(median), spread, documents)).astype(int)
    owner = np.repeat(np.arange(documents), sizes)
    owner = owner[: len(owner) // SEQ * SEQ].reshape(-1, SEQ)
    return owner, rng.normal(0, effect, documents)


def validate(owner, effects, seed: int, *, level: float = 3.0, mask: float = 0.0) -> ValidationSums:
    """Losses with an effect of the document, one of the token and, for a bound, one that a whole sample shares."""
    rng = np.random.default_rng(seed)
    loss = level + effects[owner] + rng.normal(0, 0.8, owner.shape) + mask * rng.normal(0, 1, (len(owner), 1))
    return ValidationSums.of_tokens(np.arange(len(owner)), owner, loss, draws=int(mask > 0))


def document_bootstrap(sums: ValidationSums, other: ValidationSums | None = None) -> np.ndarray:
    """Loss per token, or its difference to ``other``, of resamples of whole documents; [4000] float64.

    Slow, with no assumption but that documents are independent: the check of the errors.
    """
    names, tables = np.unique(sums.document), []
    for part in (sums,) if other is None else (sums, other):
        index = np.searchsorted(names, part.document)
        tables.append([np.bincount(index, value, len(names)) for value in (part.loss, part.tokens)])
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), 4000)
    ratios = [(counts @ loss) / (counts @ tokens) for loss, tokens in tables]
    return ratios[0] if other is None else ratios[0] - ratios[1]


def test_error_equals_a_document_bootstrap():
    """Strong document effects, and documents that span samples: within 10 %, as the paired difference is."""
    owner, effects = corpus(0, documents=400)
    shifts = np.random.default_rng(1).normal(0.1, 0.2, len(effects))
    first, second = validate(owner, effects, 2), validate(owner, effects + shifts, 3)
    assert np.unique(first.document, return_counts=True)[1].max() > 1, "documents must span samples"
    error = mean_loss(first).error
    assert error == pytest.approx(document_bootstrap(first).std(), rel=0.1)
    samples = np.array([first.loss[first.sample == i].sum() / SEQ for i in np.unique(first.sample)])
    assert error > 1.2 * samples.std(ddof=1) / math.sqrt(len(samples)), "samples of one document err together"
    paired = difference(first, second)
    assert paired.error == pytest.approx(document_bootstrap(second, first).std(), rel=0.1)
    assert paired.error < 0.8 * math.hypot(error, mean_loss(second).error)
    assert paired.value == pytest.approx(mean_loss(second).value - mean_loss(first).value)


@pytest.mark.parametrize(
    ("documents", "median", "mask"), [(40, 60.0, 0.0), (150, 60.0, 0.6), (300, 12.0, 1.0)],
    ids=["40 documents", "spanning samples, with noise", "many documents a sample, with noise"],
)  # fmt: skip
def test_intervals_hold_the_truth(documents, median, mask):
    """1,000 draws of documents and noise: the interval of the mean, and of the paired difference, holds the population's
    value in 93 to 97 %. The third case has several documents a sample, whose shared mask a document alone cannot show."""
    inside = np.zeros(2)
    for draw in range(1000):
        owner, effects = corpus(draw, documents=documents, median=median)
        shifts = np.random.default_rng(10_000 + draw).normal(0.1, 0.3, len(effects))
        first = validate(owner, effects, 20_000 + draw)
        second = validate(owner, effects + shifts, 30_000 + draw, mask=mask)
        for index, (estimate, truth) in enumerate(((mean_loss(second), 3.1), (difference(first, second), 0.1))):
            inside[index] += abs(estimate.value - truth) <= reach(estimate)
    assert np.all((inside >= 930) & (inside <= 970)), inside


def test_intervals_of_a_validation_hold_its_expectation():
    """The noise of validation itself, two draws a sample, under 1,000 draws of documents and noise: ±1.96 and Student's
    interval hold the mean over both in 93 to 97 %, documents longer than a sample included. Tokens cost more where more of
    their sample is masked. The noise is made once, for more samples than a draw of documents takes of them."""
    ids, inside = np.arange(600), np.zeros(2)
    plain = MaskedDiffusion(mask_token_id=5, global_batch_size=8, seed=0)
    noise = [plain.for_eval(draw, 2).masks_and_weights(ids, SEQ) for draw in range(2)]
    cost = sum(weights * is_masked.mean(axis=1, keepdims=True) for is_masked, weights in noise) / 2
    weight = sum(weights for _, weights in noise) / 2
    for draw in range(1000):
        owner, effects = corpus(draw, documents=90, median=60, effect=0.4)
        random, rows = np.random.default_rng(40_000 + draw), np.arange(len(owner))
        taken = random.permutation(ids)[: len(owner)]
        token = 2 + effects[owner] + random.gamma(2.0, 0.8, owner.shape)
        loss, excess = token * weight[taken] + cost[taken], weight[taken] - 1
        sums, more = (ValidationSums.of_tokens(rows, owner, values) for values in (loss, excess))
        sums = ValidationSums.collect(sums.sample, sums.document, sums.tokens, sums.loss, more.loss, draws=2)
        assert sums.loss.sum() == pytest.approx(loss.sum(), rel=1e-6), "the whole stays as it is"
        estimate = mean_loss(sums)
        off = abs(estimate.value - (2 + 1.6 + (SEQ + 1) / (2 * SEQ)))  # expected weights are 1, E[m / L] = (L + 1) / 2L
        inside += (off <= 1.96 * estimate.error, off <= reach(estimate))
    assert np.all((inside >= 930) & (inside <= 970)), inside


def test_documents_of_one_length_give_the_textbook_error():
    """G documents of equal length: the error is that of the mean of G means, with G − 1."""
    means = np.random.default_rng(0).normal(3, 1, 12)
    sums = ValidationSums.collect(np.arange(12), np.arange(12), np.full(12, 10), means * 10)
    estimate = mean_loss(sums)
    assert estimate.value == pytest.approx(means.mean())
    assert estimate.error == pytest.approx(means.std(ddof=1) / math.sqrt(12))
    assert estimate.degrees == pytest.approx(11)
    assert reach(estimate) == pytest.approx(2.200985 * estimate.error, rel=1e-5)


def test_repeated_samples_do_not_shrink_the_error():
    owner, effects = corpus(0, documents=30)
    once = validate(owner, effects, 1)
    parts = [getattr(once, name) for name in ("sample", "document", "tokens", "loss")]
    four_times = ValidationSums.collect(*(np.tile(part, 4) for part in parts))
    assert mean_loss(four_times) == mean_loss(once)
    some_twice = ValidationSums.collect(*(np.append(part, part[:9]) for part in parts))
    assert mean_loss(some_twice) == mean_loss(once)
    assert four_times.num_samples == once.num_samples == len(owner)


def test_draws_of_a_sample_are_averaged():
    owner, effects = corpus(0, documents=60)
    draws = [validate(owner, effects, seed, mask=1.0) for seed in range(8)]
    together = ValidationSums.collect(
        *(np.concatenate([getattr(draw, name) for draw in draws]) for name in ("sample", "document", "tokens", "loss")),
        draws=8,
    )
    assert mean_loss(together).value == pytest.approx(np.mean([mean_loss(draw).value for draw in draws]))
    assert mean_loss(together).error < min(mean_loss(draw).error for draw in draws)


def test_order_of_entries_and_split_over_ranks_do_not_matter():
    owner, effects = corpus(3, documents=50)
    loss = 3 + effects[owner]
    whole = ValidationSums.of_tokens(np.arange(len(owner)), owner, loss)
    ranks = [
        ValidationSums.of_tokens(np.arange(len(owner))[rank::3], owner[rank::3], loss[rank::3]) for rank in range(3)
    ]
    joined = ValidationSums.collect(
        *(np.concatenate([getattr(rank, name) for rank in ranks]) for name in ("sample", "document", "tokens", "loss"))
    )
    for name in ("sample", "document", "tokens", "loss"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_tokens_without_a_document_are_not_counted():
    owner = np.array([[0, 0, -1, 1]])
    sums = ValidationSums.of_tokens(np.array([7]), owner, np.array([[1.0, 2.0, 100.0, 5.0]]))
    assert (sums.sample.tolist(), sums.document.tolist()) == ([7, 7], [0, 1])
    assert (sums.tokens.tolist(), sums.loss.tolist()) == ([2, 1], [3.0, 5.0])
    assert mean_loss(sums).value == pytest.approx(8 / 3)


def test_one_document_says_nothing_about_others():
    sums = ValidationSums.collect([0, 1], [0, 0], [10, 10], [30.0, 31.0])
    assert mean_loss(sums).value == pytest.approx(3.05)
    assert math.isnan(mean_loss(sums).error)
    assert math.isnan(reach(mean_loss(sums)))


def test_halves_are_a_function_of_the_document_alone():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50_000, size) for size in rng.integers(1, 300, 4000)]
    halves = [half_of(fingerprint(tokens)) for tokens in documents]
    for kind in (np.uint16, np.int32, ">i8"):
        assert halves == [half_of(fingerprint(tokens.astype(kind))) for tokens in documents]
    assert halves == [half_of(fingerprint(tokens.tolist())) for tokens in documents]
    assert halves.count("selection") == pytest.approx(2000, abs=4 * math.sqrt(1000))
    assert half_of("a document") in ("selection", "report")
    assert [half_of(bytes([value])) for value in range(4)] == ["report", "report", "selection", "selection"], "for ever"


def test_documents_of_a_sample_that_err_against_each_other_leave_the_error_of_documents():
    """The products of their influences sum to less than nothing, and are left out."""
    loss = np.array([30.0, 10.0, 28.0, 12.0])
    exact, drawn = (ValidationSums.collect([0, 0, 1, 1], range(4), [10] * 4, loss, draws=draws) for draws in (0, 2))
    assert mean_loss(drawn) == mean_loss(exact) and mean_loss(drawn).error > 0


def test_one_document_that_holds_nearly_all_leaves_a_degree_of_freedom():
    assert mean_loss(ValidationSums.collect([0, 1], [0, 1], [10_000, 1], [30_000.0, 2.0])).degrees == 1


@pytest.mark.filterwarnings("error")
def test_an_infinite_loss_stays_infinite_and_has_no_error() -> None:
    endless, plain = (
        ValidationSums.collect([0, 1, 2], [0, 1, 2], [4, 4, 4], [1.0, last, 3.0]) for last in (math.inf, 2.0)
    )
    assert mean_loss(endless).value == math.inf and math.isnan(mean_loss(endless).error)
    assert mean_loss(endless).num_documents == 3
    assert difference(plain, endless).value == math.inf and math.isnan(reach(difference(plain, endless)))
    assert min((endless, plain), key=lambda own: mean_loss(own).value) is plain
