"""Uniform-state samplers: their own distribution, given tokens, streams of their own, and what they refuse."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from megatron.errors import UserError
from megatron.generation.diffusion import DiffusionSettings, Step
from megatron.generation.sampling import TokenSampling
from megatron.generation.uniform import UniformSampler, reverse_probs
from tests.evaluation import toy
from tests.evaluation.uniform_chain import LENGTH, STATES, VOCAB, ancestral_distribution

WANTED = UniformSampler.mask_id


class PadVocabulary:
    """Adds logits of a padding row, which is tempting and may never be drawn; no model may see a placeholder."""

    def __init__(self, model: toy.ToyMaskedModel) -> None:
        self.model = model

    def __call__(self, input_ids, *, positions=None):
        assert input_ids.min() >= 0 and input_ids.max() < self.model.vocab
        logits = self.model(input_ids, positions=positions)
        return torch.cat((logits, torch.full((*logits.shape[:-1], 2), 50.0)), -1)


def sampler(vocab: int = 7, length: int = 10) -> UniformSampler:
    return UniformSampler(PadVocabulary(toy.ToyMaskedModel(vocab=vocab, length=length, seed=3)), vocab_size=vocab)


def drawn(temperature: float = 1.0, seed: int = 8, **options) -> DiffusionSettings:
    return DiffusionSettings(sampling=TokenSampling(temperature=temperature, seed=seed), **options)


ROWS = [
    [3, *([WANTED] * 9)],
    [WANTED, 2, WANTED, WANTED, 5, WANTED, 0, WANTED, WANTED, 1],
    [1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
]
ALL_SETTINGS = [
    drawn(),
    drawn(0.0),
    drawn(0.7, steps=3),
    drawn(0.0, steps=1),
    drawn(1.0, order="ancestral", tokens_per_step=2),
    drawn(0.0, order="ancestral"),
    drawn(0.0, order="left-to-right"),
    drawn(0.0, order="entropy-reversed"),
]


@pytest.mark.parametrize(
    "settings", ALL_SETTINGS, ids=lambda own: f"{own.order}-{own.sampling.temperature:g}-{own.steps}"
)
def test_given_tokens_stay_and_rows_are_their_own(settings) -> None:
    filled = sampler().fill(ROWS, settings=settings)
    for before, after in zip(ROWS, filled):
        assert all(b in (a, WANTED) for a, b in zip(after, before)), "a given token changed"
        assert all(0 <= token < 7 for token in after), "a placeholder or a padding token was drawn"
    assert filled == sampler().fill(ROWS, settings=settings), "not deterministic"
    if settings.steps is not None:
        alone = [sampler().fill([row], settings=settings, sample_numbers=[i])[0] for i, row in enumerate(ROWS)]
        assert alone == filled, "depends on batch mates"


def test_seeds_and_rows_differ() -> None:
    rows = [[WANTED] * 10] * 4
    one, other = (sampler().fill(rows, settings=drawn(seed=seed)) for seed in (1, 2))
    assert one != other and len({tuple(row) for row in one}) > 1


def test_greedy_takes_the_likeliest_tokens_in_the_end() -> None:
    """Every token is the model's first choice given the row before, in which all but the least sure were settled."""
    own, steps = sampler(), list[Step]()
    (row,) = own.fill([[4, *([WANTED] * 9)]], settings=drawn(0.0, steps=5), on_step=steps.append)
    before = steps[-2].tokens
    best = own.logits_fn(before)[0, :, :7].argmax(-1).tolist()
    assert row == [4, *best[1:]]
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert not any(step.uncovered[0, 0] for step in steps)


def test_a_greedy_random_order_is_random_by_seed_and_row() -> None:
    def settled(row: int, **options) -> list[bool]:
        """Which places hold their likeliest token half way, and no noise any more."""
        seen: list[Step] = []
        sampler().fill(
            [[WANTED] * 10], settings=drawn(0.0, steps=2, **options), on_step=seen.append, sample_numbers=[row]
        )
        noise: list[Step] = []
        sampler().fill(
            [[WANTED] * 10], settings=drawn(0.0, steps=10, **options), on_step=noise.append, sample_numbers=[row]
        )
        return (seen[0].tokens != noise[0].tokens)[0].tolist()

    ways = {tuple(settled(row, order="random")) for row in range(4)}
    assert len(ways) == 4 and any(any(way[5:]) for way in ways)
    assert not any(settled(0, order="left-to-right")[5:])
    assert settled(0, order="random", order_number=3) != settled(0, order="random")


def test_reverse_probabilities_are_two_factors_that_sum_to_the_forward_ones() -> None:
    """q(z_t | z_s) · q(z_s | x) with p_θ in the place of x; their sum over z_s is q(z_t | x)."""
    random = np.random.default_rng(0)
    probs = random.dirichlet(np.ones(6), size=6)
    now, later, size = 0.3, 0.45, 6
    for z in range(size):
        found = reverse_probs(torch.from_numpy(probs[z : z + 1]), torch.tensor([z]), (now, later))[0].numpy()
        same = np.arange(size) == z
        wanted = (now / later * same + (1 - now / later) / size) * (later * probs[z] + (1 - later) / size)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        assert found.sum() == pytest.approx(now * probs[z, z] + (1 - now) / size)


@pytest.mark.parametrize("steps", [1, 6])
def test_samples_follow_the_enumerated_chain(steps) -> None:
    """20,000 rows against the distribution of the Markov chain over all 625 of them: chi-square, p > 0.001."""
    model = toy.ToyMaskedModel(vocab=VOCAB, length=LENGTH, seed=3)
    expected = 20_000 * ancestral_distribution(model, steps)
    own = UniformSampler(model, vocab_size=VOCAB)
    settings = drawn(seed=11, steps=steps)
    rows = own.fill([[WANTED] * LENGTH] * 20_000, settings=settings)
    counts = Counter(map(tuple, rows))
    observed = np.array([counts[tuple(state)] for state in STATES.tolist()])
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    statistic, degrees = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert degrees > 100 and chi2.sf(statistic, degrees) > 0.001, (statistic, degrees)
    uniform = 20_000 / 625
    assert ((np.array([counts[tuple(s)] for s in STATES.tolist()]) - uniform) ** 2 / uniform).sum() > 10 * degrees


@pytest.mark.parametrize(
    ("options", "message"),
    [({"block_length": 2}, "block_length 2"), ({"guidance": 1.0}, "guidance"), ({"order": "entropy"}, "order entropy")],
)
def test_what_only_masks_can_do_is_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        sampler().fill(ROWS, settings=drawn(**options))


def test_temperature_near_zero_is_the_ancestral_walk_of_first_choices() -> None:
    one, other = (sampler().fill(ROWS, settings=drawn(t, order="ancestral", steps=4)) for t in (0.0, 1e-9))
    assert one == other and math.isfinite(sum(map(sum, one)))
