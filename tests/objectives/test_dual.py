"""Dual models, and the shifted masked diffusion that is their other half."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from objective_helpers import (
    MASK_ID,
    SEQ,
    assert_same_batch,
    make_config,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
    within_standard_errors,
)

from megatron.config import config_to_dict
from megatron.errors import UserError
from megatron.model.mask import Causal, Full, PerSample
from megatron.objectives import build_objective
from megatron.objectives.base import BOUND, EXACT, CausalDecoding, MaskedDecoding
from megatron.objectives.dual import Dual
from megatron.objectives.mdm import MaskedDiffusion
from megatron.objectives.schedules import MIN_MASK_PROB
from megatron.testing.checks import check_is_bound
from megatron.testing.oracles import bound_nll, by_order, causal_nll, conditionals, mixture_nll
from megatron.training.resolve import changed_settings

TEXT = (2, 0, 4, 1, 3)


def build(share: float, *flags: str, **options) -> Dual:
    built = make_objective("--objective", "dual", "--dual-ar-share", str(share), *flags, **options)
    assert isinstance(built, Dual)
    return built


def of_last_tokens(model):
    """Logits of every token but the first from the position before it; the last one is not in the input."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        found = model.logits(ids[:, :-1])
        return torch.cat((found[:, :1], found), dim=1)

    return logits


def test_at_one_it_is_ar():
    tokens, ids, plain = make_tokens(16), torch.arange(16), make_objective(objective="ar")
    dual = build(1)
    assert_same_batch(prepare(dual, tokens, ids), prepare(plain, tokens, ids))
    assert_same_batch(prepare(dual.for_eval(1, 4), tokens, ids), prepare(plain.for_eval(1, 4), tokens, ids))
    assert dual.attention_mask == plain.attention_mask and dual.decoding == plain.decoding
    assert (dual.label, dual.for_eval().label, dual.loss_fraction) == (EXACT, EXACT, 1)
    assert dual.beside is None


@pytest.mark.parametrize("flags", [[], ["--noise-schedule", "bell"]], ids=str)
def test_at_zero_it_is_shifted_masked_diffusion(flags):
    tokens, ids, plain = make_tokens(16), torch.arange(16), make_objective("--shifted-labels", *flags)
    dual = build(0, *flags)
    assert_same_batch(prepare(dual, tokens, ids), prepare(plain, tokens, ids))
    assert_same_batch(prepare(dual.for_eval(1, 4), tokens, ids), prepare(plain.for_eval(1, 4), tokens, ids))
    assert dual.attention_mask == plain.attention_mask and dual.decoding == plain.decoding
    assert (dual.label, dual.for_eval().label, dual.loss_fraction) == (BOUND, BOUND, plain.loss_fraction)
    assert dual.beside is None


def test_a_masked_token_is_the_label_of_the_position_before_it():
    tokens, ids = make_tokens(64), torch.arange(64)
    batch = prepare(make_objective("--shifted-labels"), tokens, ids)
    is_masked = batch.targets.loss_weights > 0
    assert torch.equal(batch.targets.labels, tokens[:, 1:])
    hidden = torch.nn.functional.pad(is_masked, (1, 0))[:, :SEQ]
    assert torch.equal(batch.inputs.input_ids == MASK_ID, hidden)
    assert torch.equal(batch.inputs.input_ids[~hidden], tokens[:, :-1][~hidden])
    plain = prepare(make_objective(), tokens, ids)
    assert torch.equal(batch.targets.loss_weights, plain.targets.loss_weights)  # the same coins, of other tokens


@torch.no_grad()
def test_shifted_masked_diffusion_bounds_what_it_should():
    """By enumeration: of the last four tokens given the first, above the exact likelihood of the mixture over orders."""
    model = tiny_model(Full(), vocab=8, seq=4)
    objective = MaskedDiffusion(mask_token_id=5, global_batch_size=16, seed=7, shifted=True)

    def table(text):
        return conditionals(of_last_tokens(model), text[1:], 5, context=text[:1])

    def losses(text):
        batch = prepare(objective, torch.tensor(text).expand(8000, 5).contiguous(), torch.arange(8000))
        return 4 * model.sample_losses(batch).double().numpy().reshape(-1, 16).mean(-1)

    check_is_bound(
        losses,
        texts=[TEXT, (1, 1, 0, 3, 2)],
        truth=lambda text: mixture_nll(table(text)),
        expected=lambda text: bound_nll(table(text), floor=MIN_MASK_PROB),
    )


@torch.no_grad()
def test_its_validation_has_that_expectation_without_a_floor():
    model, draws = tiny_model(Full(), vocab=8, seq=4), 512
    objective = make_objective("--shifted-labels").for_eval
    tokens, ids = torch.tensor([TEXT] * 64), torch.arange(64)
    means = []
    for draw in range(draws):
        batch = prepare(objective(draw, draws), tokens, ids)
        batch = batch._replace(inputs=batch.inputs._replace(input_ids=batch.inputs.input_ids.clamp(max=5)))
        means.append(float(model.sample_losses(batch).double().mean()))
    pairs = np.array(means).reshape(-1, 2).mean(-1)
    exact = -np.mean(by_order(conditionals(of_last_tokens(model), TEXT[1:], 5, context=TEXT[:1]))) / 4
    assert within_standard_errors(pairs, exact) and pairs.std() / len(pairs) ** 0.5 < 0.01 * exact


@torch.no_grad()
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_expected_loss_is_alpha_ar_plus_the_rest_mdm(share):
    """Against enumeration, with one set of weights under the mask of the objective."""
    step, count = 16, 8000
    objective = Dual(mask_token_id=5, global_batch_size=step, seed=7, ar_share=share)
    model = tiny_model(objective.attention_mask, vocab=8, seq=4)
    batch = prepare(objective, torch.tensor(TEXT).expand(count, 5).contiguous(), torch.arange(count))
    per_step = model.sample_losses(batch).double().numpy().reshape(-1, step).mean(-1)
    model.mask = Full()
    bound = bound_nll(conditionals(of_last_tokens(model), TEXT[1:], 5, context=TEXT[:1]), floor=MIN_MASK_PROB) / 4
    model.mask = Causal()
    exact = causal_nll(model.logits, [TEXT[1:]], context=TEXT[:1])[0] / 4
    expected = share * exact + (1 - share) * bound
    assert within_standard_errors(per_step, expected)
    assert per_step.std() / len(per_step) ** 0.5 < 0.04 * abs(exact - bound)  # sharp enough to notice another share
    mixture = -np.log(share * np.exp(-4 * exact) + (1 - share) * np.exp(-4 * bound)) / 4
    assert mixture <= expected and objective.label == BOUND


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_every_step_has_its_share_of_each_kind_and_stratified_times(share):
    objective, ids = build(share, batch=64), np.arange(640)
    batch = objective.prepare(samples_of(640))
    is_causal = batch.inputs.is_causal == 1
    assert (np.abs(is_causal.reshape(10, 64).sum(-1) - share * 64) < 1).all()
    assert not (batch.inputs.input_ids[is_causal] == MASK_ID).any()
    assert (batch.targets.loss_weights[is_causal] == 1).all()
    times = objective.times(ids).reshape(10, 64)
    for row, causal in zip(times, is_causal.reshape(10, 64)):
        own = np.sort(row[~causal])
        grid = (np.arange(len(own)) + 0.5) / len(own)
        assert np.abs(own - grid).max() < 2 / len(own)  # one in each stratum, up to one
    assert (times.reshape(-1)[is_causal] == 0).all() and times.max() < 1


def samples_of(count: int):
    from megatron.model.batch import Samples

    return Samples(make_tokens(count).numpy(), np.arange(count))


@torch.no_grad()
def test_attention_is_causal_or_full_by_sample():
    """A later token changes an earlier prediction in the samples of masked diffusion only, packed or not."""
    objective, tokens, ids = build(0.5, "--independent-t"), make_tokens(24), torch.arange(24)
    segments = np.repeat([[0, 1]], 24, axis=0).repeat([20, 13], axis=1)
    for packed, mask in (({}, objective.attention_mask), ({"segment_ids": segments}, PerSample(0.5))):
        model = tiny_model(mask, vocab=64, seq=SEQ)
        batch = prepare(objective, tokens, ids, **packed)
        is_causal = batch.inputs.is_causal == 1
        assert is_causal.any() and not is_causal.all()
        other = batch.inputs.input_ids.clone()
        other[:, -1] = (other[:, -1] + 7) % 50
        inputs = {"is_causal": batch.inputs.is_causal}
        change = model.logits(batch.inputs.input_ids, **inputs) - model.logits(other, **inputs)
        moved = change.abs().amax(-1)[:, :-1]
        assert moved[is_causal].max() == 0 and (moved[~is_causal].amax(-1) > 1e-4).all()


@pytest.mark.parametrize(("judged", "kind", "other"), [("ar", CausalDecoding, MaskedDecoding),
                                                       ("mdm", MaskedDecoding, CausalDecoding)])  # fmt: skip
def test_it_is_judged_in_one_form_and_the_other_stands_beside(judged, kind, other):
    objective = build(0.5, "--dual-decoding", judged)
    assert isinstance(objective.decoding, kind) and objective.decoding.shift == 1
    assert objective.beside is not None and isinstance(objective.beside.decoding, other)
    assert {objective.for_eval().label, objective.beside.label} == {EXACT, BOUND}
    tokens, ids = make_tokens(8), torch.arange(8)
    forms = {"ar": make_objective(objective="ar"), "mdm": make_objective("--shifted-labels").for_eval(1, 2)}
    assert_same_batch(prepare(objective.for_eval(1, 2), tokens, ids), prepare(forms[judged], tokens, ids))
    rest = forms["mdm" if judged == "ar" else "ar"]
    assert_same_batch(prepare(objective.beside.for_eval(1, 2), tokens, ids), prepare(rest, tokens, ids))


@pytest.mark.parametrize(
    "flags",
    [
        ["--dual-ar-share", "1.1"],
        ["--dual-ar-share", "-0.1"],
        ["--dual-decoding", "both"],
        ["--dual-ar-share", "1", "--dual-decoding", "mdm"],
        ["--dual-decoding", "ar", "--dual-ar-share", "0"],
    ],
)
def test_wrong_flags_are_refused(flags):
    with pytest.raises(UserError, match=flags[0]):
        make_objective("--objective", "dual", *flags)


@pytest.mark.parametrize("share", ["0", "0.5"])
def test_records_that_name_a_form_which_nobody_chose_go_on(share):
    """As those of before do: it was the default, also where no sample was trained so."""
    config = make_config("--objective", "dual", "--dual-ar-share", share)
    record = config_to_dict(config)
    record["objective"]["dual_decoding"] = "ar"
    assert changed_settings(record, config) == {}
    objective = replace(config.objective, options={**config.objective.options, "dual_decoding": "ar"})
    before = build_objective(replace(config, objective=objective))
    assert before.for_eval().label == (BOUND if share == "0" else EXACT)
