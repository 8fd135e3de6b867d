"""The bound of uniform-state diffusion: its value, its gradient, its time integral, and what rounding leaves of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron.model.batch import Targets
from megatron.model.loss import HeadOutput
from megatron.objectives.uniform_diffusion import UniformBound
from megatron.parallel import cross_entropy, uniform_bound
from megatron.parallel.context import ParallelContext
from megatron.parallel.uniform_bound import divergences, linear_uniform_bound
from tests.evaluation.uniform_chain import density, shares

HIDDEN = 6


def make_inputs(rows: int, vocab: int, padding: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    tokens, noise = torch.randint(vocab, (2, rows), generator=random)
    is_kept = torch.rand(rows, generator=random) < 0.5
    real = {"generator": random, "dtype": torch.float64}
    return {
        "hidden": torch.randn(rows, HIDDEN, **real).requires_grad_(),
        "weight": torch.randn(vocab + padding, HIDDEN, **real).requires_grad_(),
        "tokens": tokens,
        "noised": torch.where(is_kept, tokens, noise),
        "visible": torch.rand(rows, **real),
        "loss_weights": torch.rand(rows, **real),
    }


def formula(given: dict[str, torch.Tensor], vocab: int) -> torch.Tensor:
    """ℓ of eq. (1) for α' = −1, term by term; differentiable. [rows]"""
    probs = (given["hidden"] @ given["weight"].T)[:, :vocab].softmax(-1)
    visible, tokens, noised = given["visible"][:, None], given["tokens"], given["noised"][:, None]
    truth = vocab * visible * torch.nn.functional.one_hot(tokens, vocab) + 1 - visible
    model = vocab * visible * probs + 1 - visible
    own, theirs = truth.gather(-1, noised), model.gather(-1, noised)
    logs = (truth / own * torch.log(theirs * truth / (model * own))).sum(-1)
    return -(vocab / own - vocab / theirs).squeeze(-1) / (vocab * given["visible"]) + logs / (vocab * given["visible"])


def head(given: dict[str, torch.Tensor], vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    odds = vocab * given["visible"] / (1 - given["visible"])
    states = (given["tokens"], given["noised"], odds)
    output = (given["hidden"], given["weight"])
    return linear_uniform_bound(output, states, given["loss_weights"], ParallelContext(), vocab_size=vocab)


@pytest.mark.parametrize(("vocab", "padding"), [(2, 0), (5, 3), (37, 1), (200, 56)])
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, vocab, padding) -> None:
    """In fp64, against autograd, across the boundaries of chunks; padding rows have no share and no gradient."""
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", 16)
    monkeypatch.setattr(uniform_bound, "PARTS", 3)
    given = make_inputs(150, vocab, padding)
    loss, values = head(given, vocab)
    (3 * loss).backward()
    got = [given[name].grad.clone() for name in ("hidden", "weight")]
    given["hidden"].grad = given["weight"].grad = None
    expected = formula(given, vocab) * (1 - given["visible"])
    (3 * (expected * given["loss_weights"]).sum()).backward()
    torch.testing.assert_close(values, expected.detach(), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(loss.detach(), (expected * given["loss_weights"]).sum().detach())
    for mine, wanted in zip(got, (given["hidden"].grad, given["weight"].grad)):
        torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-11)
    assert not values.requires_grad
    assert (got[1][vocab:] == 0).all()


def test_the_density_is_not_negative() -> None:
    for seed in range(20):
        given = make_inputs(500, 11, seed=seed)
        with torch.no_grad():
            given["hidden"] *= 10 ** (seed / 10 - 1)
            given["visible"] = 10 ** -(6 * given["visible"])
            values = head(given, 11)[1]
            assert values.min() >= -1e-12 and values.max() > 0
            assert (formula(given, 11) >= -1e-7).all()


def test_a_perfect_prediction_costs_nothing() -> None:
    logits = torch.full((2, 9), -1e3)
    logits[:, 4] = 0
    pairs = torch.tensor([[4, 4], [4, 7]])
    values, _ = divergences(logits, pairs, torch.tensor([3.0, 3.0]), ParallelContext(), vocab_size=9)
    assert values.abs().max() < 1e-6


@pytest.mark.parametrize("vocab", [2, 5, 300])
def test_the_time_integral_without_context_is_the_likelihood(vocab) -> None:
    """∫ E ℓ dt = −log p(x) where the prediction does not depend on the noise, for every x."""
    random = np.random.default_rng(vocab)
    logprobs = torch.from_numpy(random.normal(size=vocab) * 2).log_softmax(-1)
    for token in {0, 1, vocab // 2, vocab - 1}:
        total = by_terms = 0.0
        pairs = torch.stack((torch.full((vocab,), token), torch.arange(vocab)))
        for visible, weight in zip(*shares(160, 30)):
            seen = np.full(vocab, (1 - visible) / vocab)
            seen[token] += visible
            odds = torch.full((vocab,), vocab * visible / (1 - visible), dtype=torch.float64)
            logits = logprobs.expand(vocab, -1).clone()
            values, _ = divergences(logits, pairs, odds, ParallelContext(), vocab_size=vocab)
            total += weight * float(seen @ values.numpy()) / (1 - visible)
            if 1e-4 < visible < 1 - 1e-4:
                rows = logprobs.expand(vocab, -1).numpy()
                by_terms += weight * float(seen @ density(rows, *pairs.numpy(), visible))
        assert total == pytest.approx(-float(logprobs[token]), abs=1e-4)
        assert by_terms == pytest.approx(-float(logprobs[token]), abs=0.02), "the formula itself, without its ends"


@pytest.mark.parametrize("visible", [1e-8, 1e-5, 1e-2, 0.5, 0.99, 1 - 1e-4, 1 - 1e-8])
def test_fp32_of_a_large_vocabulary_is_right_near_both_ends(visible) -> None:
    vocab = 50_257
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(24, vocab, generator=random, dtype=torch.float64) * 3
    pairs = torch.randint(vocab, (2, 24), generator=random)
    pairs[1, :8] = pairs[0, :8]
    logits[torch.arange(24), pairs[0]] += torch.linspace(-4, 14, 24)
    odds = torch.full((24,), vocab * visible / (1 - visible), dtype=torch.float64)
    run = ParallelContext()
    exact, slopes = divergences(logits.clone(), pairs, odds, run, vocab_size=vocab)
    values, errors = divergences(logits.float(), pairs, odds.float(), run, vocab_size=vocab)
    torch.testing.assert_close(values.double(), exact, rtol=2e-5, atol=5e-6)
    torch.testing.assert_close(errors.double(), slopes, rtol=1e-4, atol=5e-6)
    rounded, _ = divergences(logits.bfloat16().float(), pairs, odds.float(), run, vocab_size=vocab)
    assert (rounded - exact).abs().max() <= 0.05 * (1 + exact.abs().max())  # logits of bf16 are rounded by up to 0.06


def test_token_losses_add_up_to_the_loss_of_the_positions_with_a_weight() -> None:
    given = make_inputs(12, 7)
    weights = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [0, 0.5, 0, 3]])
    shape = {name: given[name].view(3, 4) for name in ("tokens", "noised", "visible")}
    odds = (7 * shape["visible"] / (1 - shape["visible"])).float()
    positions, count = weights.flatten().nonzero().flatten(), torch.tensor([4.0, 4.0, 3.0])
    targets = Targets(shape["tokens"], weights, positions, count, shape["noised"], odds)
    output = HeadOutput(given["hidden"].view(3, 4, HIDDEN).float(), given["weight"].float())
    losses = UniformBound(7).per_token(output, targets, ParallelContext())
    expected = (formula(given, 7) * (1 - given["visible"])).detach().view(3, 4) * weights
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    loss = UniformBound(7).reduce(output, targets, ParallelContext())
    assert loss.item() == pytest.approx(losses.sum().item() / 11, rel=1e-5)
