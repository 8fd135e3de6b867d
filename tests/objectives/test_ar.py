"""Plain AR."""

import torch
from objective_helpers import SEQ, assert_same_batch, make_objective, make_tokens

from megatron.model import Causal


def test_labels_are_the_next_tokens():
    tokens = make_tokens(3)
    objective = make_objective(objective="ar")
    batch = objective.prepare(tokens, torch.tensor([4, 0, 9]))
    assert torch.equal(batch.input_ids, tokens[:, :-1]) and torch.equal(batch.labels, tokens[:, 1:])
    assert torch.equal(batch.loss_weights, torch.ones(3, SEQ)) and batch.normalizer == 3 * SEQ
    assert batch.loss_positions.tolist() == list(range(3 * SEQ)) and batch.position_ids is None
    assert isinstance(objective.attention_mask, Causal) and objective.label == "NLL (exact)"
    assert_same_batch(objective.for_eval(1, 2).prepare(tokens, batch.sample_ids), batch)
