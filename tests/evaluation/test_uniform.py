"""Uniform-state diffusion evaluated: bounds that depend on the request alone, the court, lm-eval, generation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch

from megatron.commands.likelihood import main
from megatron.errors import UserError
from megatron.evaluation.likelihood import log_likelihood
from megatron.evaluation.lm_eval.command import run_downstream
from megatron.evaluation.lm_eval.models import MegatronAR
from megatron.evaluation.lm_eval.tasks import task_loader
from megatron.evaluation.lm_eval.uniform import MegatronUniform
from megatron.evaluation.scorer import Request
from megatron.evaluation.uniform import UniformScorer
from megatron.generation.command import run_generate
from megatron.inference.model import load_model
from megatron.runs.likelihoods import BOUND, EXACT
from megatron.testing.checks import check_scores_stand_alone
from tests.evaluation import tiny, toy
from tests.evaluation.uniform_chain import STATES, VOCAB, exact_bounds

MODEL = toy.ToyMaskedModel(vocab=9, length=14, seed=2)
SEQ, TOKENS = 48, 300


def scorer(model: toy.ToyMaskedModel = MODEL, **options) -> UniformScorer:
    return UniformScorer(model, vocab_size=model.vocab, **{"max_length": 14, "batch_size": 16, **options})


def requests(number: int = 24) -> list[Request]:
    random = np.random.default_rng(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(random.integers(0, 9, random.integers(low, high)).tolist())

    return [Request(tokens(0, 7), tokens(1, 8), f"q{index // 3}") for index in range(number)]


def test_scores_depend_on_nothing_but_the_request() -> None:
    """Batch size, batch mates, their lengths and their order change nothing beyond 1e-5, neither value nor error."""
    items = {(*item.context, 99, *item.target): item for item in requests()}

    def score(batch_size: int, field: str, texts: Sequence[tuple[int, ...]]) -> list[float]:
        found = scorer(batch_size=batch_size).score([items[text] for text in texts], num_draws=5)
        return [getattr(own, field) for own in found]

    for field in ("value", "standard_error"):
        check_scores_stand_alone({str(size): partial(score, size, field) for size in (1, 3, 16)}, list(items))
    (one,) = scorer().score(requests(1), num_draws=5)
    assert (one.kind, one.num_passes, one.num_draws) == ("bound", 10, 5)


def test_rows_are_never_padded_and_the_context_is_clean() -> None:
    def watch(input_ids, *, positions=None):
        for row, scored in zip(input_ids, positions):
            context = row[~scored].tolist()
            assert any(list(item.context) == context and len(item.target) == int(scored.sum()) for item in items)
        return MODEL(input_ids, positions=positions)

    items = requests()
    UniformScorer(watch, vocab_size=9, max_length=14).score(items, num_draws=2)


def test_the_mean_over_draws_is_the_enumerated_bound_and_the_error_is_right() -> None:
    model = toy.ToyMaskedModel(vocab=VOCAB, length=4, seed=3)
    rows = STATES[[7, 300]]
    for row, expected in zip(rows, -exact_bounds(model, rows)):
        target = tuple(row.tolist())
        many = [Request((), target, f"{key}") for key in range(400)]
        found = scorer(model, max_length=4, batch_size=2000).score(many, num_draws=16)
        values, errors = (np.array([getattr(own, name) for own in found]) for name in ("value", "standard_error"))
        spread = values.std(ddof=1)
        assert abs(values.mean() - expected.sum()) < 4 * spread / 20
        assert 0.7 < errors.mean() / spread < 1.5
        (tokens,) = scorer(model, max_length=4, batch_size=2000).token_values(many[:1], num_draws=6000)
        np.testing.assert_allclose(tokens.mean(0), expected, atol=0.25)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uniform")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", TOKENS)
    for name in ("ar", "mdm", "uniform_diffusion"):
        tiny.make_run(folder / name, tiny.config_for(name, tokenizer, vocab_size=TOKENS, seq_length=SEQ), scale=2.0)
    tiny.write_samples(folder / "valid", vocab_size=TOKENS, seq_length=SEQ, count=6)
    tiny.write_jsonl(folder / "halves.jsonl", tiny.choice_items(4))
    tiny.write_jsonl(folder / "words.jsonl", tiny.last_word_items(3))
    tiny.write_jsonl(folder / "continue.jsonl", tiny.generation_items(3))
    return folder


@pytest.fixture(scope="module")
def loaded(runs):
    return load_model(runs / "uniform_diffusion")


def test_a_checkpoint_knows_its_tokens(loaded) -> None:
    """Padding rows, enlarged, have no share of the likelihood."""
    assert not loaded.is_causal and not loaded.is_masked and loaded.objective.decoding.vocab_size == TOKENS
    with pytest.raises(UserError, match="mask token"):
        _ = loaded.mask_id
    item = Request((3, 4), (5, 6, 7), "a")
    (before,) = UniformScorer.of(loaded).score([item], num_draws=4)

    def tempting(input_ids, *, positions=None):
        logits = loaded.logits(input_ids, positions=positions).clone()
        logits[..., TOKENS:] = 90.0
        return logits

    (after,) = UniformScorer.of(loaded, tempting).score([item], num_draws=4)
    assert after.value == before.value and math.isfinite(before.value)


def test_the_court_hears_its_bound(runs, capsys) -> None:
    words = [str(runs / name) for name in ("ar", "uniform_diffusion")]
    flags = ["--valid-data-path", str(runs / "valid"), "--num-mc", "2"]
    found = []
    for name, batch in (("one", "2"), ("other", "32")):
        assert main([*words, *flags, "--batch-size", batch, "--output", str(runs / f"{name}.json")]) == 0
        found.append(json.loads((runs / f"{name}.json").read_text()))
    assert [(own["estimator"], own["kind"], own["passes"]) for own in found[0]["findings"]] == [
        ("chain rule", EXACT, 1), ("bound, 4 passes", BOUND, 4)
    ]  # fmt: skip
    for one, other in zip(*(own["findings"] for own in found)):
        assert one["nll"] == pytest.approx(other["nll"], abs=1e-5)
    assert "uniform_diffusion below ar:" in capsys.readouterr().out


def test_texts_are_scored_from_python(loaded) -> None:
    scored = log_likelihood(loaded, " of the file.", context="The end", num_draws=8, estimator="exact-count", seed=1)
    assert scored.kind == "bound" and scored.num_passes == 8 and scored.value < 0
    other = log_likelihood(loaded, " of the file.", context="The end", num_draws=8, estimator="exact-count", seed=2)
    assert other.value != scored.value


def test_lm_eval_scores_and_generates(runs, loaded) -> None:
    from lm_eval.evaluator import simple_evaluate  # seconds to load

    tasks = [str(runs / f"{name}.jsonl") for name in ("halves", "words", "continue")]
    answers = []
    for batch_size in (1, 7):
        model = MegatronUniform(model=loaded, num_mc=4, batch_size=batch_size)
        options = {"task_manager": task_loader(tasks), "log_samples": True, "bootstrap_iters": 0}
        results = simple_evaluate(model, tasks=tasks, **options)
        answers.append([sample["resps"] for own in results["samples"].values() for sample in own])
        assert {"halves", "words", "continue"} == set(results["results"])
    for one, other in zip(*answers):
        for mine, theirs in zip(one, other):
            if isinstance(mine[0], str):
                assert mine == theirs
            else:
                assert mine[0][0] == pytest.approx(theirs[0][0], abs=1e-4) and mine[0][1] == theirs[0][1]


def test_is_greedy_is_what_the_greedy_sampler_gives(loaded) -> None:
    model = MegatronUniform(model=loaded, num_mc=2)
    assert MegatronUniform(model=loaded, num_mc=3).describe().endswith(", 4 passes"), "they are made in pairs"
    context = model.tok_encode("Return the")
    row = [*context, *([model.sampler.mask_id] * 3)]
    from megatron.generation.diffusion import DiffusionSettings

    target = model.sampler.fill([row], settings=DiffusionSettings())[0][len(context) :]
    other = [*target[:-1], (target[-1] + 1) % TOKENS]
    found = model._loglikelihood_tokens([(("", ""), context, target), (("", ""), context, other)])
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_the_programs_take_the_checkpoint(runs, capsys) -> None:
    task, load = str(runs / "halves.jsonl"), ["--load", str(runs / "uniform_diffusion")]
    assert run_downstream([*load, "--task_list", task, "--num-mc", "2", "--limit", "2"]) == 0
    assert "bound: uniform-state bound" in capsys.readouterr().out
    for flags in (["--estimator", "bernoulli"], ["--eval_method", "exact"], ["--only_generate"]):
        with pytest.raises(UserError, match=f"{flags[0]}.* with .*a uniform-state diffusion model"):
            run_downstream([*load, "--task_list", task, *flags])
    with pytest.raises(UserError, match="megatron_uniform"):
        MegatronAR(load=str(runs / "uniform_diffusion"))
    with pytest.raises(UserError, match="uniform_diffusion"):
        MegatronUniform(load=str(runs / "mdm"))


def test_text_is_generated_and_gaps_are_filled(runs, capsys) -> None:
    load = ["--load", str(runs / "uniform_diffusion")]
    six = ["--max-new-tokens", "6"]

    def run(*flags: str) -> str:
        assert run_generate([*load, *flags, *([] if "[MASK" in flags[1] else six)]) == 0
        return capsys.readouterr().out

    for flags in ([], ["--temperature", "1"], ["--order", "ancestral", "--steps", "3", "--temperature", "0.8"]):
        one, again = (run("--prompt", "Return the path", "--json", *flags) for _ in range(2))
        assert one == again and len(json.loads(one)["tokens"]) == 6
        assert all(0 <= token < TOKENS for token in json.loads(one)["tokens"])
    shown = run("--prompt", "If[MASK:3] is true", "--infix", ", it is raised.", "--temperature", "1")
    assert shown.startswith("If") and " is true" in shown and shown.rstrip("\n").endswith(", it is raised.")
    assert "[step 2, " in run("--prompt", "a", "--steps", "2", "--show-steps")
    animation = runs / "a.svg"
    run("--prompt", "a", "--animate", str(animation))
    assert "uniform_diffusion" in animation.read_text()
    for flags in (["--block-length", "2"], ["--guidance", "1"], ["--order", "entropy", "--temperature", "1"]):
        with pytest.raises(UserError, match="until the last step"):
            run_generate([*load, *six, "--prompt", "a", *flags])


def test_noise_of_a_model_in_another_precision_stays_the_same(loaded) -> None:
    """bf16 moves a bound by its rounding, not by its noise."""
    item = Request((3,), tuple(range(20, 40)), "k")
    exact, rounded = UniformScorer.of(loaded), UniformScorer.of(
        loaded, lambda ids, *, positions=None: loaded.logits(ids, positions=positions).to(torch.bfloat16)
    )  # fmt: skip
    (one,), (other,) = (own.score([item], num_draws=8) for own in (exact, rounded))
    assert other.value == pytest.approx(one.value, rel=2e-3) and other.value != one.value
