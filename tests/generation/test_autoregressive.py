"""Autoregressive sampling: greedy against a plain loop, batches of unequal prompts, filters, seeds, stops."""

from __future__ import annotations

import pytest
import torch

from megatron.generation.autoregressive import generate_autoregressive
from megatron.generation.sampling import TokenSampling, draw_tokens, filter_logits
from megatron.generation.text import cut_at_stop, encode_with_gaps, finish, has_stopped, text_with_gaps
from tests.evaluation import toy
from tests.generation.uncached import UncachedDecoder

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3]]


@pytest.fixture(scope="module")
def model() -> toy.ToyCausalModel:
    return toy.ToyCausalModel()


def run(model, prompts=PROMPTS, *, new: int = 8, **options):
    sampling = TokenSampling(**{k: options.pop(k) for k in ("temperature", "top_k", "top_p", "seed") if k in options})
    return generate_autoregressive(UncachedDecoder(model), prompts, max_new_tokens=new, sampling=sampling, **options)


def test_greedy_equals_a_plain_loop(model) -> None:
    for prompt, new in zip(PROMPTS, run(model)):
        row = list(prompt)
        for _ in range(8):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        assert new == row[len(prompt) :]


def test_sampling_is_the_same_alone_and_in_a_batch(model) -> None:
    together = run(model, temperature=1.0, seed=4)
    alone = [run(model, [prompt], temperature=1.0, seed=4, sample_numbers=[i])[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together[0] != together[3], "equal prompts have their own streams"
    assert together != run(model, temperature=1.0, seed=5)


def test_forbidden_and_stop(model) -> None:
    first = run(model)[0][0]
    assert all(first not in new for new in run(model, forbidden=[first]))
    stopped = run(model, stop=lambda row, new: row == 1 and len(new) == 3)
    assert [len(new) for new in stopped] == [8, 3, 8, 8]


def test_filters() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]))
    kept = filter_logits(logits, top_k=2, top_p=1.0).isfinite()
    assert kept.sum(-1).tolist() == [2, 2]
    assert kept[0].tolist() == [True, True, False, False]
    assert bool(kept[1, 3])
    assert filter_logits(logits, top_k=0, top_p=0.6).isfinite().sum(-1).tolist() == [2, 1]
    assert filter_logits(logits, top_k=0, top_p=1e-6).isfinite().sum(-1).tolist() == [1, 1]


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniforms = torch.rand(20000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = draw_tokens(probs.log().expand(20000, 4), TokenSampling(temperature=1.0), uniforms)
    assert torch.allclose(tokens.bincount(minlength=4) / 20000, probs, atol=0.012)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("seed", -1),
    ],
)
def test_wrong_sampling_is_refused(field, value) -> None:
    with pytest.raises(ValueError, match=field):
        TokenSampling(**{field: value})


def test_empty_prompt_is_refused(model) -> None:
    with pytest.raises(ValueError, match="EOD"):
        run(model, [[1], []])


class Letters:
    """a=0, b=1, ...; z ends the document."""

    eod_id = 25

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_text_helpers() -> None:
    letters = Letters()
    assert encode_with_gaps(letters, "ab[MASK:3]c[MASK]", mask_id=99) == [0, 1, 99, 99, 99, 2, 99]
    assert encode_with_gaps(letters, "[MASK:2]d", mask_id=99) == [99, 99, 3]
    assert cut_at_stop("one. two\nthree", ["\n", ". "]) == "one"
    assert cut_at_stop("one", ["", "x"]) == "one"
    assert has_stopped(letters, [1, 25], [])
    assert has_stopped(letters, [1, 2, 3], ["cd"])
    assert not has_stopped(letters, [1, 2, 3], ["dc"])
    assert finish(letters, [0, 1, 2, 25, 4], ["c"]) == "ab"


def test_text_with_gaps_cuts_gaps_and_keeps_the_rest() -> None:
    letters, end = Letters(), Letters.eod_id
    tokens = [end, 0, 1, end, 2, 3, end, 4]  # given: EOD, a, b; gap: EOD, c; given: d, EOD, e
    is_gap = [False, False, False, True, True, False, False, False]
    assert text_with_gaps(letters, tokens, is_gap) == "ab" + "d" + "z" + "e"
    assert text_with_gaps(letters, [0, 1, 2, 3], [False, True, True, False], stop_strings=["c", "a"]) == "abd"
    assert text_with_gaps(letters, [0, 1, 2], [True, True, False]) == "abc"
    assert text_with_gaps(letters, [end, end, 2], [False, True, False]) == "c"

    class Words(Letters):
        """As SentencePiece: the space before the first word is not shown."""

        def decode(self, ids: list[int]) -> str:
            return " ".join(chr(97 + i) for i in ids)

    assert text_with_gaps(Words(), [0, 1, end, 3], [False, True, True, False]) == "a b d"
