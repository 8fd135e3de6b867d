"""AR with masked-input regularisation."""

import numpy as np
import pytest
import torch
from objective_helpers import MASK_ID, SEQ, assert_same_batch, make_objective, make_tokens, prepare, tiny_model

from megatron.config.shape import Shape
from megatron.errors import UserError
from megatron.model.mask import Causal
from megatron.objectives.base import compute_per_token, flops_per_token
from megatron.objectives.mir_ar import MaskedInputRegularizedAR


def build(*flags: str) -> MaskedInputRegularizedAR:
    built = make_objective("--objective", "mir_ar", *flags)
    assert isinstance(built, MaskedInputRegularizedAR)
    return built


def test_the_paper_s_settings_are_the_defaults():
    assert (build().weight, build().max_ratio) == (0.4, 0.5)


def test_the_first_rows_are_ar_and_the_second_those_of_masked_inputs():
    tokens, ids = make_tokens(16), torch.arange(16)
    batch = prepare(build("--mir-weight", "0.7", "--mir-mask-ratio", "0.6"), tokens, ids)
    plain = prepare(make_objective(objective="ar"), tokens, ids)
    masked = prepare(make_objective("--input-mask-ratio", "0.6", objective="ar"), tokens, ids)
    for part, own in zip(batch.inputs, zip(plain.inputs, masked.inputs)):
        assert part is None or torch.equal(part, torch.cat(own))
    assert torch.equal(batch.targets.labels, tokens[:, 1:].repeat(2, 1))
    assert torch.equal(
        batch.targets.loss_weights, torch.tensor([1.0, 0.7]).repeat_interleave(16)[:, None].expand(32, SEQ)
    )
    assert torch.equal(batch.targets.num_tokens, torch.tensor([SEQ, 0.0]).repeat_interleave(16))
    assert torch.equal(batch.targets.positions, torch.arange(32 * SEQ))


@torch.no_grad()
def test_the_loss_is_that_of_ar_plus_lambda_times_that_of_masked_inputs():
    model, tokens, ids = tiny_model(Causal(), vocab=64, seq=SEQ), make_tokens(8), torch.arange(8)
    found = model.loss(prepare(build("--mir-weight", "0.7"), tokens, ids))
    plain = model.loss(prepare(make_objective(objective="ar"), tokens, ids))
    masked = model.loss(prepare(make_objective("--input-mask-ratio", "0.5", objective="ar"), tokens, ids))
    assert found.item() == pytest.approx(plain.item() + 0.7 * masked.item(), abs=1e-6)
    assert abs(masked - plain) > 0.01


def test_the_loss_does_not_depend_on_micro_batches():
    model, tokens, ids = tiny_model(Causal(), vocab=64, seq=SEQ), make_tokens(8), torch.arange(8)
    whole = model.loss(prepare(build(), tokens, ids))
    parts = [model.loss(prepare(build(), tokens[rows], ids[rows])) for rows in (slice(0, 4), slice(4, 8))]
    assert whole.item() == pytest.approx(np.mean([part.item() for part in parts]), abs=1e-6)


def test_a_step_costs_twice_ar():
    shape = Shape.from_flags(tiny_model(Causal(), vocab=64, seq=SEQ).model.shape.recorded(), padded_vocab_size=64)
    assert flops_per_token(shape, build()) == 2 * flops_per_token(shape, make_objective(objective="ar"))
    assert compute_per_token(7, build()) == 2 * compute_per_token(7, make_objective(objective="ar")) == 84


def test_evaluation_is_plain_ar_and_exact():
    objective, tokens, ids = build(), make_tokens(4), torch.arange(4)
    assert objective.label == "not a likelihood bound" and objective.for_eval().label == "NLL (exact)"
    assert_same_batch(prepare(objective.for_eval(), tokens, ids), prepare(make_objective(objective="ar"), tokens, ids))
    assert not (prepare(objective.for_eval(), tokens, ids).inputs.input_ids == MASK_ID).any()


@pytest.mark.parametrize("flags", [("--mir-mask-ratio", "0"), ("--mir-weight", "0"), ("--mir-weight", "-1")])
def test_what_would_be_plain_ar_is_refused(flags):
    with pytest.raises(UserError, match=flags[0]):
        build(*flags)
