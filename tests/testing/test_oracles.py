"""The oracles against each other and against sums written out by hand."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from megatron.testing import oracles
from tests.evaluation import toy

VOCAB, TEXT = 5, (1, 4, 0, 2)


@pytest.fixture(scope="module")
def model() -> toy.ToyMaskedModel:
    return toy.ToyMaskedModel(vocab=VOCAB, length=6, seed=2)


@pytest.mark.parametrize("context", [(), (3,), (3, 2)])
def test_the_table_holds_one_plain_pass_for_every_mask(model, context) -> None:
    table = oracles.conditionals(model, TEXT, VOCAB, context=context)
    assert table.shape == (16, 4)
    for index, mask in enumerate(oracles.all_masks(4).tolist()):
        row = [*context, *(VOCAB if hidden else token for token, hidden in zip(TEXT, mask))]
        logprobs = model(torch.tensor([row]))[0].double().log_softmax(-1)
        for place, hidden in enumerate(mask):
            expected = float(logprobs[len(context) + place, TEXT[place]]) if hidden else 0.0
            assert table[index, place] == pytest.approx(expected, abs=1e-5)


def test_an_order_is_a_chain_of_conditionals(model) -> None:
    table = oracles.conditionals(model, TEXT, VOCAB)
    hidden, total = {0, 1, 2, 3}, 0.0
    for place in (2, 0, 3, 1):
        total += table[sum(1 << (3 - other) for other in hidden), place]
        hidden.discard(place)
    assert oracles.chain_rule(table, (2, 0, 3, 1)) == pytest.approx(total, abs=1e-12)
    orders = list(permutations(range(4)))
    assert oracles.by_order(table)[orders.index((2, 0, 3, 1))] == pytest.approx(total, abs=1e-12)


def test_the_mean_over_orders_is_the_ideal_bound(model) -> None:
    """Two enumerations that share nothing but the table: over orders, and over masks by their weights (arXiv 2406.03736)."""
    for text in (TEXT, TEXT[:3], TEXT[:1]):
        table = oracles.conditionals(model, text, VOCAB, context=(3,))
        assert oracles.bound_nll(table) == pytest.approx(-oracles.by_order(table).mean(), abs=1e-12)
        assert oracles.mixture_nll(table) == pytest.approx(-math.log(np.exp(oracles.by_order(table)).mean()), abs=1e-12)
        assert oracles.mixture_nll(table) <= oracles.bound_nll(table) + 1e-12


def test_a_floor_keeps_the_integral(model) -> None:
    """Against quadrature, exact for polynomials of such degree; a small floor hardly moves it."""
    table = oracles.conditionals(model, TEXT, VOCAB)
    count, losses = oracles.all_masks(4).sum(-1).numpy(), -table.sum(-1)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    p = (1 - 0.05) * (nodes + 1) / 2 + 0.05
    expected = sum(w / 2 * (q ** (count - 1.0) * (1 - q) ** (4 - count) * losses).sum() for q, w in zip(p, weights))
    assert oracles.bound_nll(table, floor=0.05) == pytest.approx(expected, abs=1e-12)
    assert oracles.bound_nll(table, floor=1e-3) == pytest.approx(oracles.bound_nll(table), rel=5e-3)


def test_a_causal_model_is_scored_by_its_chain_rule() -> None:
    model = toy.ToyCausalModel(vocab=4)
    texts = oracles.all_texts(4, 3)
    found = oracles.causal_nll(model, texts, context=(2, 1))
    assert np.exp(-found).sum() == pytest.approx(1.0, abs=1e-6)
    row = torch.tensor([[2, 1, *texts[27]]])
    logprobs = model(row)[0].double().log_softmax(-1)
    assert found[27] == pytest.approx(
        -sum(float(logprobs[1 + i, token]) for i, token in enumerate(texts[27])), abs=1e-6
    )
