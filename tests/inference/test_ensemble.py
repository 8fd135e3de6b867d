"""Several models as one: probabilities are averaged, and everything downstream takes the mean for a model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

import megatron
from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.errors import UserError
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings
from megatron.generation.sampling import TokenSampling
from megatron.inference.blocks import BlockModel
from megatron.inference.decoder import CachedDecoder
from megatron.inference.ensemble import Member, MixedModel, members_of
from megatron.inference.model import load_model
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import BlockDiffusion, Causal, Full
from megatron.parallel.tensor import ParameterFactory
from megatron.testing.checks import check_sums_to_one
from megatron.testing.oracles import bound_nll, conditionals, mixture_nll
from tests.evaluation import tiny

VOCAB, LENGTH = 4, 3


def network(seed: int, *, hidden: int = 16, rows: int = VOCAB + 1, seq: int = 8) -> GPTModel:
    """In fp64, with weights so large that predictions are far from uniform."""
    shape = ModelConfig(
        num_layers=2, num_attention_heads=2, init_method_std=0.35, hidden_size=hidden, ffn_hidden_size=2 * hidden,
        seq_length=seq, padded_vocab_size=rows,
    )  # fmt: skip
    return GPTModel(Shape.of(shape), ParameterFactory(seed=seed)).double().eval()


MODELS = [network(1), network(2, hidden=24), network(3)]
WEIGHTS = [0.5, 0.2, 0.3]
MIXED = MixedModel(MODELS, WEIGHTS)
IDS = torch.tensor([[0, 1, 2, 3, 0], [3, 2, 1, 1, 4]])


@torch.no_grad()
def test_probabilities_are_averaged_not_logits() -> None:
    for mask in (Causal(), Full()):
        own = [model.logits(Inputs(IDS), mask) for model in MODELS]
        found = MIXED.logits(Inputs(IDS), mask).exp()
        expected = sum(weight * logits.softmax(-1) for weight, logits in zip(WEIGHTS, own))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sum(-1), torch.ones(IDS.shape, dtype=torch.float64), rtol=0, atol=1e-12)
        of_logits = sum(weight * logits for weight, logits in zip(WEIGHTS, own)).softmax(-1)
        assert (found - of_logits).abs().max() > 0.05


@torch.no_grad()
def test_one_or_equal_models_are_the_model() -> None:
    positions = IDS > 1
    expected = MODELS[0].logits(Inputs(IDS), Full(), positions=positions).log_softmax(-1)
    for number, weights in ((1, [1.0]), (3, [3.0, 1.0, 0.5])):
        found = MixedModel([MODELS[0]] * number, weights).logits(Inputs(IDS), Full(), positions=positions)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_of_padding_that_a_model_lacks_have_no_probability() -> None:
    wide = network(2, rows=VOCAB + 3)
    found = MixedModel([MODELS[0], wide], [1, 1]).logits(Inputs(IDS), Full()).exp()
    parts = [model.logits(Inputs(IDS), Full()).softmax(-1) / 2 for model in (MODELS[0], wide)]
    torch.testing.assert_close(found[..., : VOCAB + 1], parts[0] + parts[1][..., : VOCAB + 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[..., VOCAB + 1 :], parts[1][..., VOCAB + 1 :], rtol=0, atol=1e-12)


@torch.no_grad()
def test_caches_of_members_are_apart() -> None:
    """Token by token, and block by block: as without a cache."""
    decoder = CachedDecoder(MIXED)
    whole = MIXED.logits(Inputs(IDS), Causal())
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        torch.testing.assert_close(decoder.feed(IDS[:, start:stop]), whole[:, stop - 1], rtol=0, atol=1e-10)
    model = BlockModel(MIXED, BlockDiffusion(2), mask_id=VOCAB)
    filling, rows = model.filling(), IDS[:, :4]
    for block in (0, 1):
        positions = torch.zeros_like(rows, dtype=torch.bool)
        positions[:, 2 * block : 2 * block + 2] = True
        found, expected = filling(rows, positions=positions), model(rows, positions=positions)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_likelihoods_of_a_mean_of_denoisers_sum_to_one_and_its_bound_is_one() -> None:
    """Enumerated: every policy of the sampler, and the mean over masks against the mixture over orders."""

    def logits(input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        found = MIXED.logits(Inputs(input_ids), Full(), positions=positions)
        return found.index_fill(-1, torch.tensor([VOCAB]), -torch.inf)

    sampler = DiffusionSampler(logits, mask_id=VOCAB)
    for order in ("confidence", "entropy-reversed", "random"):
        settings = DiffusionSettings(order, sampling=TokenSampling(temperature=1.0))
        masked = torch.ones(VOCAB**LENGTH, LENGTH, dtype=torch.bool)

        def score(texts, settings=settings, masked=masked):
            return sampler.log_likelihoods(texts, masked[: len(texts)], settings=settings).values.sum(-1).tolist()

        check_sums_to_one(score, vocab_size=VOCAB, length=LENGTH)
    tables = [conditionals(logits, text, VOCAB) for text in itertools.product(range(VOCAB), repeat=LENGTH)]
    assert all(bound_nll(table) >= mixture_nll(table) - 1e-12 for table in tables)


def test_what_an_expression_names(tmp_path) -> None:
    assert members_of("runs/a") == [Member("runs/a")]
    assert members_of("runs/a + runs/b") == [Member("runs/a"), Member("runs/b")]
    assert members_of(".7*a+3e-1*b") == [Member("a", 0.7), Member("b", 0.3)]
    assert members_of("2*runs/a") == [Member("runs/a", 2.0)], "of one"
    (tmp_path / "a+b").mkdir()
    assert members_of(tmp_path / "a+b") == [Member(str(tmp_path / "a+b"))], "a run of this name"
    for wrong in ("a+", "0.5*a+b", "0*a+1*b"):
        with pytest.raises(UserError, match=r"the ensemble .*; it is RUN\+RUN"):
            members_of(wrong)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", 300)
    for seed, (name, length) in enumerate({"ar": 48, "ar-2": 48, "mdm": 48, "mdm-2": 48, "ar-short": 32}.items()):
        config = tiny.config_for(name.split("-")[0], tokenizer, vocab_size=300, seq_length=length)
        tiny.make_run(folder / name, config, seed=seed, scale=3.0)
    for name, size in (("ar-more", 310), ("ar-foreign", 300)):  # more tokens; as many, of which two have changed places
        own = tiny.build_tokenizer_file(folder / f"tokenizer-{name}", size)
        if name == "ar-foreign":
            text = (own / "tokenizer.json").read_text()
            (own / "tokenizer.json").write_text(text.replace('"!":', '"?":', 1).replace('"\\"":', '"!":', 1))
        tiny.make_run(folder / name, tiny.config_for("ar", own, vocab_size=size, seq_length=48))
    return folder


def test_an_ensemble_is_loaded_scored_and_drawn_from_like_a_model(runs) -> None:
    text = "Return the name of the file."
    for kind in ("ar", "mdm"):
        one, other = megatron.load_model(runs / kind), megatron.load_model(runs / f"{kind}-2")
        both = megatron.load_model(f"{runs / kind}+{runs / kind}-2")
        assert [own.source for own in both.members] == [one.source, other.source]
        assert both.source == f"{one.source}+{other.source}"
        assert len({one.identity, other.identity, both.identity}) == 3
        ids = torch.tensor([one.require_tokenizer().encode(text)])
        with torch.inference_mode():
            parts = [own.logits(ids).softmax(-1) / 2 for own in (one, other)]
            torch.testing.assert_close(both.logits(ids).exp(), sum(parts), rtol=1e-5, atol=1e-7)
        found = megatron.log_likelihood(both, text, num_draws=4)
        same = megatron.log_likelihood(megatron.load_model(f"0.2*{runs / kind}+0.6*{runs / kind}"), text, num_draws=4)
        assert same.value == pytest.approx(megatron.log_likelihood(one, text, num_draws=4).value, abs=1e-4)
        assert found.kind == same.kind == ("exact" if kind == "ar" else "bound")
        (drawn,) = megatron.generate(both, text, max_new_tokens=5, temperature=1.0)
        assert len(drawn.tokens) == 5
    weighted = load_model(f"3*{runs / 'ar'}+1*{runs / 'ar-2'}")
    assert weighted.weights == (0.75, 0.25)
    assert math.isclose(load_model(weighted.source).weights[0], 0.75), "its name can be loaded"


@pytest.mark.parametrize(
    ("second", "rule"),
    [
        ("mdm", "has the objective mdm with MaskedDecoding.*; .* one kind of model"),
        ("ar-short", "has samples of 32 tokens; .* one sequence length"),
        ("ar-more", "has 310 tokens; .* one tokenizer"),
        ("ar-foreign", "have different tokenizers"),
        ("absent", "absent holds no checkpoint"),
    ],
)
def test_models_of_other_things_are_refused(runs, second, rule) -> None:
    with pytest.raises(UserError, match=rule):
        load_model(f"{runs / 'ar'}+{runs / second}")


@pytest.mark.parametrize(
    ("changes", "said"), [({"mask_token_id": 302}, "mask_token_id=302"), ({"shifted_labels": True}, "shift=1")]
)
def test_what_sets_models_of_one_objective_apart_is_named(runs, tmp_path, changes, said) -> None:
    config = tiny.config_for("mdm", runs / "tokenizer", vocab_size=300, seq_length=48)
    options = {**config.objective.options, **changes}
    mask_id = changes.get("mask_token_id", config.objective.mask_token_id)
    objective = dataclasses.replace(config.objective, options=options, mask_token_id=mask_id)
    tiny.make_run(tmp_path / "other", dataclasses.replace(config, objective=objective))
    with pytest.raises(UserError, match=f"mask_token_id=300, shift=0.*{said}.* one mask and shift"):
        load_model(f"{runs / 'mdm'}+{tmp_path / 'other'}")
