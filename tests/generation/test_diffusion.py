"""Masked diffusion sampling: against a naive reference, given tokens, blocks, guidance, seeds, distributions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings, Step
from megatron.generation.flags import ORDERS
from megatron.generation.sampling import TokenSampling
from megatron.testing.oracles import all_texts, by_order, conditionals
from tests.evaluation import toy

VOCAB, LENGTH = 7, 10
MASK = VOCAB


@pytest.fixture(scope="module")
def model() -> toy.ToyMaskedModel:
    return toy.ToyMaskedModel(vocab=VOCAB, length=LENGTH, seed=3)


def sampler_of(model: toy.ToyMaskedModel) -> DiffusionSampler:
    return DiffusionSampler(PadVocabulary(model), mask_id=MASK, forbidden=[VOCAB + 1])


class PadVocabulary:
    """Adds logits of the mask token and of a padding row, both tempting: neither may ever be drawn."""

    def __init__(self, model: toy.ToyMaskedModel) -> None:
        self.model, self.calls = model, 0

    def __call__(self, input_ids, *, positions=None):
        self.calls += 1
        logits = self.model(input_ids, positions=positions)
        return torch.cat((logits, torch.full((*logits.shape[:-1], 2), 50.0)), -1)


def naive_confidence(model, row: list[int], block_length: int | None = None) -> list[int]:
    """One token a pass, the most probable one, in plain Python."""
    row = list(row)
    gaps = [i for i, token in enumerate(row) if token == MASK]
    size = block_length or max(len(gaps), 1)
    for start in range(0, len(gaps), size):
        block = set(gaps[start : start + size])
        while block:
            logits = model(torch.tensor([row]))[0].double()
            best = None
            for position in sorted(block):
                exps = [math.exp(v) for v in logits[position].tolist()]
                token = max(range(VOCAB), key=lambda t: exps[t])
                probability = exps[token] / sum(exps)
                if best is None or probability > best[0]:
                    best = (probability, position, token)
            row[best[1]] = best[2]
            block.discard(best[1])
    return row


ROWS = [
    [3, *([MASK] * 9)],
    [MASK, 2, MASK, MASK, 5, MASK, 0, MASK, MASK, 1],
    [*([MASK] * 8), 6, 6],
    [1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
]


@pytest.mark.parametrize("block_length", [None, 1, 3, 4])
def test_greedy_confidence_equals_the_naive_reference(model, block_length) -> None:
    settings = DiffusionSettings(block_length=block_length)
    filled = sampler_of(model).fill(ROWS, settings=settings)
    assert filled == [naive_confidence(model, row, block_length) for row in ROWS]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("steps", "block_length", "temperature"), [(None, None, 0.0), (4, None, 1.0), (5, 4, 0.7)])
def test_given_tokens_stay_and_all_gaps_are_filled(model, order, steps, block_length, temperature) -> None:
    sampling = TokenSampling(temperature=temperature, seed=8)
    settings = DiffusionSettings(order=order, steps=steps, block_length=block_length, sampling=sampling, guidance=0.5)
    filled = sampler_of(model).fill(ROWS, settings=settings)
    for before, after in zip(ROWS, filled):
        assert all(b in (a, MASK) for a, b in zip(after, before)), "a given token changed"
        assert all(0 <= token < VOCAB for token in after), "a mask or padding token was drawn"
    assert filled == sampler_of(model).fill(ROWS, settings=settings), "not deterministic"
    alone = [sampler_of(model).fill([row], settings=settings, sample_numbers=[i])[0] for i, row in enumerate(ROWS)]
    if order != "ancestral" and block_length is None and steps is None:
        assert alone == filled, "depends on batch mates"


def test_seeds_differ(model) -> None:
    def run(seed):
        sampling = TokenSampling(temperature=1.0, seed=seed)
        return sampler_of(model).fill([[MASK] * 10] * 4, settings=DiffusionSettings(order="random", sampling=sampling))

    assert run(1) != run(2)
    assert len({tuple(row) for row in run(1)}) > 1, "rows of one call must have their own streams"


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "ancestral"])
def test_steps_bound_the_passes_and_blocks_go_left_to_right(model, order) -> None:
    network = PadVocabulary(model)
    steps: list[Step] = []
    seen: list[torch.Tensor] = []

    def watch(step: Step) -> None:
        steps.append(step)
        seen.append(step.uncovered.clone())

    sampler = DiffusionSampler(network, mask_id=MASK, forbidden=[VOCAB + 1])
    sampler.fill([[MASK] * 10], settings=DiffusionSettings(order=order, steps=5, block_length=5), on_step=watch)
    assert network.calls == 5
    assert [int(u.sum()) for u in seen] == [2, 2, 1, 3, 2]  # 3 passes for the first block, 2 for the second
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert not torch.stack(seen[:3]).any(0)[0, 5:].any()
    assert torch.stack(seen).sum(0).eq(1).all(), "every token is uncovered once"


def test_margin_and_entropy_pick_what_they_say(model) -> None:
    logprobs = torch.log_softmax(model(torch.tensor([[MASK] * 10]))[0].double(), -1)
    best = logprobs.exp().topk(2, -1).values
    wanted = {
        "confidence": int(best[:, 0].argmax()),
        "margin": int((best[:, 0] - best[:, 1]).argmax()),
        "entropy": int((logprobs.exp() * logprobs).sum(-1).argmax()),
    }
    for order, position in wanted.items():
        first: list[torch.Tensor] = []
        sampler_of(model).fill(
            [[MASK] * 10],
            settings=DiffusionSettings(order=order),
            on_step=lambda s, first=first: first.append(s.uncovered.clone()),
        )
        assert first[0].nonzero()[:, 1].tolist() == [position], order


def test_random_order_at_temperature_one_samples_the_any_order_model() -> None:
    """Frequencies of 3-token samples against the mean over orders of the chain rule, enumerated."""
    model = toy.ToyMaskedModel(vocab=3, length=3, seed=5)
    sampler = DiffusionSampler(model_with_room(model), mask_id=3)
    number = 2000
    settings = {
        "random": DiffusionSettings(order="random", sampling=TokenSampling(temperature=1.0, seed=1)),
        "ancestral": DiffusionSettings(order="ancestral", steps=40, sampling=TokenSampling(temperature=1.0, seed=2)),
    }
    truth = {target: np.exp(by_order(conditionals(model, target, 3))).mean() for target in all_texts(3, 3)}
    assert sum(truth.values()) == pytest.approx(1.0)
    for name, setting in settings.items():
        counts = Counter(tuple(row) for row in sampler.fill([[3, 3, 3]] * number, settings=setting))
        chi2 = sum((counts[t] - number * p) ** 2 / (number * p) for t, p in truth.items())
        # 26 degrees of freedom: mean 26, 99.9 % quantile 54. 40 ancestral steps uncover two tokens at once in 7 % of
        # the samples, which adds a little.
        assert chi2 < 54, f"{name}: chi2 {chi2:.1f}"


def model_with_room(model):
    """Adds the mask token's logit (never drawn)."""

    def logits_fn(input_ids, *, positions=None):
        logits = model(input_ids, positions=positions)
        return torch.cat((logits, torch.zeros(*logits.shape[:-1], 1)), -1)

    return logits_fn


def test_guidance_moves_away_from_the_unconditional(model) -> None:
    """One gap, greedy: the guided choice is the argmax of l_u + (1+w)(l_c - l_u)."""
    row = [0, 1, 2, 3, MASK, 5, 6, 0, 1, 2]
    conditional = model(torch.tensor([row]))[0, 4]
    without = model(torch.tensor([[MASK] * 10]))[0, 4]
    for weight in (0.0, 1.0, 4.0, -1.0):
        (filled,) = sampler_of(model).fill([row], settings=DiffusionSettings(guidance=weight))
        assert filled[4] == int((without + (1 + weight) * (conditional - without)).argmax())


def test_stop_leaves_the_rest_masked(model) -> None:
    settings = DiffusionSettings(block_length=2)
    rows = sampler_of(model).fill(
        [[1, *([MASK] * 9)], [2, *([MASK] * 9)]],
        settings=settings,
        stop=lambda row, prefix: row == 0 and len(prefix) >= 5,
    )
    assert rows[0].count(MASK) == 5
    assert MASK not in rows[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "best"}, "confidence"),
        ({"steps": 0}, "steps 0"),
        ({"block_length": -1}, "block_length"),
    ],
)
def test_wrong_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionSettings(**settings)


def test_wrong_rows_are_refused(model) -> None:
    with pytest.raises(ValueError, match="equal length"):
        sampler_of(model).fill([[MASK], [MASK, MASK]], settings=DiffusionSettings())
    with pytest.raises(ValueError, match="block"):
        sampler_of(model).fill([[MASK] * 10], settings=DiffusionSettings(steps=2, block_length=2))


@pytest.mark.parametrize("order", ORDERS)
def test_rows_with_gaps_do_not_depend_on_their_batch_mates(model, order) -> None:
    """Also where steps and blocks are shared out: rows with other numbers of gaps are other batches."""
    from megatron.generation.text import fill_gaps
    from tests.generation.test_autoregressive import Letters

    rows = [*ROWS, [MASK, 1, MASK, 2, 3, 4, 5, 6, MASK, MASK]]
    for steps, block_length in ((None, None), (5, 4), (3, None)):
        sampling = TokenSampling(temperature=1.0, seed=8)
        settings = DiffusionSettings(order=order, steps=steps, block_length=block_length, sampling=sampling)
        results = [
            [c.tokens for c in fill_gaps(sampler_of(model), Letters(), rows, settings=settings, batch_size=size)]
            for size in (1, 2, 8)
        ]
        assert results[0] == results[1] == results[2]
