"""Samples that hold several documents, for every objective: attention, positions and loss keep to the documents."""

import numpy as np
import pytest
import torch
from objective_helpers import MASK_ID, SEQ, make_objective, make_tokens, prepare, tiny_model
from test_registry import flags_of

from megatron.data.loader import places_in_documents
from megatron.model.mask import within_segments
from megatron.objectives import OBJECTIVES
from megatron.objectives.permuted_ar import PermutedAR, document_by_document

LENGTHS = [[10, 13, 10], [1, 32], [33], [16, 16, 1]]
SEGMENTS = np.stack([np.repeat(np.arange(len(lengths)), lengths) for lengths in LENGTHS])
PACKED = {"segment_ids": SEGMENTS, "position_ids": places_in_documents(SEGMENTS)}
NAMES = [*sorted(OBJECTIVES), "random_length"]
MOVED = ("permuted_ar", "augmented_ar")  # where a place of the batch is not that of the sample


def build(name: str):
    if name == "random_length":
        return make_objective("--random-length-ratio", "0.7")
    return make_objective(*flags_of(name))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_no_token_sees_another_document(name):
    """Other tokens in one document leave the losses of all others as they are, bit by bit in the sums."""
    objective = build(name)
    model = tiny_model(within_segments(objective.attention_mask), vocab=64, seq=SEQ)
    tokens, ids = make_tokens(4), torch.arange(4)
    other = tokens.clone()
    other[0, 10:23] = (other[0, 10:23] + 7) % 50
    before, after = (prepare(objective, rows, ids, **PACKED) for rows in (tokens, other))
    assert torch.equal(before.inputs.position_ids, after.inputs.position_ids)
    difference = (model.token_losses(after) - model.token_losses(before)).abs()
    segments = before.inputs.segment_ids[0, : difference.shape[1]]
    changed = segments[difference[0] > 1e-6].unique().tolist()
    inside = [int(s) for s in segments.unique() if torch.isin(before.inputs.position_ids[0], torch.arange(13)).any()]
    assert changed and set(changed) < set(inside)
    assert difference.unflatten(0, (-1, 4))[:, 1:].max() == 0  # of all views of the other samples
    # AR predicts the first token of the next document from the end of the one before; nothing else leaks.
    document = torch.from_numpy(SEGMENTS[0][:-1] if name not in MOVED else segments.numpy())
    is_reversed = name == "augmented_ar" and before.inputs.input_ids[0, 0] == MASK_ID
    untouched = document == (0 if is_reversed else 2)
    assert difference[0][: len(document)][untouched].max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_those_of_the_documents(name):
    batch = prepare(build(name), make_tokens(4), torch.arange(4), **PACKED)
    positions, segments = batch.inputs.position_ids, batch.inputs.segment_ids
    assert positions.shape == segments.shape == batch.inputs.input_ids.shape
    for row in range(4):
        for part in segments[row].unique():
            own = positions[row][segments[row] == part]
            copies = 2 if name == "block_diffusion" else 1
            # The last token of an order is a label only, and a row with something said before it ends within a document.
            assert sorted(own.tolist()) == sorted(list(range(len(own) // copies)) * copies) or name == "permuted_ar"


@pytest.mark.parametrize("name", NAMES)
def test_tokens_without_a_loss_are_not_counted(name):
    tokens, ids = make_tokens(4), torch.arange(4)
    loss_mask = (tokens != 3).numpy()
    plain = prepare(build(name), tokens, ids)
    batch = prepare(build(name), tokens, ids, loss_mask=loss_mask)
    kept = batch.targets.loss_weights > 0
    assert torch.equal(batch.targets.loss_weights[kept], plain.targets.loss_weights[kept])
    lost = ~kept & (plain.targets.loss_weights > 0)
    assert torch.equal(batch.targets.positions, kept.flatten().nonzero().flatten())
    assert batch.targets.num_tokens.sum() < 4 * SEQ and lost.any()
    if name not in MOVED:
        assert torch.equal(batch.targets.num_tokens[:4], torch.from_numpy(loss_mask[:, :-1].sum(1)).float())
        assert (tokens[:, :-1].repeat(len(lost) // 4, 1)[lost[:, :SEQ]] == 3).all()
    elif name == "permuted_ar":
        assert (batch.inputs.input_ids[lost] == 3).all()
    else:  # right to left the token without a loss is the label, left to right the input, which may be replaced
        is_reversed = plain.inputs.input_ids[:, 0] == MASK_ID
        assert (batch.targets.labels[is_reversed][lost[is_reversed]] == 3).all() and is_reversed.any()
        said = (plain.inputs.input_ids >= MASK_ID).sum(-1, keepdim=True)
        shown = tokens.gather(1, (torch.arange(SEQ) - said).clamp(min=0))
        assert (shown[~is_reversed][lost[~is_reversed]] == 3).all()


@pytest.mark.parametrize("predefined", [True, False])
def test_orders_run_through_one_document_after_the_other(predefined):
    objective = PermutedAR(num_orders=6, predefined=predefined, seed=1)
    orders = np.stack([objective.order(index, SEQ + 1) for index in (0, 2, 3, 5)])
    kept = document_by_document(orders, SEGMENTS)
    assert np.array_equal(np.sort(kept, axis=1), np.broadcast_to(np.arange(SEQ + 1), kept.shape))
    moved = np.take_along_axis(SEGMENTS, kept, axis=1)
    assert np.array_equal(moved, SEGMENTS)  # documents in their order, each in its place
    starts = np.diff(SEGMENTS, axis=1, prepend=-1) != 0
    assert np.array_equal(kept[starts], np.nonzero(starts)[1])  # the first token of each first
    assert np.array_equal(kept[0], np.arange(SEQ + 1)) and not np.array_equal(kept[3], np.arange(SEQ + 1))
    assert np.array_equal(kept[2], orders[2])  # one document: the order itself


def test_a_random_cut_splits_one_document_and_moves_no_other():
    plain = prepare(
        make_objective(), make_tokens(64), torch.arange(64), **{k: v.repeat(16, 0) for k, v in PACKED.items()}
    )
    cut = prepare(
        make_objective("--random-length-ratio", "1.0"),
        make_tokens(64), torch.arange(64), **{k: v.repeat(16, 0) for k, v in PACKED.items()},
    )  # fmt: skip
    for row in range(64):
        before, after = plain.inputs.segment_ids[row], cut.inputs.segment_ids[row]
        assert len(after.unique()) in (len(before.unique()), len(before.unique()) + 1)
        assert torch.equal(cut.inputs.position_ids[row], torch.from_numpy(places_in_documents(after[None].numpy())[0]))


def test_the_mask_token_is_no_label_of_a_packed_sample():
    batch = prepare(make_objective(), make_tokens(4), torch.arange(4), **PACKED)
    assert (batch.inputs.input_ids == MASK_ID).any() and (batch.targets.labels < MASK_ID).all()
