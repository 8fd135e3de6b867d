"""Exact likelihoods of samplers, and what random orders say of their mixture, against enumeration."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from megatron.errors import UserError
from megatron.evaluation.estimators import LeftToRight
from megatron.evaluation.exact import PolicyScorer, ceiling, log_mean_exp
from megatron.evaluation.scorer import MaskedScorer, Request
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings
from megatron.generation.flags import POLICIES
from megatron.generation.sampling import TokenSampling
from megatron.testing.checks import check_scores_stand_alone
from megatron.testing.oracles import bound_nll, by_order, conditionals, mixture_nll
from tests.evaluation import toy
from tests.generation.test_diffusion import model_with_room

VOCAB, LENGTH = 5, 6
PLAIN = TokenSampling(temperature=1.0)


@pytest.fixture(scope="module")
def model() -> toy.ToyMaskedModel:
    return toy.ToyMaskedModel(vocab=VOCAB, length=LENGTH, seed=4)


def scorer_of(model, *, batch_size: int = 32, **settings) -> PolicyScorer:
    sampler = DiffusionSampler(model_with_room(model), mask_id=VOCAB)
    settings = DiffusionSettings(**{"sampling": PLAIN, **settings})
    return PolicyScorer(sampler, settings, max_length=LENGTH, batch_size=batch_size)


REQUESTS = [
    Request((0, 1), (2, 3, 4, 0)),
    Request((4,), (3, 2, 1, 0, 1)),
    Request((), (1, 1, 2, 2, 3, 3)),
    Request((3, 3, 3, 0, 1), (2, 3, 4, 0)),  # longer than a row: the left of the context goes
    Request((2, 2), (0, 0, 0, 0)),
]


def test_left_to_right_is_the_chain_rule(model) -> None:
    found = scorer_of(model, order="left-to-right").score(REQUESTS)
    plain = MaskedScorer(model, mask_id=VOCAB, max_length=LENGTH).score(REQUESTS, LeftToRight(), num_draws=1)
    assert [one.value for one in found] == pytest.approx([one.value for one in plain], abs=1e-5)
    assert [one.num_passes for one in found] == [one.num_passes for one in plain]
    assert found[0].kind == "exact"
    assert found[0].standard_error == 0


@pytest.mark.parametrize("order", POLICIES)
def test_scores_depend_on_nothing_but_the_request(model, order) -> None:
    """Given the same order: no choice here is so narrow that rounding could turn it."""
    requests = {(*request.context, *request.target): request for request in REQUESTS}
    assert not any(own.near_ties.any() for own in scorer_of(model, order=order).token_scores(REQUESTS))

    def score(texts, batch_size: int) -> list[float]:
        found = scorer_of(model, order=order, batch_size=batch_size).score([requests[text] for text in texts])
        return [one.value for one in found]

    check_scores_stand_alone(
        {f"{size} rows": partial(score, batch_size=size) for size in (1, 2, 32)}, list(requests), tolerance=1e-5
    )


def test_narrow_choices_are_counted_by_token(model) -> None:
    """A model whose predictions rounding alone tells apart: every choice but the last is one."""

    def flat(input_ids, *, positions=None):
        return model(input_ids, positions=positions) * 1e-7

    found = scorer_of(flat, order="entropy").token_scores([Request((0, 1), (2, 3, 4, 0))])[0]
    assert found.near_ties.sum() == 3
    assert found.logprobs == pytest.approx(np.full(4, -math.log(VOCAB)), abs=1e-5)


def test_passes_are_counted_and_named(model) -> None:
    scorer = scorer_of(model, order="margin", tokens_per_step=2, block_length=3)
    calls = []
    sampler = scorer.sampler
    inner, sampler.logits_fn = sampler.logits_fn, lambda *args, **kw: calls.append(1) or inner(*args, **kw)
    (found,) = scorer.score([Request((0,), (1, 2, 3, 4, 0))])
    assert found.num_passes == len(calls) == 3  # blocks of 3 and 2: two passes and one
    assert found.estimator == "margin, 2 tokens a pass, blocks of 3"


def test_bounds_of_the_mixture_are_in_their_order(model) -> None:
    """bound ≤ two-order bound ≤ three-order bound ≤ log p ≤ tangent, in enumerated expectation."""
    target = (1, 3, 0, 2)
    request = Request((2, 4), target)
    table = conditionals(model, target, VOCAB, context=request.context)
    logprobs = by_order(table)
    truth = float(log_mean_exp(logprobs))
    assert truth == pytest.approx(-mixture_nll(table), abs=1e-12)
    pairs, triples = (np.array(list(itertools.product(logprobs, repeat=count))) for count in (2, 3))
    bounds = [logprobs.mean(), log_mean_exp(pairs).mean(), log_mean_exp(triples).mean(), truth]
    assert bounds == sorted(bounds)
    assert bounds[1] - bounds[0] > 1e-4
    for log_reference in (truth - 0.5, truth, truth + 0.3):
        assert ceiling(logprobs, log_reference).value >= truth - 1e-12
    assert ceiling(logprobs, truth).value == pytest.approx(truth, abs=1e-12)
    assert -bound_nll(table) == pytest.approx(bounds[0], abs=1e-9), "the mean over orders is the ideal bound"


def test_the_mean_over_random_orders_is_the_bound_and_brackets_hold(model) -> None:
    """Orders of the scorer itself: their mean is the bound; of 200 brackets from 8 + 8 orders few miss the truth."""
    target = (1, 3, 0, 2)
    request = Request((2, 4), target)
    enumerated = by_order(conditionals(model, target, VOCAB, context=request.context))
    found = np.array(
        [scorer_of(model, order="random", order_number=number).score([request])[0].value for number in range(320)]
    )
    assert set(np.round(found, 4)) <= set(np.round(enumerated, 4))
    error = enumerated.std() / math.sqrt(len(found))
    assert abs(found.mean() - enumerated.mean()) < 4 * error
    truth = float(log_mean_exp(enumerated))
    random = np.random.default_rng(0)
    misses = 0
    for _ in range(300):
        drawn = random.choice(enumerated, 64)
        misses += ceiling(drawn[32:], float(log_mean_exp(drawn[:32]))).limit < truth
    assert 1 <= misses <= 24, "one-sided 95 %: 15 of 300"
    assert math.isnan(ceiling(enumerated[:8], truth).limit), "few orders have no limit"


def test_a_target_that_does_not_fit_is_refused(model) -> None:
    for target in ((), (1,) * 7):
        with pytest.raises(UserError, match=f"a target of {len(target)} tokens"):
            scorer_of(model).score([Request((0,), target)])
    with pytest.raises(UserError, match="temperature 0"):
        scorer_of(model, sampling=TokenSampling())


def test_samplers_that_differ_in_the_last_place_have_names_of_their_own(model) -> None:
    """Finished results are kept by name."""
    names = {
        scorer_of(model, sampling=TokenSampling(temperature=1.0, **how)).name
        for how in ({}, {"top_p": 0.9999999}, {"top_p": 0.9999998}, {"top_k": 2})
    }
    assert len(names) == 4 and all("temperature" not in name for name in names)
    assert scorer_of(model, sampling=TokenSampling(temperature=0.7)).name.endswith(", temperature 0.7")


def test_a_token_that_is_never_drawn_has_no_likelihood(model) -> None:
    """top-k 1 draws one text only."""
    scorer = scorer_of(model, order="left-to-right", sampling=TokenSampling(temperature=1.0, top_k=1))
    row = scorer.sampler.fill([[0] + [VOCAB] * 5], settings=scorer.settings)[0]
    assert scorer.score([Request((0,), tuple(row[1:]))])[0].value == 0.0
    other = (*row[1:5], (row[5] + 1) % VOCAB)
    assert scorer.score([Request((0,), other)])[0].value == -math.inf
    assert torch.isfinite(torch.tensor(scorer_of(model).score([Request((0,), other)])[0].value))
