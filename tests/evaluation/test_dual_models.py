"""Models that predict a masked token from the position before it, and dual ones, which are that and AR: every program."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from megatron.commands.compare_estimators import main as compare_estimators
from megatron.commands.likelihood import main as likelihood
from megatron.convert.huggingface import attention_family
from megatron.errors import UserError
from megatron.evaluation.blocks import scorer_of
from megatron.evaluation.estimators import LeftToRight, MaskedBound
from megatron.evaluation.exact import PolicyScorer
from megatron.evaluation.likelihood import log_likelihood
from megatron.evaluation.scorer import Request
from megatron.generation.blocks import sampler_of
from megatron.generation.command import run_generate
from megatron.generation.diffusion import DiffusionSettings
from megatron.generation.sampling import TokenSampling
from megatron.inference.model import load_model
from megatron.objectives import parse
from megatron.objectives.densities import Measured
from megatron.testing import oracles
from tests.evaluation import tiny

SEQ, VOCAB = 24, 300


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", VOCAB)
    options = {"dual": ("dual", {}), "judged_mdm": ("dual", {"dual_decoding": "mdm"}), "ar": ("ar", {}),
               "shifted": ("mdm", {"shifted_labels": True}), "mdm": ("mdm", {})}  # fmt: skip
    for name, (objective, flags) in options.items():
        config = tiny.config_for(objective, tokenizer, vocab_size=VOCAB, seq_length=SEQ, **flags)
        tiny.make_run(folder / name, config, scale=2.0)
    tiny.write_samples(folder / "valid", vocab_size=VOCAB, seq_length=SEQ, count=4)
    return folder


def test_both_forms_share_their_weights(runs) -> None:
    dual = load_model(runs / "dual")
    masked = dual.beside
    assert dual.is_causal and masked is not None and masked.is_masked and masked.mask_id == VOCAB
    assert masked.model is dual.model and masked.beside.is_causal
    assert dual.decoded("masked").is_masked and dual.decoded("causal") is dual
    judged = load_model(runs / "judged_mdm")
    assert judged.is_masked and judged.decoded("causal").is_causal
    plain = load_model(runs / "ar")
    assert plain.beside is None and plain.decoded("masked") is plain


def test_a_row_of_logits_is_about_the_token_where_it_stands(runs) -> None:
    for name in ("shifted", "judged_mdm"):
        loaded, plain = load_model(runs / name), load_model(runs / "mdm")  # the same weights, predicting in place
        tokens, positions = torch.arange(40, 52).view(2, 6), torch.zeros(2, 6, dtype=torch.bool)
        positions[0, [1, 4]], positions[1, 5] = True, True
        with torch.inference_mode():
            rows = plain.logits(tokens)
            assert torch.equal(loaded.logits(tokens)[:, 1:], rows[:, :-1])
            torch.testing.assert_close(loaded.logits(tokens, positions=positions), rows[[0, 0, 1], [0, 3, 4]])
            with pytest.raises(UserError, match="at least one token of context"):
                loaded.logits(tokens, positions=torch.ones_like(positions))


def test_scores_and_samplers_are_those_of_the_enumeration(runs) -> None:
    """Bound, chain rule from left to right, and the exact likelihood of a sampler, of four tokens after two."""
    masked = load_model(runs / "dual").decoded("masked")
    context, text = (5, 9), (17, 30, 8, 21)
    table = oracles.conditionals(masked.logits, text, masked.mask_id, context=context)
    scorer, request = scorer_of(masked), Request(context, text)
    bound = scorer.score([request], MaskedBound(), num_draws=100)[0]  # short: all masks are enumerated
    assert -bound.value == pytest.approx(oracles.bound_nll(table), abs=1e-4)
    chain = scorer.score([request], LeftToRight(), num_draws=1)[0]
    assert chain.value == pytest.approx(oracles.chain_rule(table, range(4)), abs=1e-4)
    settings = DiffusionSettings("right-to-left", sampling=TokenSampling(temperature=1.0))
    exact = PolicyScorer(sampler_of(masked), settings, max_length=SEQ).token_scores([request])[0]
    shut = sorted({*masked.unused_ids, masked.mask_id})  # never drawn

    def drawn(ids):
        return masked.logits(ids).index_fill(-1, torch.tensor(shut), -torch.inf)

    drawn_table = oracles.conditionals(drawn, text, masked.mask_id, context=context)
    assert exact.logprobs.sum() == pytest.approx(oracles.chain_rule(drawn_table, range(3, -1, -1)), abs=1e-4)


def test_the_spread_of_the_loss_by_share_is_measured(runs, capsys, monkeypatch) -> None:
    """Printed as the flags that take it."""
    words = ["compare-estimators", "--load", str(runs / "dual"), "--valid-data-path", str(runs / "valid"), "--num-mc"]
    monkeypatch.setattr("sys.argv", [*words, "32", "--parts", "3"])
    compare_estimators()
    line = capsys.readouterr().out.splitlines()[-1]
    objective = parse(["--train-iters", "1", "--model", "7M", "--objective", "mdm", *line.split()]).objective
    spread = Measured(objective.options["noise_schedule_spread"]).spread
    file = runs / "figures.json"
    monkeypatch.setattr("sys.argv", [*words, "1", "--repeats", "2", "--output", str(file)])  # fewer seeds than copies
    compare_estimators()
    assert set(json.loads(file.read_text())["variances"]) == {"bernoulli", "exact-count-antithetic"}
    assert len(spread) == 3 and spread[0] > 2 * spread[2]  # few masks of weight 1/p against many of weight 1
    monkeypatch.setattr("sys.argv", [*words, "1", "--parts", "30"])
    with pytest.raises(UserError, match="--num-mc"):
        compare_estimators()


def test_likelihood_hears_both_forms(runs) -> None:
    words = [str(runs / "dual"), str(runs / "ar"), "--valid-data-path", str(runs / "valid"), "--num-mc", "2"]
    assert likelihood([*words, "--policies", "confidence", "--orders", "0", "--output", str(runs / "out.json")]) == 0
    found = [(own["model"], own["kind"]) for own in json.loads((runs / "out.json").read_text())["findings"]]
    assert found == [
        ("dual as AR", "exact"),
        ("dual as masked diffusion", "upper bound"),
        ("dual as masked diffusion", "exact"),
        ("ar", "exact"),
    ]


def test_text_is_scored_and_written_in_both_forms(runs, capsys) -> None:
    dual = load_model(runs / "dual")
    options = {"context": "The", "num_draws": 4, "estimator": "exact-count", "seed": 1}
    kinds = [log_likelihood(model, " path", **options).kind for model in (dual, dual.beside)]
    assert kinds[0] == "exact" and all(kinds)
    words = ["--load", str(runs / "dual"), "--max-new-tokens", "4", "--prompt", "The path", "--json"]
    texts = []
    for decoding in ([], ["--decoding", "causal"], ["--decoding", "masked"]):
        assert run_generate([*words, *decoding]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] and len(texts[2]) <= 4
    assert run_generate(["--load", str(runs / "dual"), "--decoding", "masked", "--prompt", "The [MASK:2] file"]) == 0
    with pytest.raises(UserError, match="only dual models"):
        run_generate([*words[2:], "--load", str(runs / "ar"), "--decoding", "masked"])


def test_lm_eval_takes_the_form_that_it_is_asked_for(runs) -> None:
    pytest.importorskip("lm_eval")
    from megatron.evaluation.lm_eval.models import MegatronAR, MegatronMDM

    for name in ("dual", "judged_mdm"):
        model = load_model(runs / name)
        assert MegatronAR(model=model, batch_size=2).loaded.is_causal
        assert MegatronMDM(model=model, batch_size=2, num_mc=2).loaded.is_masked


def test_exports_are_of_the_form_that_the_run_is_judged_by(runs) -> None:
    config = load_model(runs / "dual").config
    assert attention_family(config) == "ar"
    for name in ("shifted", "judged_mdm"):
        with pytest.raises(UserError, match="where they stand"):
            attention_family(load_model(runs / name).config)
    assert attention_family(dataclasses.replace(config, objective=load_model(runs / "mdm").config.objective)) == "mdm"
