"""What a policy draws has an exact likelihood: it sums to one, is what is drawn, and sees no value that it is about to reveal."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from megatron.errors import UserError
from megatron.generation import diffusion
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings
from megatron.generation.flags import POLICIES
from megatron.generation.policies import first_ranked
from megatron.generation.sampling import TokenSampling
from tests.evaluation import toy
from tests.generation.test_diffusion import model_with_room

VOCAB, LENGTH = 5, 4
TEXTS = list(itertools.product(range(VOCAB), repeat=LENGTH))
PLAIN = TokenSampling(temperature=1.0, seed=3)


class DoubleModel(toy.ToyMaskedModel):
    """In fp64, so that sums can be held to 1e-10."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.embedding, self.mix, self.head = self.embedding.double(), self.mix.double(), self.head.double()


@pytest.fixture(scope="module")
def sampler() -> DiffusionSampler:
    return DiffusionSampler(model_with_room(DoubleModel(vocab=VOCAB, length=LENGTH, seed=2)), mask_id=VOCAB)


def likelihoods(sampler: DiffusionSampler, settings: DiffusionSettings, texts=TEXTS) -> list[float]:
    masked = torch.ones(len(texts), LENGTH, dtype=torch.bool)
    return sampler.log_likelihoods(texts, masked, settings=settings).sum(-1).tolist()


WAYS = [
    {"tokens_per_step": 1},
    {"tokens_per_step": 2},
    {"tokens_per_step": 3},
    {"tokens_per_step": 4},
    {"block_length": 2},
    {"tokens_per_step": 2, "block_length": 3},
    {"guidance": 0.5},
    {"sampling": TokenSampling(temperature=0.7, top_k=3, seed=3)},
    {"sampling": TokenSampling(temperature=1.3, top_p=0.8, seed=3)},
]


@pytest.mark.parametrize("order", POLICIES)
def test_likelihoods_sum_to_one(sampler, order) -> None:
    for way in WAYS:
        settings = DiffusionSettings(order=order, **{"sampling": PLAIN, **way})
        assert math.fsum(map(math.exp, likelihoods(sampler, settings))) == pytest.approx(1.0, abs=1e-10), way


def test_a_policy_that_peeks_at_values_would_be_caught(sampler, monkeypatch) -> None:
    """Ranking by the true token's probability gives no distribution; the first choice of ours is the same for all texts."""
    small = toy.ToyMaskedModel(vocab=3, length=3, seed=5)
    orders = list(itertools.permutations(range(3)))
    texts = list(itertools.product(range(3), repeat=3))
    peeking = [max(toy.chain_rule(small, (), text, order) for order in orders) for text in texts]
    assert math.fsum(map(math.exp, peeking)) > 1.01
    seen = []
    original = diffusion.sureness
    monkeypatch.setattr(diffusion, "sureness", lambda order, logits: seen.append(logits) or original(order, logits))
    for text in (TEXTS[0], TEXTS[-1]):
        likelihoods(sampler, DiffusionSettings(order="confidence", sampling=PLAIN), [text])
    assert torch.equal(seen[0], seen[LENGTH])


def test_orders_that_are_known_equal_the_chain_rule(sampler) -> None:
    model = sampler.logits_fn.__closure__[0].cell_contents
    for order, places in (("left-to-right", range(LENGTH)), ("right-to-left", reversed(range(LENGTH)))):
        found = likelihoods(sampler, DiffusionSettings(order=order, sampling=PLAIN), TEXTS[::50])
        places = list(places)
        assert found == pytest.approx([toy.chain_rule(model, (), text, places) for text in TEXTS[::50]], abs=1e-10)


@pytest.mark.parametrize("order", POLICIES)
@pytest.mark.parametrize("way", [{}, {"tokens_per_step": 2}, {"block_length": 2}], ids=["1", "2", "blocks"])
def test_what_is_drawn_has_the_likelihood_that_is_said(order, way) -> None:
    """20,000 texts of each policy against its own exact distribution, chi-square."""
    network = DiffusionSampler(model_with_room(toy.ToyMaskedModel(vocab=3, length=3, seed=5)), mask_id=3)
    texts = list(itertools.product(range(3), repeat=3))
    settings = DiffusionSettings(order=order, sampling=PLAIN, order_number=4, **way)
    number = 20_000
    masked = torch.ones(len(texts), 3, dtype=torch.bool)
    exact = network.log_likelihoods(texts, masked, settings=settings).sum(-1).exp().tolist()
    counts = Counter(map(tuple, network.fill([[3] * 3] * number, settings=settings)))
    chi2 = sum((counts[text] - number * p) ** 2 / (number * p) for text, p in zip(texts, exact))
    assert chi2 < 54, "26 degrees of freedom: p > 0.001"


def test_of_equal_ranks_the_left_is_taken_and_none_that_may_not() -> None:
    ranks = torch.tensor([[1.0, 1.0, -torch.inf, -torch.inf, 5.0]])
    may = torch.tensor([[True, True, False, True, False]])
    assert first_ranked(ranks, may, torch.tensor([1])).tolist() == [[True, False, False, False, False]]
    assert first_ranked(ranks, may, torch.tensor([3])).tolist() == may.tolist()


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
