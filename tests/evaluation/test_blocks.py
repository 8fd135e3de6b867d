"""Scores of models of blocks: bounds against enumeration, independence of batch and order, every way to ask for them."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from megatron.commands import compare_estimators
from megatron.commands.likelihood import main
from megatron.errors import UserError
from megatron.evaluation.blocks import BlockScorer, ByBlocks
from megatron.evaluation.estimators import EnumeratedBound, LeftToRight, MaskedBound, make_estimator
from megatron.evaluation.exact import PolicyScorer
from megatron.evaluation.likelihood import log_likelihood
from megatron.evaluation.names import ESTIMATORS
from megatron.evaluation.scorer import MaskedScorer, Request
from megatron.generation.command import complete
from megatron.generation.diffusion import DiffusionSettings
from megatron.generation.sampling import TokenSampling
from megatron.inference.blocks import BlockModel
from megatron.inference.model import load_model
from megatron.model.batch import Inputs
from megatron.model.mask import BlockDiffusion, Full
from tests.evaluation import tiny
from tests.generation.test_blocks import blocks_of, network

VOCAB, MODEL = 5, network(seq=15)  # room for the end of a block
REQUESTS = [
    Request((0, 1), (2, 3, 4, 0), "a"),
    Request((4,), (3, 2, 1, 0, 1, 1, 2), "b"),
    Request((1, 2, 3, 4, 0), (2, 3, 4, 0), "c"),
    Request((1, 2, 3, 4, 0, 2, 1), (1, 1, 0, 2, 2, 2, 1), "d"),  # longer than a row: the left of the context goes
    Request((2, 2), (0, 0, 0, 0), "e"),
]


def scorer_of(size: int, **options) -> BlockScorer:
    asked = BlockModel(MODEL, BlockDiffusion(size), mask_id=VOCAB)
    return BlockScorer(asked, block_size=size, mask_id=VOCAB, **{"max_length": 12, **options})


def exact_of(size: int, order: str, **options) -> PolicyScorer:
    settings = DiffusionSettings(order=order, sampling=TokenSampling(temperature=1.0))
    return PolicyScorer(blocks_of(size, MODEL), settings, **{"max_length": 12, **options})


@torch.no_grad()
def mean_over_orders(request: Request, size: int) -> float:
    """Of the chain rule within each block: what every bound estimates. One token a row, the rest of its block masked."""
    tokens, start = [*request.context, *request.target], len(request.context)
    asked, total = BlockModel(MODEL, BlockDiffusion(size), mask_id=VOCAB), 0.0
    for _, places in itertools.groupby(range(start, len(tokens)), key=lambda place: place // size):
        orders = list(itertools.permutations(places))
        for order in orders:
            for step, place in enumerate(order):
                hidden = set(order[step:])
                row = [VOCAB if index in hidden else tokens[index] for index in range(order[0] // size * size)]
                row = [*row, *(VOCAB if index in hidden else tokens[index] for index in _own(order, tokens, size))]
                logits = asked(torch.tensor([row]))[0, place, :VOCAB]
                total += logits.log_softmax(-1)[tokens[place]].item() / len(orders)
    return total


def _own(order, tokens, size):
    first = order[0] // size * size
    return range(first, min(first + size, len(tokens)))


def open_logits(size: int):
    """Without the mask token in the softmax, as the reference above."""
    asked = BlockModel(MODEL, BlockDiffusion(size), mask_id=VOCAB)
    shut = torch.tensor([VOCAB])
    return lambda ids, *, positions, clean: asked(ids, positions=positions, clean=clean).index_fill(-1, shut, -math.inf)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bounds_are_the_mean_over_orders_within_blocks(size) -> None:
    scorer = BlockScorer(open_logits(size), block_size=size, mask_id=VOCAB, max_length=12)
    whole = scorer.score(REQUESTS[:3], EnumeratedBound(), num_draws=1)
    for request, found in zip(REQUESTS, whole):
        assert found.value == pytest.approx(mean_over_orders(request, size), abs=1e-5)
        assert (found.kind, found.standard_error) == ("bound", 0.0)
    for name in ("exact-count", "exact-count-antithetic", "bernoulli", "random-order"):
        estimator = ByBlocks(make_estimator(name), size, len(REQUESTS[1].context))
        tally = scorer.tally(REQUESTS[1], LeftToRight(), num_draws=1)
        tally.estimator = estimator
        scorer.extend([tally], num_draws=1500)
        estimate = tally.estimate()
        assert abs(estimate.value - whole[1].value) < 4 * estimate.standard_error, name
        assert 0 < estimate.standard_error < (0.5 if name == "bernoulli" else 0.05)
        assert estimate.estimator.endswith(f"blocks of {size}")


def test_short_blocks_run_every_mask() -> None:
    (found,) = scorer_of(2).score(REQUESTS[:1], MaskedBound(), num_draws=8)
    assert (found.estimator, found.num_passes, found.standard_error) == ("all masks, blocks of 2", 3, 0.0)


def test_left_to_right_is_the_policy_of_that_name() -> None:
    for size in (1, 3, 12):
        exact = exact_of(size, "left-to-right").score(REQUESTS)
        scorer = BlockScorer(open_logits(size), block_size=size, mask_id=VOCAB, max_length=12)
        chain = scorer.score(REQUESTS, LeftToRight(), num_draws=1)
        assert [one.value for one in chain] == pytest.approx([one.value for one in exact], abs=1e-5)
        assert [one.kind for one in (*chain, *exact)] == ["exact"] * 10
        assert [one.num_passes for one in chain] == [one.num_passes for one in exact]


def test_blocks_of_one_token_need_no_estimate() -> None:
    exact = exact_of(1, "confidence").score(REQUESTS)
    scorer = BlockScorer(open_logits(1), block_size=1, mask_id=VOCAB, max_length=12)
    for name in ESTIMATORS:
        found = scorer.score(REQUESTS, make_estimator(name), num_draws=16)
        assert [one.value for one in found] == pytest.approx([one.value for one in exact], abs=1e-5)
        assert {(one.kind, one.num_passes, one.standard_error) for one in found} == {("exact", 1, 0.0)}


def test_one_block_is_masked_diffusion() -> None:
    plain = MaskedScorer(
        lambda ids, positions=None: MODEL.logits(Inputs(ids), Full(), positions=positions), mask_id=VOCAB, max_length=12
    )
    full = [Request(request.context, (*request.target, *([0] * (12 - len(request.context + request.target)))), "k")
            for request in REQUESTS[:3]]  # fmt: skip
    for name in ESTIMATORS:
        estimator = make_estimator(name)
        found, expected = (own.score(full, estimator, num_draws=5) for own in (scorer_of(12), plain))
        assert [one.value for one in found] == pytest.approx([one.value for one in expected], abs=1e-5)
        assert [one.standard_error for one in found] == pytest.approx(
            [one.standard_error for one in expected], abs=1e-5
        )


@pytest.mark.parametrize("size", [2, 5])
def test_scores_depend_on_nothing_but_the_request(size) -> None:
    """Not on batch mates, their lengths, or the order of requests."""
    shuffled = [3, 0, 4, 2, 1]
    mixed = [REQUESTS[index] for index in shuffled]
    for name in ("exact-count", "left-to-right"):
        expected = scorer_of(size).score(REQUESTS, make_estimator(name), num_draws=2)
        found = scorer_of(size, batch_size=2, chunk_size=3).score(mixed, make_estimator(name), num_draws=2)
        assert [one.value for one in found] == pytest.approx([expected[index].value for index in shuffled], abs=1e-5)
    for order in ("confidence", "random"):
        expected = exact_of(size, order).score(REQUESTS)
        found = exact_of(size, order, batch_size=2).score(mixed)
        assert [one.value for one in found] == pytest.approx([expected[index].value for index in shuffled], abs=1e-5)


def test_greedy_answers_are_those_of_the_sampler() -> None:
    for size in (1, 3):
        sampler = blocks_of(size, MODEL)
        rows = sampler.fill([[0, 1, *([VOCAB] * 6)], [4, 2, *([VOCAB] * 6)]], settings=DiffusionSettings())
        right = [Request(tuple(row[:2]), tuple(row[2:])) for row in rows]
        wrong = [Request(one.context, (*one.target[:-1], (one.target[-1] + 1) % VOCAB)) for one in right]
        assert scorer_of(size).is_greedy([*right, *wrong]) == [True, True, False, False]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", 300)
    for name, options in {"blocks": {}, "causal": {"block_ar_weight": 1}, "ones": {"block_size": 1}}.items():
        options = {"block_size": 8, **options}
        config = tiny.config_for("block_diffusion", tokenizer, vocab_size=300, seq_length=48, **options)
        tiny.make_run(folder / name, config, scale=2.0)
    tiny.write_samples(folder / "valid", vocab_size=300, seq_length=48, count=4)
    return folder


def test_a_loaded_model_is_one_of_blocks(folder) -> None:
    for name, mask in (
        ("blocks", BlockDiffusion(8)),
        ("causal", BlockDiffusion(8, causal=True)),
        ("ones", BlockDiffusion(1)),
    ):
        loaded = load_model(folder / name)
        assert (loaded.is_masked, loaded.block_size, loaded.mask_id) == (True, mask.size, 300)
        assert loaded.objective.attention_mask == mask
        tokens = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
        changed = tokens.clone()
        changed[:, 17] = 7
        with torch.inference_mode():
            moved = (loaded.logits(tokens) - loaded.logits(changed)).abs().amax((0, 2)) > 1e-6
        own = 17 // mask.size * mask.size
        assert moved.tolist() == [own <= place for place in range(30)]


def test_every_likelihood_of_the_court(folder, capsys) -> None:
    words = [str(folder / name) for name in ("blocks", "causal", "ones")]
    flags = [
        "--valid-data-path",
        str(folder / "valid"),
        "--policies",
        "left-to-right,confidence",
        "--num-mc",
        "2",
        "--orders",
        "2",
    ]
    assert main([*words, *flags, "--output", str(folder / "out.json")]) == 0
    found = {(own["model"], own["estimator"]): own for own in json.loads((folder / "out.json").read_text())["findings"]}
    assert {own["passes"] for (model, name), own in found.items() if "confidence" in name} == {8, 1}
    one = {own["nll"] for (model, name), own in found.items() if model == "ones"}
    assert max(one) - min(one) < 1e-5, "one order: chain rule, mixture and all policies are one number"
    assert [found["ones", "chain rule"][name] for name in ("kind", "passes")] == ["exact", 1]
    assert [found["causal", "bound, 4 passes"][name] for name in ("kind", "passes")] == ["upper bound", 4]
    assert found["blocks", "confidence, 1 token a pass, blocks of 8"]["kind"] == "exact"
    with pytest.raises(UserError, match="block_length 4; the model has blocks of 8 tokens"):
        main([*words, *flags, "--block-length", "4"])


def test_a_text_is_scored_and_continued_from_python(folder) -> None:
    loaded = load_model(folder / "blocks")
    estimate = log_likelihood(loaded, "Return the path.", context="", num_draws=4, estimator="exact-count", seed=1)
    assert estimate.kind == "bound" and estimate.estimator == "exact-count, stratified, blocks of 8"
    one, other = (
        complete(loaded, ["Return the", "If"], {"max_new_tokens": 20, "temperature": 1.0, "batch_size": size})
        for size in (1, 8)
    )
    assert one == other and [len(own.tokens) for own in one] == [20, 20]
    (ended,) = complete(loaded, ["Return [MASK:5]"], {})
    assert ended.text.startswith("Return")


@pytest.mark.parametrize(
    ("prompt", "options"), [("Return", {"infix": " of the file", "max_new_tokens": 4}), ("Return [MASK:3] of", {})]
)
def test_infilling_is_refused_in_words(folder, prompt, options) -> None:
    with pytest.raises(UserError) as caught:
        complete(load_model(folder / "blocks"), [prompt], options)
    given, rule, fix = str(caught.value).split("; ")
    assert given == "given tokens behind tokens to be filled in"
    assert "from left to right" in rule and "--infix" in fix


def test_what_measures_whole_sequences_refuses_blocks(folder, monkeypatch) -> None:
    text = tiny.write_jsonl(folder / "text.jsonl", [{"text": " ".join(tiny.sentences()[:20])}])
    for source in (["--text", str(text)], ["--valid-data-path", str(folder / "valid")]):
        monkeypatch.setattr("sys.argv", ["compare", "--load", str(folder / "blocks"), *source])
        with pytest.raises(UserError, match=r"a model of blocks .*whole sequences"):
            compare_estimators.main()


def test_tasks_of_lm_eval(folder) -> None:
    """Answers, last words and texts to generate; by the bound, and exactly under a policy."""
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate

    from megatron.evaluation.lm_eval.models import MegatronMDM
    from megatron.evaluation.lm_eval.tasks import task_loader

    tasks = [
        str(tiny.write_jsonl(folder / "halves.jsonl", tiny.choice_items(3))),
        str(tiny.write_jsonl(folder / "words.jsonl", tiny.last_word_items(3))),
        str(tiny.write_jsonl(folder / "continue.jsonl", tiny.generation_items(3))),
    ]
    said, scores = [], []
    for run, options in (
        ("blocks", {"num_mc": 8}),
        ("causal", {"policy": "entropy", "batch_size": 3}),
        ("causal", {"policy": "entropy"}),
    ):
        lm = MegatronMDM(load=str(folder / run), **options)
        results = simple_evaluate(lm, tasks=tasks, task_manager=task_loader(tasks), log_samples=True, bootstrap_iters=0)
        assert not lm.refusals.reasons
        said.append(lm.describe())
        scores.append([float(pair[0]) for s in results["samples"]["halves"] for (pair,) in s["resps"]])
        assert all(math.isfinite(score) and score < 0 for score in scores[-1])
        assert len(results["samples"]["continue"]) == 3
    assert said[:2] == ["bound: exact-count, stratified, 8 draws, races where only the winner counts",
                        "exact: entropy, 1 token a pass, blocks of 8"]  # fmt: skip
    assert scores[1] == pytest.approx(scores[2], abs=1e-4)


def test_the_program_takes_policies_for_blocks(folder, capsys) -> None:
    pytest.importorskip("lm_eval")
    from megatron.evaluation.lm_eval.command import run_downstream

    task = tiny.write_jsonl(folder / "few.jsonl", tiny.choice_items(2))
    words = ["--load", str(folder / "blocks"), "--task_list", str(task), "--eval_method", "exact", "--policy", "margin"]
    assert run_downstream([*words, "--tokens_per_step", "2"]) == 0
    assert "exact: margin, 2 tokens a pass, blocks of 8" in capsys.readouterr().out
