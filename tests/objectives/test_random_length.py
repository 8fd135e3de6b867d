"""Sequences cut at a random length: --random-length-ratio."""

import numpy as np
import pytest
import torch
from objective_helpers import SEQ, assert_same_batch, make_objective, make_tokens, prepare, tiny_model

from megatron.model.mask import Full, WithinSegments

ALL = ["--random-length-ratio", "1.0"]


def first_lengths(batch) -> np.ndarray:
    """Where positions begin again, or SEQ."""
    restarts = (batch.inputs.position_ids == 0).int()
    restarts[:, 0] = 0
    return torch.where(restarts.any(-1), restarts.argmax(-1), torch.full((len(restarts),), SEQ)).numpy()


def test_lengths_are_uniform_and_positions_begin_again():
    objective = make_objective(*ALL)
    assert objective.attention_mask == WithinSegments(Full()) and objective.label == "NLL bound"
    batch = prepare(objective, make_tokens(3200), torch.arange(3200))
    lengths = first_lengths(batch)
    counts = np.bincount(lengths, minlength=SEQ + 1)[1:]
    assert ((counts - 100) ** 2 / 100).sum() < 61.1  # chi-squared with 31 degrees of freedom, 0.1 %
    for row, length in zip(batch.inputs.position_ids[:20].tolist(), lengths):
        assert row == list(range(length)) + list(range(SEQ - length))


def test_nothing_is_lost_and_masks_stay():
    """A cut moves positions and attention only: every token keeps its mask, its weight and its place in the loss."""
    plain = prepare(make_objective(), make_tokens(8), torch.arange(8))
    cut = prepare(make_objective(*ALL), make_tokens(8), torch.arange(8))
    assert torch.equal(cut.inputs.input_ids, plain.inputs.input_ids)
    for name, moved, kept in zip(cut.targets._fields, cut.targets, plain.targets):
        assert (moved is kept is None) or torch.equal(moved, kept), name


def test_the_ratio_is_met_and_uncut_batches_carry_no_positions():
    objective = make_objective("--random-length-ratio", "0.05")
    batches = [prepare(objective, make_tokens(1), torch.tensor([i])) for i in range(1000)]
    share = np.mean([batch.inputs.position_ids is not None for batch in batches])
    assert share == pytest.approx(0.05, abs=0.02)  # so these run under full attention without a mask
    uncut = next(batch for batch in batches if batch.inputs.position_ids is None)
    assert_same_batch(uncut, prepare(make_objective(), make_tokens(1), uncut.inputs.sample_ids))


@torch.no_grad()
def test_both_parts_are_sequences_of_their_own():
    objective = make_objective(*ALL)
    model = tiny_model(objective.attention_mask, vocab=64, seq=SEQ)
    alone = tiny_model(Full(), vocab=64, seq=SEQ)
    batch = prepare(objective, make_tokens(4), torch.arange(4))
    segments = batch.inputs.segment_ids
    logits = model.logits(batch.inputs.input_ids, position_ids=batch.inputs.position_ids, segment_ids=segments)
    for row, length in enumerate(first_lengths(batch)):
        ids = batch.inputs.input_ids[row]
        parts = [alone.logits(part[None])[0] for part in (ids[:length], ids[length:]) if len(part)]
        torch.testing.assert_close(logits[row], torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_evaluation_cuts_nothing():
    evaluated = make_objective(*ALL).for_eval()
    assert evaluated.attention_mask == Full()
    tokens, ids = make_tokens(8), torch.arange(8)
    assert_same_batch(prepare(evaluated, tokens, ids), prepare(make_objective().for_eval(), tokens, ids))
