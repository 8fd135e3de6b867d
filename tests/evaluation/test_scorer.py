"""Scores depend on nothing but the request: not on batch mates, padding, chunks; cutting and windows; adaptive races."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial

import numpy as np
import pytest
import torch

from megatron.evaluation.adaptive import Question, RaceSettings, race, raced, undecided
from megatron.evaluation.estimators import make_estimator
from megatron.evaluation.requests import ResultCache, encode_pair, windows
from megatron.evaluation.scorer import CausalScorer, MaskedScorer, Request
from megatron.testing.checks import check_scores_stand_alone
from tests.evaluation import toy
from tests.generation.test_diffusion import model_with_room

MODEL = toy.ToyMaskedModel(vocab=9, length=14, seed=2)
CAUSAL = toy.ToyCausalModel(vocab=9)


def requests(number: int = 24, vocab: int = 9) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            tuple(rng.integers(0, vocab, rng.integers(1, 7))),
            tuple(rng.integers(0, vocab, rng.integers(1, 8))),
            f"q{i // 3}",
        )
        for i in range(number)
    ]


def masked(**options) -> MaskedScorer:
    return MaskedScorer(MODEL, mask_id=MODEL.mask_id, **{"max_length": 14, "batch_size": 16, **options})


@pytest.mark.parametrize(
    "name", ["exact-count", "exact-count-antithetic", "bernoulli", "left-to-right", "random-order"]
)
def test_masked_scores_do_not_depend_on_batching(name) -> None:
    estimator = make_estimator(name)
    items = {(*item.context, *item.target): item for item in requests()}
    passes: dict[tuple, set[int]] = defaultdict(set)

    def score(texts, batch_size: int, chunk_size: int) -> list[float]:
        scorer = masked(batch_size=batch_size, chunk_size=chunk_size)
        found = scorer.score([items[text] for text in texts], estimator, num_draws=6)
        for text, own in zip(texts, found):
            passes[text].add(own.num_passes)
        return [own.value for own in found]

    sizes = [(1, 1), (1, 64), (3, 1), (16, 7)]
    scorers = {
        f"{rows} rows, {chunk} a chunk": partial(score, batch_size=rows, chunk_size=chunk) for rows, chunk in sizes
    }
    check_scores_stand_alone(scorers, list(items))
    assert {len(counts) for counts in passes.values()} == {1}


def test_bidirectional_rows_are_never_padded() -> None:
    lengths: list[set[int]] = []

    def watch(input_ids, *, positions=None):
        lengths.append({input_ids.shape[1]})
        assert (input_ids <= MODEL.mask_id).all()
        return MODEL(input_ids, positions=positions)

    items = requests()
    MaskedScorer(watch, mask_id=MODEL.mask_id, max_length=14).score(items, make_estimator("exact-count"), num_draws=3)
    assert set.union(*lengths) == {len(item.context) + len(item.target) for item in items}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_causal_scores_do_not_depend_on_padding(batch_size) -> None:
    items = requests()
    scores = CausalScorer(CAUSAL, max_length=14, batch_size=batch_size).score(items)
    for item, score in zip(items, scores):
        row = torch.tensor([item.context + item.target])
        logprobs = torch.log_softmax(CAUSAL(row)[0].double(), -1)
        start = len(item.context) - 1
        plain = sum(float(logprobs[start + i, token]) for i, token in enumerate(item.target))
        assert score.value == pytest.approx(plain, abs=1e-5)
        best = logprobs.argmax(-1)[start : start + len(item.target)].tolist()
        assert score.is_greedy == (tuple(best) == item.target)


def test_a_pass_has_no_more_logits_than_fit_into_memory(monkeypatch) -> None:
    """However many rows and whoever asks: 32 windows of 2,048 targets would be 13 GB of logits."""
    monkeypatch.setattr("megatron.evaluation.scorer.MAX_SCORED_POSITIONS", 7)
    passes: list[int] = []

    def watched(model):
        def logits(input_ids, *, positions=None):
            passes.append(int(positions.sum()))
            return model(input_ids, positions=positions)

        return logits

    items = requests()
    denoiser = model_with_room(MODEL)
    causal, mdm = CausalScorer(CAUSAL, max_length=14), MaskedScorer(denoiser, mask_id=MODEL.mask_id, max_length=14)
    values, flags = causal.score(items), mdm.is_greedy(items)
    causal.logits_fn, mdm.logits_fn = watched(CAUSAL), watched(denoiser)
    assert [own.value for own in causal.score(items)] == pytest.approx([own.value for own in values], abs=1e-5)
    assert mdm.is_greedy(items) == flags
    assert 0 < max(passes) <= 7


class RememberingModel:
    """A causal model whose logits depend on all that it saw."""

    def __call__(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        seen = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).cumsum(-1)
        logits = torch.sin(seen[..., None] * torch.arange(1.0, 10.0))
        return logits if positions is None else logits[positions]


def test_over_long_contexts_lose_their_left_end() -> None:
    long = Request(tuple([1, 2] * 20), (3, 4, 5), "q")
    cut = Request(long.context[-11:], long.target, "q")
    estimator = make_estimator("exact-count")
    assert masked().score([long], estimator, num_draws=8) == masked().score([cut], estimator, num_draws=8)
    causal = CausalScorer(RememberingModel(), max_length=10)
    other = Request((8, *long.context[-7:]), long.target)  # whose first token is the last that is seen
    assert causal.score([long])[0].value != causal.score([other])[0].value
    # Ten inputs: the last target is none of them, so eight context tokens fit beside three targets.
    assert causal.score([long])[0].value == causal.score([Request(long.context[-8:], long.target)])[0].value


def test_windows_cover_every_target_once() -> None:
    target = list(range(100, 117))
    pieces = windows([1, 2, 3], target, row_length=6, key="k")
    assert [token for piece in pieces for token in piece.target] == target
    assert all(len(piece.context) + len(piece.target) <= 6 and piece.context for piece in pieces)
    assert pieces[0].context == (3,)
    assert pieces[-1] == Request((111, 112, 113, 114), (115, 116), "k#15")
    assert windows([1, 2, 3], [4, 5], row_length=6) == [Request((1, 2, 3), (4, 5))]
    assert windows(list(range(9)), [4, 5], row_length=6)[0].context == (5, 6, 7, 8)


def test_windows_equal_lm_eval_rolling() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for length in (1, 5, 7, 8, 15, 16, 30):
        tokens = list(range(length))
        theirs = [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(tokens, 99, 7, 1)]
        assert [(list(w.context), list(w.target)) for w in windows([99], tokens, row_length=8)] == theirs


def test_empty_and_over_long_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="a target of"):
        masked().score([Request((1,), ())], make_estimator("exact-count"), num_draws=2)
    with pytest.raises(ValueError, match="windows"):
        masked().score([Request((1,), (1,) * 15)], make_estimator("exact-count"), num_draws=2)
    with pytest.raises(ValueError, match="EOD"):
        CausalScorer(CAUSAL, max_length=5).score([Request((), (1,))])


def test_encode_pair_moves_spaces_and_survives_merges() -> None:
    def encode(text: str) -> list[int]:
        return [sum(map(ord, word)) for word in text.split("|")]

    context, continuation = encode_pair(encode, "a|b ", "|c|d")
    assert (context, continuation) == (encode("a|b"), encode("a|b |c|d")[2:])
    assert encode_pair(encode, "a|b", "c") == (encode("a|b"), encode("c"))  # merged into one word: encoded apart


def test_greedy_flag_is_confidence_decoding() -> None:
    for context in [(1, 2), (5,), (3, 3, 3)]:
        for length in (1, 3, 5):
            tokens, masked_left = [*context, *[9] * length], set(range(length))
            while masked_left:
                logprobs = torch.log_softmax(MODEL(torch.tensor([tokens]))[0].double(), -1)
                best = max(masked_left, key=lambda i: float(logprobs[len(context) + i].max()))
                tokens[len(context) + best] = int(logprobs[len(context) + best].argmax())
                masked_left.discard(best)
            decoded = tuple(tokens[len(context) :])
            wrong = (*decoded[:-1], (decoded[-1] + 1) % 9)
            scorer = MaskedScorer(with_mask_logit, mask_id=9, max_length=14, batch_size=2)
            assert scorer.is_greedy([Request(context, decoded), Request(context, wrong)]) == [True, False]


def with_mask_logit(input_ids, *, positions=None):
    logits = MODEL(input_ids, positions=positions)
    return torch.cat((logits, torch.full((*logits.shape[:-1], 1), 9.0)), -1)


def questions(number: int = 40) -> list[Question]:
    rng = np.random.default_rng(3)
    return [
        Question(
            tuple(Request((int(rng.integers(9)),), tuple(rng.integers(0, 9, 6)), f"q{i}") for _ in range(3)),
            (5.0, 6.0, 7.0),
        )
        for i in range(number)
    ]


def test_race_ranks_like_many_draws_and_stops_early() -> None:
    estimator, items = make_estimator("exact-count"), questions()
    truth = [masked().score(q.choices, make_estimator("exact-count"), num_draws=512) for q in items]
    tallies = race(masked(), items, estimator, settings=RaceSettings(first_draws=4, max_draws=128))
    agree = sum(
        int(np.argmax([t.value for t in best])) == int(np.argmax([t.values.mean() for t in own]))
        for best, own in zip(truth, tallies)
    )
    draws = [len(tally.values) for own in tallies for tally in own]
    assert agree >= 38
    assert np.mean(draws) < 64
    assert min(draws) == 4
    assert max(draws) <= 128


def test_a_race_keeps_to_its_budget_and_labels_what_it_drew() -> None:
    twins = Question(tuple(Request((1,), (2, 3, 4, 5, 6), "q") for _ in range(2)))  # never decided
    ((one, two),) = race(masked(), [twins], make_estimator("exact-count"), settings=RaceSettings(4, 6))
    assert len(one.values) == len(two.values) == 6 and undecided(twins, [one, two], z=2.0) == {0, 1}
    assert raced(one).kind == "ranking" and math.isnan(raced(one).standard_error)
    short = Question(tuple(Request((1,), (token, 2), "q") for token in (3, 4)))
    (tallies,) = race(masked(), [short], make_estimator("exact-count"), settings=RaceSettings(4, 6))
    for tally in tallies:  # all masks
        assert raced(tally).kind == "bound" and raced(tally).standard_error == 0


def test_race_does_not_depend_on_other_questions() -> None:
    estimator, items = make_estimator("exact-count"), questions(12)
    settings = RaceSettings(first_draws=4, max_draws=32)
    together = race(masked(chunk_size=5), items, estimator, settings=settings)
    for question, own in zip(items, together):
        (alone,) = race(masked(batch_size=1), [question], estimator, settings=settings)
        assert [len(t.values) for t in alone] == [len(t.values) for t in own]
        assert [t.estimate().value for t in alone] == pytest.approx([t.estimate().value for t in own], abs=1e-5)


def test_single_token_answers_need_one_pass() -> None:
    question = Question(tuple(Request((1, 2), (token,), "q") for token in range(4)))
    ((*tallies,),) = race(masked(), [question], make_estimator("exact-count"), settings=RaceSettings())
    assert [tally.num_passes for tally in tallies] == [1, 1, 1, 1]
    assert all(tally.estimate().standard_error == 0 for tally in tallies)
    assert undecided(question, tallies, z=100.0) == set()


def test_common_random_numbers_share_masks_and_shrink_differences() -> None:
    """Answers that differ in one token: the error of the difference falls when the masks are shared."""
    base = (1, 2, 3, 4, 5, 6)
    estimator, spread = make_estimator("exact-count"), {}
    for shared in (True, False):
        differences = []
        for trial in range(60):
            keys = (f"t{trial}", f"t{trial}" if shared else f"u{trial}")
            pair = [Request((2,), base, keys[0]), Request((2,), (*base[:5], 0), keys[1])]
            one, two = masked().score(pair, estimator, num_draws=8)
            differences.append(one.value - two.value)
        spread[shared] = np.var(differences)
    assert spread[True] < 0.7 * spread[False]


def test_estimates_say_what_they_are() -> None:
    (bound,) = masked().score([Request((1,), (2, 3, 4, 5, 6), "q")], make_estimator("exact-count"), num_draws=8)
    assert "bound: exact-count, stratified, 8 draws" in str(bound)
    assert "±" in str(bound)
    (single,) = masked().score([Request((1,), (2, 3, 4, 5, 6), "q")], make_estimator("exact-count"), num_draws=1)
    assert math.isnan(single.standard_error)


def test_race_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="num-mc"):
        RaceSettings(first_draws=4, max_draws=2)


def test_cache_survives_a_killed_process(tmp_path) -> None:
    cache = ResultCache(tmp_path, fingerprint="a", rank=0)
    key = cache.key("loglikelihood", "context", " answer")
    cache.put(key, [-1.5, True])
    with open(tmp_path / "results-00000.jsonl", "a") as file:
        file.write('{"key": "half a li')
    again = ResultCache(tmp_path, fingerprint="a", rank=1)
    assert again.get(key) == [-1.5, True]
    assert (
        ResultCache(tmp_path, fingerprint="b").get(
            ResultCache(tmp_path, fingerprint="b").key("loglikelihood", "context", " answer")
        )
        is None
    )
