"""Equal weights of masked tokens: ``mdm --loss-weighting flat``, and its alias."""

import numpy as np
import pytest
import torch
from objective_helpers import (
    MASK_ID,
    assert_same_batch,
    conditionals_of,
    exact_bound,
    make_config,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
    within_standard_errors,
)

from megatron.config import config_from_dict, config_to_dict
from megatron.model.mask import Full
from megatron.objectives import build_objective
from megatron.objectives.curves import Cosine
from megatron.objectives.maskgit import MaskGIT
from megatron.objectives.schedules import Linear, mask_probability, mean_mask_probability
from megatron.testing.oracles import all_masks
from megatron.training.resolve import changed_settings

FLAT = ["--loss-weighting", "flat"]


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
    losses, count = -conditionals_of(model, tokens[:4], 5).sum(-1), all_masks(4).sum(-1).numpy()
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


def test_it_is_an_alias():
    """``mdm`` with the flags, weight for weight, in loss and in name of the loss."""
    named, plain = make_objective("--objective", "maskgit"), make_objective(*FLAT, "--noise-schedule", "cosine")
    tokens, ids = make_tokens(24), torch.arange(24)
    assert_same_batch(prepare(named, tokens, ids), prepare(plain, tokens, ids))
    assert named.label == plain.label == "not a likelihood bound"
    assert make_objective("--loss-weighting", "elbo") == make_objective()


def test_flat_goes_with_the_other_flags_of_masked_diffusion():
    objective = make_objective(*FLAT, "--random-length-ratio", "0.5", "--ar-ratio", "0.5")
    batch = prepare(objective, make_tokens(64), torch.arange(64))
    weights = batch.targets.loss_weights
    assert weights[weights > 0].unique().tolist() == pytest.approx([1 / mean_mask_probability(Linear())])
    assert batch.inputs.segment_ids is not None


def test_records_of_before_there_was_a_choice_mean_the_bound():
    """They build the same objective as ever; going on with other weights is a change of results, and is named."""
    for name, weighting in (("mdm", "elbo"), ("maskgit", "flat")):
        now = make_config("--objective", name)
        old = config_to_dict(now)
        old["objective"].pop("loss_weighting", None)
        assert build_objective(config_from_dict(old)).weighting == weighting
        assert changed_settings(old, now) == {}
    old = config_to_dict(make_config())
    del old["objective"]["loss_weighting"]
    assert changed_settings(old, make_config(*FLAT)) == {"objective.loss_weighting": ("elbo", "flat", "results")}


def test_evaluation_is_the_bound_of_masked_diffusion():
    """What ``elbo`` runs are judged by, draw by draw: so the two can be compared."""
    tokens, ids = make_tokens(8), torch.arange(8)
    for flags in (["--objective", "maskgit"], FLAT):
        evaluated = make_objective(*flags).for_eval()
        assert evaluated.label == "NLL bound" and evaluated.schedule == Linear()
        assert_same_batch(prepare(evaluated, tokens, ids), prepare(make_objective().for_eval(), tokens, ids))


def test_flags_of_the_bound_only_are_refused():
    for flags in (["--ar-ratio", "0.5"], ["--random-length-ratio", "0.01"], ["--block-size", "4"], FLAT):
        with pytest.raises(ValueError, match=flags[0]):
            make_objective("--objective", "maskgit", *flags)
