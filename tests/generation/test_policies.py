"""What a policy draws has an exact likelihood: it sums to one, is what is drawn, and sees no value that it is about to reveal."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from megatron.errors import UserError
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings
from megatron.generation.flags import POLICIES
from megatron.generation.policies import NEAR_TIE, first_ranked, near_ties
from megatron.generation.sampling import TokenSampling
from megatron.testing.checks import check_order_is_blind, check_sums_to_one
from megatron.testing.oracles import all_texts, by_order, chain_rule, conditionals
from tests.evaluation import toy
from tests.generation.test_diffusion import model_with_room

VOCAB, LENGTH = 5, 4
TEXTS = all_texts(VOCAB, LENGTH)
PLAIN = TokenSampling(temperature=1.0, seed=3)


class DoubleModel(toy.ToyMaskedModel):
    """In fp64, so that sums can be held to 1e-10."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.embedding, self.mix, self.head = self.embedding.double(), self.mix.double(), self.head.double()


@pytest.fixture(scope="module")
def model() -> DoubleModel:
    return DoubleModel(vocab=VOCAB, length=LENGTH, seed=2)


@pytest.fixture(scope="module")
def sampler(model) -> DiffusionSampler:
    return DiffusionSampler(model_with_room(model), mask_id=VOCAB)


def likelihoods(sampler: DiffusionSampler, settings: DiffusionSettings, texts=TEXTS) -> list[float]:
    masked = torch.ones(len(texts), len(texts[0]), dtype=torch.bool)
    return sampler.log_likelihoods(texts, masked, settings=settings).values.sum(-1).tolist()


WAYS = [
    {"tokens_per_step": 1},
    {"tokens_per_step": 2},
    {"tokens_per_step": 3},
    {"tokens_per_step": 4},
    {"block_length": 2},
    {"tokens_per_step": 2, "block_length": 2},
    {"tokens_per_step": 3, "block_length": 3},
    {"tokens_per_step": 2, "block_length": 3},
    {"guidance": 0.5},
    {"sampling": TokenSampling(temperature=0.7, top_k=3, seed=3)},
    {"sampling": TokenSampling(temperature=1.3, top_p=0.8, seed=3)},
]


@pytest.mark.parametrize("order", POLICIES)
def test_likelihoods_sum_to_one(sampler, order) -> None:
    for way in WAYS:
        settings = DiffusionSettings(order=order, **{"sampling": PLAIN, **way})
        score = partial(likelihoods, sampler, settings)
        check_sums_to_one(score, vocab_size=VOCAB, length=LENGTH)


@pytest.mark.parametrize("order", POLICIES)
def test_a_choice_sees_no_value_that_it_is_about_to_reveal(sampler, order) -> None:
    for way in WAYS:
        settings = DiffusionSettings(order=order, **{"sampling": PLAIN, **way})
        uncovered: list[torch.Tensor] = []
        watch = lambda step, seen=uncovered: seen.append(step.uncovered.clone())  # noqa: E731
        masked = torch.ones(len(TEXTS), LENGTH, dtype=torch.bool)
        sampler.log_likelihoods(TEXTS, masked, settings=settings, on_step=watch)
        steps = {text: [np.flatnonzero(step[row]).tolist() for step in uncovered] for row, text in enumerate(TEXTS)}
        check_order_is_blind(steps.__getitem__, TEXTS)


def test_a_policy_that_peeks_at_values_would_be_caught() -> None:
    """Ranking by the true token's probability gives no distribution, and another first choice for another text."""
    small = toy.ToyMaskedModel(vocab=3, length=3, seed=5)

    def peeking(texts) -> list[float]:
        return [by_order(conditionals(small, text, 3)).max() for text in texts]

    with pytest.raises(AssertionError, match=r"27 texts sum to 2\.08\d+, not to 1"):
        check_sums_to_one(peeking, vocab_size=3, length=3)
    orders = list(itertools.permutations(range(3)))

    def steps(text) -> list[list[int]]:
        best = by_order(conditionals(small, text, 3)).argmax()
        return [[position] for position in orders[best]]

    with pytest.raises(AssertionError, match=r"with nothing uncovered, positions .* the choice sees"):
        check_order_is_blind(steps, all_texts(3, 3))


def test_orders_that_are_known_equal_the_chain_rule(model, sampler) -> None:
    tables = [conditionals(model, text, VOCAB) for text in TEXTS[::50]]
    for order, places in (("left-to-right", range(LENGTH)), ("right-to-left", range(LENGTH)[::-1])):
        found = likelihoods(sampler, DiffusionSettings(order=order, sampling=PLAIN), TEXTS[::50])
        assert found == pytest.approx([chain_rule(table, places) for table in tables], abs=1e-10)


@pytest.mark.parametrize("order", POLICIES)
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"tokens_per_step": 2},
        {"block_length": 2},
        {"guidance": 0.5, "sampling": TokenSampling(temperature=0.7, seed=3)},
    ],
    ids=["1", "2", "blocks", "guided"],
)
def test_what_is_drawn_has_the_likelihood_that_is_said(order, way) -> None:
    """20,000 texts of each policy against its own exact distribution, chi-square."""
    network = DiffusionSampler(model_with_room(toy.ToyMaskedModel(vocab=3, length=3, seed=5)), mask_id=3)
    texts = all_texts(3, 3)
    settings = DiffusionSettings(order=order, order_number=4, **{"sampling": PLAIN, **way})
    number = 20_000
    exact = np.exp(likelihoods(network, settings, texts))
    counts = Counter(map(tuple, network.fill([[3] * 3] * number, settings=settings)))
    chi2 = sum((counts[text] - number * p) ** 2 / (number * p) for text, p in zip(texts, exact))
    assert chi2 < 54, "26 degrees of freedom: p > 0.001"


def test_of_equal_ranks_the_left_is_taken_and_none_that_may_not() -> None:
    ranks = torch.tensor([[1.0, 1.0, -torch.inf, -torch.inf, 5.0]])
    may = torch.tensor([[True, True, False, True, False]])
    assert first_ranked(ranks, may, torch.tensor([1])).tolist() == [[True, False, False, False, False]]
    assert first_ranked(ranks, may, torch.tensor([3])).tolist() == may.tolist()


def test_a_narrow_choice_is_counted() -> None:
    ranks = torch.tensor([[1.0, 1.0 - NEAR_TIE / 2, 0.0, -torch.inf], [1.0, 0.9, 0.9 + 3 * NEAR_TIE, 5.0]])
    may = torch.tensor([[True, True, True, True], [True, True, True, False]])
    for count, expected in ((1, [[True, False, False, False], [False] * 4]), (2, [[False] * 4] * 2)):
        taken = first_ranked(ranks, may, torch.tensor([count, count]))
        assert near_ties(ranks, may, taken).tolist() == expected
    assert not near_ties(ranks, may, may).any(), "where all are taken nothing was chosen"


def test_equal_predictions_are_near_ties_and_known_orders_have_none() -> None:
    flat = DiffusionSampler(lambda ids, *, positions: torch.zeros(int(positions.sum()), VOCAB + 1), mask_id=VOCAB)
    masked = torch.tensor([[False, True, True, True]])
    for order, expected in (("confidence", [False, True, True, False]), ("left-to-right", [False] * 4)):
        found = flat.log_likelihoods([(0, 1, 2, 3)], masked, settings=DiffusionSettings(order, sampling=PLAIN))
        assert found.near_ties.tolist() == [expected], "the last one is no choice"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"order": "ancestral", "sampling": PLAIN}, "ancestral"),
        ({"sampling": TokenSampling()}, "temperature 0"),
        ({"steps": 2, "tokens_per_step": 2, "sampling": PLAIN}, "tokens_per_step 2"),
    ],
)
def test_a_sampler_without_a_likelihood_is_refused(sampler, settings, named) -> None:
    with pytest.raises(UserError, match=named):
        likelihoods(sampler, DiffusionSettings(**settings))
