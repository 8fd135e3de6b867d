"""AR with masked inputs."""

import numpy as np
import pytest
import torch
from objective_helpers import MASK_ID, SEQ, assert_same_batch, make_objective, make_tokens, prepare

from megatron.model.mask import Causal
from megatron.objectives.masked_input_ar import MaskedInputAR

FLAGS = ["--input-mask-ratio", "0.6"]


@pytest.fixture
def objective() -> MaskedInputAR:
    built = make_objective(*FLAGS, objective="ar")
    assert isinstance(built, MaskedInputAR)
    return built


def test_labels_and_weights_are_those_of_ar(objective):
    tokens = make_tokens(64)
    batch = prepare(objective, tokens, torch.arange(64))
    is_masked = batch.inputs.input_ids == MASK_ID
    assert torch.equal(batch.targets.labels, tokens[:, 1:]) and torch.equal(
        batch.targets.loss_weights, torch.ones(64, SEQ)
    )
    assert torch.equal(batch.inputs.input_ids[~is_masked], tokens[:, :-1][~is_masked])
    assert isinstance(objective.attention_mask, Causal) and objective.label == "NLL bound"
    assert batch.inputs.position_ids is None


def test_the_ratio_of_a_sequence_is_uniform_up_to_the_flag(objective):
    tokens = make_tokens(400, seq=2000)
    ratios = np.sort(
        (prepare(objective, tokens, torch.arange(400)).inputs.input_ids == MASK_ID).float().mean(-1).numpy()
    )
    uniform = 0.6 * (np.arange(400) + 0.5) / 400
    assert np.abs(ratios - uniform).max() < 0.6 * 1.95 / 20 + 0.03  # Kolmogorov-Smirnov 0.1 %, and binomial noise


def test_every_position_is_masked_alike(objective):
    share = (prepare(objective, make_tokens(4000), torch.arange(4000)).inputs.input_ids == MASK_ID).float().mean(0)
    assert share.sub(0.3).abs().max() < 0.04


def test_noise_does_not_depend_on_layout(objective):
    tokens = make_tokens(16)
    whole = prepare(objective, tokens, torch.arange(16))
    part = prepare(objective, tokens[[9, 2]], torch.tensor([9, 2]))
    assert torch.equal(part.inputs.input_ids, whole.inputs.input_ids[[9, 2]])
    assert len({tuple((row == MASK_ID).tolist()) for row in whole.inputs.input_ids}) == 16


def test_evaluation_is_plain_ar(objective):
    evaluated, tokens, ids = objective.for_eval(), make_tokens(4), torch.arange(4)
    assert evaluated.label == "NLL (exact)"
    assert_same_batch(prepare(evaluated, tokens, ids), prepare(make_objective(objective="ar"), tokens, ids))


def test_without_a_ratio_it_is_refused():
    with pytest.raises(ValueError, match="--input-mask-ratio"):
        make_objective("--objective", "masked_input_ar", objective="ar")
