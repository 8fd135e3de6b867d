"""Uniform weighting of masked tokens."""

import numpy as np
import pytest
import torch
from objective_helpers import (
    MASK_ID,
    all_masks,
    assert_same_batch,
    exact_bound,
    losses_under_all_masks,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
    within_standard_errors,
)

from megatron.model.mask import Full
from megatron.objectives.maskgit import MaskGIT
from megatron.objectives.schedules import Cosine, Linear, mask_probability, mean_mask_probability


def test_every_masked_token_weighs_the_same_and_one_in_expectation():
    objective = make_objective("--objective", "maskgit", batch=64)
    assert isinstance(objective, MaskGIT) and objective.schedule == Cosine()
    batch = prepare(objective, make_tokens(6400), torch.arange(6400))
    is_masked = batch.inputs.input_ids == MASK_ID
    weight = 1 / mean_mask_probability(Cosine())
    assert torch.equal(batch.targets.loss_weights, is_masked * torch.tensor(weight).float())
    assert within_standard_errors(batch.targets.loss_weights.double().view(-1, 64 * 32).mean(-1).numpy(), 1.0)


def test_masks_are_those_of_the_schedule():
    flags = ["--noise-schedule", "cosine"]
    bound = prepare(make_objective(*flags), make_tokens(16), torch.arange(16))
    uniform = prepare(make_objective("--objective", "maskgit"), make_tokens(16), torch.arange(16))
    assert torch.equal(uniform.inputs.input_ids, bound.inputs.input_ids)


@torch.no_grad()
def test_the_value_is_its_own_expectation_and_not_the_bound():
    model, tokens = tiny_model(Full(), vocab=8, seq=4), torch.tensor([2, 0, 4, 1, 3])
    losses, count = losses_under_all_masks(model, tokens[:4], 5), all_masks(4).sum(-1).numpy()
    nodes, quadrature = np.polynomial.legendre.leggauss(40)
    p = mask_probability(Cosine(), (nodes + 1) / 2)[:, None]
    mean_loss = (quadrature / 2 * (p**count * (1 - p) ** (4 - count) * losses).sum(-1)).sum()
    expected = mean_loss / mean_mask_probability(Cosine()) / 4
    objective = MaskGIT(mask_token_id=5, global_batch_size=16, seed=7, schedule=Cosine())
    batch = prepare(objective, tokens.expand(4800, 5).contiguous(), torch.arange(4800))
    per_step = model.sample_losses(batch).double().numpy().reshape(-1, 16).mean(-1)
    assert within_standard_errors(per_step, expected)
    assert expected < 0.99 * exact_bound(model, tokens[:4], 5)  # here it even lies below the bound
    assert objective.label == "not a likelihood bound"


def test_evaluation_is_the_bound_of_masked_diffusion():
    evaluated = make_objective("--objective", "maskgit").for_eval()
    assert evaluated.label == "NLL bound" and evaluated.schedule == Linear()
    tokens, ids = make_tokens(8), torch.arange(8)
    assert_same_batch(prepare(evaluated, tokens, ids), prepare(make_objective().for_eval(), tokens, ids))


def test_flags_of_the_bound_only_are_refused():
    for flags in (["--ar-ratio", "0.5"], ["--random-length-ratio", "0.01"], ["--block-size", "4"]):
        with pytest.raises(ValueError, match=flags[0]):
            make_objective("--objective", "maskgit", *flags)
