"""What random orders say of their mixture, block by block, against enumeration."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.evaluation.scorer import Request
from megatron.evaluation.witnesses import Mixture, RandomOrders, Tangent
from megatron.inference.blocks import BlockModel
from megatron.model.mask import BlockDiffusion
from megatron.testing.oracles import bound_nll, conditionals, mixture_nll
from tests.evaluation.test_blocks import MODEL, VOCAB, exact_of

SIZE = 4
REQUESTS = [
    Request((index % 5,), tuple((index * 7 + step * step) % 5 for step in range(11)), str(index)) for index in range(24)
]


def by_block(request: Request, value) -> float:
    """The sum over blocks of a value of the enumerated conditionals of each."""
    text, total = (*request.context, *request.target), 0.0
    asked = BlockModel(MODEL, BlockDiffusion(SIZE), mask_id=VOCAB)
    for start, stop in ((1, 4), (4, 8), (8, 12)):
        total += value(conditionals(lambda ids: asked(ids)[..., :VOCAB], text[start:stop], VOCAB, context=text[:start]))
    return total


def test_the_bracket_holds_the_mixture_of_blocks() -> None:
    """tangent ≤ truth ≤ orders in the logarithm ≤ bound, summed over 24 texts; the ends are within their errors of the truth."""
    truth = sum(by_block(request, mixture_nll) for request in REQUESTS)
    loose = sum(by_block(request, bound_nll) for request in REQUESTS)
    orders = RandomOrders(exact_of(SIZE, "random"), block_size=SIZE, number=64)
    ends = []
    for witness in (Tangent(orders), Mixture(orders)):
        own = [-scores.logprobs.sum() for scores in witness.scores(REQUESTS)]
        ends.append(
            (sum(own), np.std([value - by_block(request, mixture_nll) for value, request in zip(own, REQUESTS)]))
        )
        assert witness.passes(11) == 64 * SIZE
    (low, low_spread), (high, high_spread) = ends
    assert low - 2 * low_spread * 24**0.5 < truth < high + 2 * high_spread * 24**0.5
    assert high < loose and truth - low < 0.3 * (loose - truth)


def test_every_sample_has_orders_of_its_own_and_tokens_add_up() -> None:
    """Errors over documents would not see an offset that orders in common give to all."""
    text = REQUESTS[3]
    orders = RandomOrders(exact_of(SIZE, "random"), block_size=SIZE, number=8)
    one, other = orders.score([text, Request(text.context, text.target, "another")])
    assert not np.allclose(one.sum(1), other.sum(1))
    (again,) = orders.score([text])
    assert np.allclose(one, again, atol=1e-5)
    assert orders.parts(text) == [slice(0, 3), slice(3, 7), slice(7, 11)]
    (found,) = Mixture(orders).scores([text])
    logprobs = np.stack([one[:, part].sum(1) for part in orders.parts(text)])
    expected = np.log(np.exp(logprobs).mean(1)).sum()
    assert found.logprobs.sum() == pytest.approx(expected, abs=1e-9)
