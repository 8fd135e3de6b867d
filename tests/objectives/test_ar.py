"""Plain AR."""

import torch
from objective_helpers import SEQ, assert_same_batch, make_objective, make_tokens, prepare

from megatron.model.mask import Causal


def test_labels_are_the_next_tokens():
    tokens = make_tokens(3)
    objective = make_objective(objective="ar")
    batch = prepare(objective, tokens, torch.tensor([4, 0, 9]))
    assert torch.equal(batch.inputs.input_ids, tokens[:, :-1]) and torch.equal(batch.targets.labels, tokens[:, 1:])
    assert torch.equal(batch.targets.loss_weights, torch.ones(3, SEQ)) and batch.targets.num_tokens.sum() == 3 * SEQ
    assert batch.targets.positions.tolist() == list(range(3 * SEQ)) and batch.inputs.position_ids is None
    assert isinstance(objective.attention_mask, Causal) and objective.label == "NLL (exact)"
    assert_same_batch(prepare(objective.for_eval(1, 2), tokens, batch.inputs.sample_ids), batch)
