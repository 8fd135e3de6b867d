"""Exact numbers of masked tokens."""

import numpy as np
import pytest
import torch
from objective_helpers import (
    MASK_ID,
    SEQ,
    assert_same_batch,
    conditionals_of,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
    within_standard_errors,
)

from megatron.model.mask import Full
from megatron.objectives.exact_count import ExactCountMDM
from megatron.testing.oracles import all_masks, by_order


def test_m_of_l_tokens_are_masked_and_weigh_l_over_m():
    objective = make_objective("--objective", "exact_count_mdm", batch=64)
    assert isinstance(objective, ExactCountMDM) and objective.label == "NLL bound"
    batch = prepare(objective, make_tokens(640), torch.arange(640))
    is_masked = batch.inputs.input_ids == MASK_ID
    count = is_masked.sum(-1, keepdim=True)
    assert count.min() >= 1 and count.max() <= SEQ
    torch.testing.assert_close(batch.targets.loss_weights, is_masked * SEQ / count)
    torch.testing.assert_close(
        batch.targets.loss_weights.sum(-1), torch.full((640,), float(SEQ))
    )  # exactly, not in expectation
    # Stratified over steps of 64 = 2 · SEQ samples: every count comes twice a step.
    assert np.bincount(count[:64].flatten(), minlength=SEQ + 1).tolist() == [0] + [2] * SEQ


def test_counts_and_positions_are_uniform():
    objective = make_objective("--objective", "exact_count_mdm", "--independent-t")
    batch = prepare(objective, make_tokens(6400), torch.arange(6400))
    is_masked = batch.inputs.input_ids == MASK_ID
    counts = np.bincount(is_masked.sum(-1), minlength=SEQ + 1)[1:]
    assert ((counts - 200) ** 2 / 200).sum() < 61.1  # chi-squared with 31 degrees of freedom, 0.1 %
    share = is_masked.float().mean(0)
    assert share.sub((SEQ + 1) / (2 * SEQ)).abs().max() < 0.03
    assert objective.loss_fraction == pytest.approx(is_masked.float().mean().item(), abs=0.03)


@torch.no_grad()
def test_the_expectation_is_the_any_order_likelihood():
    """Exactly, without the floor of the random-count bound: Σ_m (1/m) · mean over subsets of size m."""
    model, tokens = tiny_model(Full(), vocab=8, seq=4), torch.tensor([2, 0, 4, 1, 3])
    losses, count = -conditionals_of(model, tokens[:4], 5).sum(-1), all_masks(4).sum(-1).numpy()
    expected = sum(losses[count == m].mean() / m for m in range(1, 5)) / 4
    assert expected == pytest.approx(-np.mean(by_order(conditionals_of(model, tokens[:4], 5))) / 4, abs=1e-5)
    objective = ExactCountMDM(mask_token_id=5, global_batch_size=8, seed=7)
    batch = prepare(objective, tokens.expand(4000, 5).contiguous(), torch.arange(4000))
    per_step = model.sample_losses(batch).double().numpy().reshape(-1, 8).mean(-1)
    assert within_standard_errors(per_step, expected)
    assert per_step.std() / len(per_step) ** 0.5 < 0.01 * expected


def test_evaluation_is_that_of_masked_diffusion():
    tokens, ids = make_tokens(8), torch.arange(8)
    evaluated = make_objective("--objective", "exact_count_mdm").for_eval(1, 3)
    assert_same_batch(prepare(evaluated, tokens, ids), prepare(make_objective().for_eval(1, 3), tokens, ids))
