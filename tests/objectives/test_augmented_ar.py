"""AR with augmented samples: what is read, what is predicted, and what may be called a bound."""

import numpy as np
import pytest
import torch
from objective_helpers import (
    MASK_ID,
    SEQ,
    assert_same_batch,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
    within_standard_errors,
)

from megatron.errors import UserError
from megatron.model.mask import Causal
from megatron.objectives.augmented_ar import AugmentedAR
from megatron.testing.checks import check_sums_to_one

OFF = {"random-token-ratio": "0", "reverse-ratio": "0", "max-target-offset": "1"}


def build(**flags: str) -> AugmentedAR:
    """Everything off but what is given."""
    words = [
        word for name, value in {**OFF, "noise-vocab-size": "50", **flags}.items() for word in (f"--{name}", value)
    ]
    built = make_objective("--objective", "augmented_ar", *words)
    assert isinstance(built, AugmentedAR)
    return built


def test_the_paper_s_settings_are_the_defaults():
    built = make_objective("--objective", "augmented_ar", "--noise-vocab-size", "50")
    assert isinstance(built, AugmentedAR)
    assert (built.random_ratio, built.reverse_ratio, built.max_offset) == (0.05, 0.5, 5)


def test_random_tokens_replace_their_share_of_the_inputs():
    tokens, ids = make_tokens(2000), torch.arange(2000)
    objective = build(**{"random-token-ratio": "0.1"})
    batch, plain = prepare(objective, tokens, ids), prepare(make_objective(objective="ar"), tokens, ids)
    is_other = batch.inputs.input_ids != plain.inputs.input_ids
    assert within_standard_errors(is_other.double().mean(-1).numpy(), 0.1 * 49 / 50)  # one in 50 draws its own token
    assert_same_batch(batch._replace(inputs=plain.inputs), plain)
    drawn = batch.inputs.input_ids[is_other].bincount(minlength=50) / is_other.sum()
    assert (drawn - 1 / 50).abs().max() < 0.006
    assert objective.label == "NLL bound"


def test_half_of_the_samples_are_read_from_right_to_left():
    tokens, ids = make_tokens(2000), torch.arange(2000)
    objective = build(**{"reverse-ratio": "0.5"})
    batch = prepare(objective, tokens, ids)
    is_reversed = batch.inputs.input_ids[:, 0] == MASK_ID
    assert within_standard_errors(is_reversed.double().numpy(), 0.5)
    own = tokens.flip(1)[is_reversed]
    assert torch.equal(batch.inputs.input_ids[is_reversed][:, 1:], own[:, : SEQ - 1])
    assert torch.equal(batch.targets.labels[is_reversed], own[:, :SEQ])  # the seq tokens that AR predicts
    assert torch.equal(batch.targets.labels[~is_reversed], tokens[~is_reversed][:, 1:])
    assert torch.equal(batch.inputs.input_ids[~is_reversed], tokens[~is_reversed][:, :-1])  # nothing is said: plain AR
    assert (batch.targets.loss_weights == 1).all() and objective.label == "NLL bound"


def test_targets_lie_so_far_ahead_as_the_sample_says():
    tokens, ids = make_tokens(6000), torch.arange(6000)
    objective = build(**{"max-target-offset": "4"})
    batch = prepare(objective, tokens, ids)
    first = batch.inputs.input_ids[:, 0]
    offsets = torch.where(first > MASK_ID, first - MASK_ID + 1, 1)
    shares = np.exp(-np.arange(4)) / np.exp(-np.arange(4)).sum()
    for offset in range(1, 5):
        own = offsets == offset
        assert within_standard_errors(own.double().numpy(), shares[offset - 1]), offset
        said = int(offset > 1)
        read = torch.cat((first[own][:, None][:, :said], tokens[own]), dim=1)
        last = min(SEQ, read.shape[1] - offset)
        assert torch.equal(batch.inputs.input_ids[own], read[:, :SEQ])
        assert torch.equal(batch.targets.labels[own][:, :last], read[:, offset : offset + last])
        assert (batch.targets.loss_weights[own][:, :last] == 1).all() and last >= SEQ - 2
        assert (batch.targets.loss_weights[own][:, last:] == 0).all()
    assert objective.label == "not a likelihood bound"


def test_no_label_and_no_replacement_is_a_token_that_says_something():
    batch = prepare(
        build(**{"random-token-ratio": "1", "reverse-ratio": "1", "max-target-offset": "5"}),
        make_tokens(400), torch.arange(400),
    )  # fmt: skip
    ids = batch.inputs.input_ids
    assert (ids[:, 0] == MASK_ID).all() and (batch.targets.labels < MASK_ID).all()
    says_offset = ids[:, 1] > MASK_ID
    assert 0.3 < says_offset.double().mean() < 0.45 and (ids[:, 2:] < MASK_ID).all()
    assert (batch.targets.loss_weights[says_offset][:, 0] == 0).all()  # before the offset is said nothing is asked


@torch.no_grad()
def test_a_loss_under_given_noise_is_a_likelihood():
    """Over all texts of four tokens after a given first one the probabilities sum to 1, in either direction and with replaced
    inputs: so the loss at offset 1 bounds that of the mixture over noise (Jensen)."""
    model = tiny_model(Causal(), vocab=8, seq=4)
    objective = AugmentedAR(
        direction_token_id=5, vocab_size=4, random_ratio=0.4, reverse_ratio=0.5, max_offset=1, seed=3
    )
    seen = set()
    for sample in range(6):

        def log_likelihoods(texts, sample=sample):
            tokens = torch.tensor([[2, *text] for text in texts])
            batch = prepare(objective, tokens, torch.full((len(texts),), sample))
            seen.add(bool(batch.inputs.input_ids[0, 0] == 5))
            log_p = model.logits(batch.inputs.input_ids)[..., :4].double().log_softmax(-1)
            return log_p.gather(-1, batch.targets.labels[..., None])[..., 0].sum(-1).tolist()

        check_sums_to_one(log_likelihoods, vocab_size=4, length=4)
    assert seen == {True, False}


def test_evaluation_is_plain_ar_and_exact():
    objective = make_objective("--objective", "augmented_ar", "--noise-vocab-size", "50")
    evaluated, tokens, ids = objective.for_eval(), make_tokens(4), torch.arange(4)
    assert evaluated.label == "NLL (exact)"
    assert_same_batch(prepare(evaluated, tokens, ids), prepare(make_objective(objective="ar"), tokens, ids))


def test_targets_in_another_document_are_left_out_where_attention_stays_inside():
    segments = np.repeat([[0, 1]], 40, axis=0).repeat([20, 13], axis=1)
    objective = build(**{"max-target-offset": "5"})
    batch = prepare(objective, make_tokens(40), torch.arange(40), segment_ids=segments)
    own, said = batch.inputs.segment_ids, (batch.inputs.input_ids >= MASK_ID).sum(-1)
    for row in range(40):
        if said[row]:
            offset = int(batch.inputs.input_ids[row, 0]) - MASK_ID + 1
            last = int((own[row] == 0).sum())  # places of the first document, what is said included
            assert (batch.targets.loss_weights[row, last - offset : last] == 0).all()
            assert (batch.targets.loss_weights[row, : last - offset] == 1).all()
        else:
            assert (batch.targets.loss_weights[row] == 1).all()
    assert said.any() and not said.all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "every augmentation off"),
        ({"max-target-offset": "0"}, "--max-target-offset"),
        ({"max-target-offset": "64", "padded-vocab-size": "64"}, "rows 50 to 113.*--padded-vocab-size 128"),
        ({"reverse-ratio": "0.5", "noise-vocab-size": "51"}, "behind the tokens"),
    ],
)
def test_what_cannot_be_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        build(**flags)
