"""The estimator of validation: pairs of exact counts, unbiased part by part, and of less variance than coins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from objective_helpers import MASK_ID, SEQ, conditionals_of, make_objective, make_tokens, prepare, tiny_model

from megatron import randomness as noise
from megatron.config.schema import BERNOULLI, EXACT_COUNT
from megatron.model.mask import Full
from megatron.objectives.block_diffusion import BlockMaskedDiffusion
from megatron.objectives.mdm import MaskedDiffusion
from megatron.statistics import ValidationSums, mean_loss
from megatron.testing.oracles import by_order

DIFFUSION = [["--objective", "mdm"], ["--objective", "maskgit"], ["--objective", "exact_count_mdm"],
             ["--objective", "block_diffusion", "--block-size", "8"]]  # fmt: skip


class Orders:
    """In the place of the random numbers of a sample: orders that the test chooses."""

    def __init__(self, orders: Iterator[np.ndarray]) -> None:
        self.orders = orders

    def permutation(self, length: int) -> np.ndarray:
        order = next(self.orders)
        assert len(order) == length
        return order


def enumerated(monkeypatch: pytest.MonkeyPatch, evaluated, num_draws: int, spans: int) -> np.ndarray:
    """Expected weight of every (mask, token) of 4 tokens, fp64 [16, 4]: over all strata of t and all orders.

    The strata, 2·L of the unit interval, are so narrow that within one the counts are the same.
    """
    length = 4 // spans
    starts = (np.arange(2 * length) + 0.5) / (2 * length)
    orders = list(product([np.array(order) for order in permutations(range(length))], repeat=spans))
    found = np.zeros((16, 4))
    for start, chosen in product(starts, orders):
        monkeypatch.setattr(noise, "generator", lambda *_, chosen=chosen: Orders(iter(chosen)))
        monkeypatch.setattr(
            noise,
            "evaluation_times",
            lambda ids, *, draw, num_draws, seed, start=start: np.array([(start + draw / num_draws) % 1.0]),
        )
        for draw in range(num_draws):
            is_masked, weights = evaluated.for_eval(draw, num_draws).masks_and_weights(np.array([0]), 4)
            assert np.array_equal(weights[0] > 0, is_masked[0])
            found[int(is_masked[0] @ [8, 4, 2, 1])] += weights[0]
    return found / len(starts) / len(orders) / num_draws


@pytest.mark.parametrize("num_draws", [1, 2, 3, 4])
@pytest.mark.parametrize("block", [4, 2, 1])
def test_it_is_unbiased_mask_by_mask(monkeypatch, num_draws, block):
    """For every mask of m of L tokens the expected weight is that of coins integrated over t, 1 / (m · C(L, m)). So whatever
    part of a sample is counted (a document of several, the tokens with a loss) keeps its bound; with two blocks, those of
    each block, whatever the other one has."""
    objective = BlockMaskedDiffusion(mask_token_id=5, global_batch_size=8, seed=7, block_size=block)
    if block == 4:
        objective = MaskedDiffusion(mask_token_id=5, global_batch_size=8, seed=7)
    weights = enumerated(monkeypatch, objective, num_draws, spans=4 // block)
    masks = np.array(list(product([0, 1], repeat=4)))
    for first in range(0, 4, block):
        own = masks[:, first : first + block]
        for part in np.unique(own, axis=0)[1:]:
            count = part.sum()
            is_part = (own == part).all(axis=1)
            expected = part / count / np.prod([(block - i) / (count - i) for i in range(count)])
            np.testing.assert_allclose(weights[is_part, first : first + block].sum(axis=0), expected, rtol=1e-6)


@torch.no_grad()
def test_its_expectation_is_the_any_order_likelihood(monkeypatch):
    """The real model, exactly: no floor, no Monte-Carlo error."""
    model, tokens = tiny_model(Full(), vocab=8, seq=4), torch.tensor([2, 0, 4, 1])
    log_p = conditionals_of(model, tokens, 5)
    objective = MaskedDiffusion(mask_token_id=5, global_batch_size=8, seed=7)
    weights = enumerated(monkeypatch, objective, 2, spans=1)
    expected = -np.mean(by_order(log_p))
    assert -(weights * log_p).sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("flags", DIFFUSION, ids=lambda flags: flags[1])
def test_two_draws_are_complementary(flags):
    """Together they mask every token of a span, one of them twice; a last odd draw stands alone."""
    span = 8 if "--block-size" in flags else SEQ
    tokens, ids = make_tokens(40), torch.arange(40)
    batches = [prepare(make_objective(*flags).for_eval(draw, 5), tokens, ids) for draw in range(5)]
    masks = [(batch.inputs.input_ids[:, :SEQ] == MASK_ID).reshape(40, -1, span) for batch in batches]
    for first, second in ((0, 1), (2, 3)):
        assert ((masks[first].int() + masks[second].int()).sum(-1) == span + 1).all()
        assert (masks[first] | masks[second]).all()
        assert masks[first].sum(-1).max() <= span // 2
    assert len({mask.numpy().tobytes() for mask in masks}) == 5
    assert masks[4].sum(-1).min() <= span // 4 and masks[4].sum(-1).max() >= span - 1
    for batch in batches:  # a span weighs what it has tokens, exactly
        weights = batch.targets.loss_weights[:, :SEQ].reshape(40, -1, span)
        torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[..., 0], span))


@pytest.mark.parametrize("flags", DIFFUSION, ids=lambda flags: flags[1])
def test_the_second_draw_of_a_time_of_zero_masks_every_token(monkeypatch, flags):
    """1 − t/2 is 1 then, and no count above the length."""
    monkeypatch.setattr(noise, "evaluation_times", lambda ids, **_: np.zeros(len(ids)))
    is_masked, weights = make_objective(*flags).for_eval(1, 2).masks_and_weights(np.arange(3), 8)
    assert is_masked[:, 0 if "--block-size" not in flags else slice(0, 8)].all() and (weights[is_masked] >= 1).all()


@pytest.mark.parametrize("flags", DIFFUSION, ids=lambda flags: flags[1])
def test_coins_are_still_there(flags):
    """``--valid-estimator bernoulli``: a coin a token at stratified times, also where training draws exact counts."""
    evaluated = make_objective(*flags, "--valid-data-path", "x", "--valid-estimator", "bernoulli").for_eval(1, 3)
    is_masked, weights = evaluated.masks_and_weights(np.arange(40), SEQ)
    t = noise.evaluation_times(np.arange(40), draw=1, num_draws=3)
    assert np.allclose(weights[:, 0], is_masked[:, 0] / ((1 - 1e-3) * t + 1e-3))
    assert len(np.unique(weights.sum(axis=1).round(3))) > 30, (
        "the number of masked tokens varies, and so does their weight"
    )


def losses_of_noise(estimator: str, seeds: int) -> list[ValidationSums]:
    """A validation of 32 samples by two draws under many noise seeds; a made-up model with the losses of the laptop's: tokens
    that differ much, and cost more where more is masked."""
    rng = np.random.default_rng(0)
    token = rng.gamma(2.0, 1.6, (32, 128))
    ids, found = np.arange(32), []
    plain = MaskedDiffusion(mask_token_id=5, global_batch_size=8, seed=7, valid_estimator=estimator)
    for seed in range(seeds):
        loss = np.zeros(token.shape)
        for draw in range(2):
            view = replace(plain.for_eval(draw, 2), seed=noise.EVAL_SEED + 2 * seed)
            is_masked, weights = view.masks_and_weights(ids, 128)
            loss += weights * (token + 2 * is_masked.mean(axis=1, keepdims=True)) / 2
        found.append(ValidationSums.of_tokens(ids, np.broadcast_to(ids[:, None], token.shape), loss, draws=2))
    return found


def test_its_variance_is_a_fifth_of_that_of_coins_at_most():
    """At equal passes, of one sample and of a whole validation; both hold the same mean. docs/metrics.md has real models."""
    coins, counts = (losses_of_noise(name, 120) for name in (BERNOULLI, EXACT_COUNT))
    samples = [np.stack([sums.loss for sums in each]).var(axis=0, ddof=1).mean() for each in (coins, counts)]
    whole = [np.array([mean_loss(sums).value for sums in each]) for each in (coins, counts)]
    assert samples[0] > 5 * samples[1]
    assert whole[0].var(ddof=1) > 5 * whole[1].var(ddof=1)
    error = np.sqrt(sum(values.var(ddof=1) for values in whole) / 120)
    assert abs(whole[0].mean() - whole[1].mean()) < 3 * error
