"""The checks pass what is right, and name with numbers what is not."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from megatron.errors import UserError
from megatron.testing import checks, oracles
from tests.evaluation import toy

MODEL = toy.ToyMaskedModel(vocab=4, length=4, seed=3)
TEXTS = [(1,), (2, 0), (3, 3, 1), (0, 1, 2, 3), (2, 2)]


def score_causal(model, texts) -> np.ndarray:
    return -oracles.causal_nll(model, texts, context=(1,))


def leaking(ids: torch.Tensor) -> torch.Tensor:
    """A causal model of which every row also sees the token that it predicts: a mask that is off by one."""
    plain = toy.ToyCausalModel(vocab=3)
    ahead = torch.nn.functional.one_hot(ids[:, 1:], 3).float()
    return plain(ids) + torch.cat((ahead, torch.zeros_like(ahead[:, :1])), 1)


def test_a_model_that_sees_its_label_does_not_sum_to_one() -> None:
    right = partial(score_causal, toy.ToyCausalModel(vocab=3))
    checks.check_sums_to_one(right, vocab_size=3, length=3, tolerance=1e-5)
    with pytest.raises(AssertionError, match=r"likelihoods of 27 texts sum to 1\.[1-9]\d*, not to 1 ± 1e-05"):
        checks.check_sums_to_one(partial(score_causal, leaking), vocab_size=3, length=3, tolerance=1e-5)
    with pytest.raises(AssertionError, match="sum to nan"):
        checks.check_sums_to_one(lambda texts: [float("nan")] * len(texts), vocab_size=3, length=2)


def test_an_order_that_looks_ahead_is_named() -> None:
    texts = oracles.all_texts(3, 3)
    checks.check_order_is_blind(lambda text: [[2], [0, 1]], texts)
    checks.check_order_is_blind(lambda text: [[2], [text[2] % 2], [1 - text[2] % 2]], texts)  # by what stands already
    with pytest.raises(AssertionError, match=r"with \{2: 0\} uncovered, positions \[0\] come next in .* and \[1\] in"):
        checks.check_order_is_blind(lambda text: [[2], [text[0] % 2], [1 - text[0] % 2]], texts)


def table(text) -> np.ndarray:
    return oracles.conditionals(MODEL, text, 4)


def drawn(text, *, scale: float = 1.0, count: int = 400) -> np.ndarray:
    """−log p in orders drawn at random: unbiased for the bound."""
    found = -oracles.by_order(table(text))
    return scale * np.random.default_rng(0).choice(found, count)


def test_a_bound_is_held_to_the_truth_and_to_its_expectation() -> None:
    texts, truth = [(0, 1, 2, 3), (3, 3, 0, 1)], lambda text: oracles.mixture_nll(table(text))
    expected = lambda text: oracles.bound_nll(table(text))  # noqa: E731
    checks.check_is_bound(drawn, texts, truth=truth, expected=expected)
    checks.check_is_bound(expected, texts, truth=truth, expected=expected)
    with pytest.raises(AssertionError, match=r"the bound is \d+\.\d+ ± 0\.\d+, below the exact"):
        checks.check_is_bound(partial(drawn, scale=0.5), texts, truth=truth)  # a weight that was forgotten
    with pytest.raises(AssertionError, match=r"and \d+\.\d+ in expectation"):
        checks.check_is_bound(partial(drawn, scale=1.5), texts, truth=truth, expected=expected)


def score_padded(texts, *, pad: int = 0, is_faulty: bool = True) -> list[float]:
    """All texts in one batch, padded on the right; the model sees the padding as tokens unless rows are run apart."""
    longest = max(map(len, texts)) if is_faulty else 0
    found = []
    for text in texts:
        row = torch.tensor([[*text, *[pad] * (longest - len(text))]])
        logprobs = MODEL(row)[0].double().log_softmax(-1)
        found.append(sum(float(logprobs[place, token]) for place, token in enumerate(text)))
    return found


def test_scores_that_depend_on_padding_are_caught() -> None:
    checks.check_scores_stand_alone({"plain": partial(score_padded, is_faulty=False)}, TEXTS)
    with pytest.raises(AssertionError, match=r"\(1,\) scores -\d\.\d+ alone and -\d\.\d+ together \(padded\): [+-]\d"):
        checks.check_scores_stand_alone({"padded": score_padded}, TEXTS)


def test_scores_that_depend_on_their_place_or_the_batch_size_are_caught() -> None:
    plain = partial(score_padded, is_faulty=False)
    swapped = lambda texts: sorted(plain(texts))  # noqa: E731 - results come back in another order than requests
    with pytest.raises(AssertionError, match="together"):
        checks.check_scores_stand_alone({"swapped": swapped}, TEXTS)
    halved = lambda texts: [value * 1.0001 for value in plain(texts)]  # noqa: E731
    with pytest.raises(AssertionError, match=r"\(batch of 8\)"):
        checks.check_scores_stand_alone({"batch of 1": plain, "batch of 8": halved}, TEXTS)


def noise_of(sample: int) -> np.ndarray:
    return np.random.default_rng([7, sample]).random(5)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda ids: np.stack([np.random.default_rng([7, place]).random(5) for place, _ in enumerate(ids)]), "one at"),
        (lambda ids: np.stack([noise_of(sample + ids[0]) for sample in ids]), "one at a time"),
        (lambda ids: np.random.default_rng().random((len(ids), 5)), "in a second call"),
        (lambda ids: np.ones((len(ids), 5)), "all of 8 samples have the same noise"),
        (lambda ids: (np.stack([noise_of(sample) for sample in ids]), np.ones(3)), "8 samples have 8, 3 rows"),
    ],
)
def test_noise_that_is_not_of_the_sample_is_caught(draw, words) -> None:
    with pytest.raises(AssertionError, match=words):
        checks.check_noise_is_of_the_sample(draw, range(8))
    checks.check_noise_is_of_the_sample(lambda ids: np.stack([noise_of(sample) for sample in ids]), range(8))


def step(world_size: int, *, reduce: str = "mean") -> dict[str, np.ndarray]:
    """One step on eight rows; each rank has the mean gradient of its own, and they are averaged, or summed by mistake."""
    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(3)
    for part in rows.chunk(world_size):
        weight = torch.ones(3, requires_grad=True)
        (part @ weight).square().mean().backward()
        total += weight.grad
    return {"gradient": (total / (world_size if reduce == "mean" else 1)).numpy()}


def test_a_gradient_scaled_by_the_world_size_is_caught() -> None:
    checks.check_gradient_scale(step)
    words = r"gradient is 2\.0000 times as large in layout 2 as in layout 1 \(norms"
    with pytest.raises(AssertionError, match=words):
        checks.check_gradient_scale(partial(step, reduce="sum"))
    tiny = lambda size: {"gradient": 1e-9 * np.ones(3) * size}  # noqa: E731 - small gradients hide nothing
    with pytest.raises(AssertionError, match="2\\.0000 times"):
        checks.check_gradient_scale(tiny)
    with pytest.raises(AssertionError, match=r"layout 2 has \[\], and 1 has \['gradient'\]"):
        checks.check_gradient_scale(lambda size: step(size) if size == 1 else {}, (1, 2))
    with pytest.raises(AssertionError, match=r"shape \(2,\) in layout 2 and \(1,\) in layout 1"):
        checks.check_gradient_scale(lambda size: {"loss": np.ones(size)}, (1, 2))


def test_what_compares_nothing_does_not_pass() -> None:
    """A scorer that loses texts, a walk that leaves tokens out or takes them twice, one layout, no scorer, too many texts."""
    with pytest.raises(AssertionError, match="4 texts have 3 scores"):
        checks.check_sums_to_one(lambda texts: [-1.386] * 3, vocab_size=2, length=2)
    lossy = {"alone": lambda texts: [0.0] * len(texts), "lossy": lambda texts: []}
    with pytest.raises(AssertionError, match="2 texts have 0 scores"):
        checks.check_scores_stand_alone(lossy, [(1,), (2,)])
    for walk in ([[0]], [[0], [0]], [[0, 1], [1]]):
        with pytest.raises(AssertionError, match="do not uncover each of its 2 tokens once"):
            checks.check_order_is_blind(lambda text, walk=walk: walk, [(0, 1), (1, 0)])
    with pytest.raises(UserError, match="give two or more"):
        checks.check_gradient_scale(lambda world: {"w": [1.0]}, (1,))
    with pytest.raises(
        UserError, match="give four indices or more"
    ):  # AssertionError: all of 1 samples have the same noise
        checks.check_noise_is_of_the_sample(lambda ids: np.random.default_rng(ids).random((1, 2)), [7])
    with pytest.raises(UserError, match="0 scorers"):
        checks.check_scores_stand_alone({}, [(1,)])
    with pytest.raises(UserError, match="at most 10,000,000 texts"):
        checks.check_sums_to_one(lambda texts: [0.0] * len(texts), vocab_size=50257, length=4)
