"""Block diffusion between its two ends: left-to-right likelihood and masked diffusion."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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

from megatron import randomness as noise
from megatron.errors import UserError
from megatron.model.mask import BlockDiffusion, Causal, Full
from megatron.objectives.ar import Autoregressive
from megatron.objectives.block_diffusion import BlockMaskedDiffusion
from megatron.objectives.mdm import MaskedDiffusion
from megatron.testing.oracles import all_masks

TOKENS = torch.tensor([2, 0, 4, 1, 3])


def make(size: int, **options) -> BlockMaskedDiffusion:
    return BlockMaskedDiffusion(mask_token_id=5, global_batch_size=8, seed=7, block_size=size, **options)


def steps_of(model, objective, count: int = 4000) -> np.ndarray:
    """Mean loss of each of ``count`` / 8 steps on the same tokens."""
    batch = prepare(objective, TOKENS.expand(count, 5).contiguous(), torch.arange(count))
    with torch.no_grad():
        return model.sample_losses(batch).double().numpy().reshape(-1, 8).mean(-1)


def test_inputs_are_a_noised_and_a_clean_copy():
    objective = make_objective("--objective", "block_diffusion", "--block-size", "8")
    assert objective.attention_mask == BlockDiffusion(8) and objective.label == "NLL bound"
    tokens = make_tokens(4)
    batch = prepare(objective, tokens, torch.arange(4))
    noised, clean = batch.inputs.input_ids.chunk(2, dim=1)
    assert torch.equal(clean, tokens[:, :-1]) and torch.equal(batch.targets.labels[:, :SEQ], tokens[:, :-1])
    is_masked = noised == MASK_ID
    assert torch.equal(noised[~is_masked], clean[~is_masked])
    assert torch.equal(batch.targets.loss_weights > 0, torch.cat((is_masked, torch.zeros_like(is_masked)), dim=1))
    assert torch.equal(batch.inputs.position_ids, torch.arange(SEQ).repeat(2).expand(4, 2 * SEQ))
    assert batch.targets.num_tokens.sum() == 4 * SEQ  # per token of data, not per position


def test_each_block_has_its_own_time_and_weight():
    objective = make_objective("--objective", "block_diffusion", "--block-size", "8")
    t = objective.token_times(np.arange(3), SEQ).reshape(3, 4, 8)
    assert (t == t[:, :, :1]).all()  # one time in a block
    assert np.allclose(np.diff(np.sort(t[:, :, 0], axis=1), axis=1), 1 / 4)  # spread over the blocks of a sample
    assert np.allclose(t[:, 0, 0], noise.diffusion_times(1234, np.arange(3), global_batch_size=8, scheme=2))
    batch = prepare(objective, make_tokens(3), torch.arange(3))
    p = torch.from_numpy((1 - 1e-3) * t.reshape(3, SEQ) + 1e-3).float()
    noised = batch.inputs.input_ids[:, :SEQ]
    torch.testing.assert_close(batch.targets.loss_weights[:, :SEQ], (noised == MASK_ID) / p)


@pytest.mark.parametrize("size", [1, 4, 32])
def test_expected_weights_are_one(size):
    objective = make_objective("--objective", "block_diffusion", "--block-size", str(size), batch=64, seed=1235)
    batch = prepare(objective, make_tokens(3200), torch.arange(3200))
    means = batch.targets.loss_weights[:, :SEQ].double().reshape(-1, 64 * SEQ).mean(-1).numpy()
    assert within_standard_errors(means, 1.0)
    assert batch.targets.positions.numel() / (3200 * SEQ) == pytest.approx(objective.loss_fraction, abs=0.01)


@torch.no_grad()
def left_to_right_nll(tokens: torch.Tensor) -> float:
    """Exact: a causal model reads the true past and a mask token in the place of the next one; no 2 · seq layout."""
    model = tiny_model(Causal(), vocab=8, seq=4)
    total = 0.0
    for i in range(len(tokens)):
        ids = torch.cat((tokens[:i], torch.tensor([5])))
        total -= model.logits(ids[None])[0, -1].log_softmax(-1)[tokens[i]].item()
    return total / len(tokens)


def test_blocks_of_one_token_are_the_exact_likelihood():
    model = tiny_model(BlockDiffusion(1), vocab=8, seq=4)
    exact = left_to_right_nll(TOKENS[:4])
    per_step = steps_of(model, make(1), count=24_000)
    assert within_standard_errors(per_step, exact)
    assert per_step.std() / len(per_step) ** 0.5 < 0.03 * exact
    evaluated = make(1).for_eval()
    assert evaluated.label == "NLL (exact)" and evaluated.loss_fraction == 1.0
    assert np.allclose(steps_of(model, evaluated, count=8), exact, atol=1e-5)  # without noise


def test_one_block_is_masked_diffusion():
    plain = MaskedDiffusion(mask_token_id=5, global_batch_size=8, seed=7)
    for block, full in ((make(4), plain), (make(4).for_eval(1, 3), plain.for_eval(1, 3))):
        first, second = (prepare(o, TOKENS.expand(64, 5).contiguous(), torch.arange(64)) for o in (block, full))
        assert torch.equal(first.inputs.input_ids[:, :4], second.inputs.input_ids)
        assert torch.equal(first.targets.loss_weights[:, :4], second.targets.loss_weights)
        losses = [
            tiny_model(o.attention_mask, vocab=8, seq=4).sample_losses(b) for o, b in ((block, first), (full, second))
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
        assert block.label == full.label == "NLL bound"


@torch.no_grad()
def test_the_bound_of_blocks_of_two_equals_enumeration():
    """Σ over blocks of the bound of masked diffusion within the block, given the clean past.

    The conditional of the first block is a full-attention model of two tokens. That of the second one comes from logits of
    the model itself on [noised; clean] inputs made here by hand.
    """
    model, full = tiny_model(BlockDiffusion(2), vocab=8, seq=4), tiny_model(Full(), vocab=8, seq=4)
    nodes, quadrature = np.polynomial.legendre.leggauss(20)
    p = (1 - 1e-3) * (nodes + 1) / 2 + 1e-3
    weight = [0.0] + [float((quadrature / 2 * p ** (m - 1) * (1 - p) ** (2 - m)).sum()) for m in (1, 2)]
    masks, clean = all_masks(2), TOKENS[:4]
    positions = torch.arange(4).repeat(2).expand(4, 8)
    total = 0.0
    for block in range(2):
        own = slice(2 * block, 2 * block + 2)
        noised = clean.repeat(4, 1)
        noised[:, own] = noised[:, own].masked_fill(masks, 5)
        ids = torch.cat((noised, clean.repeat(4, 1)), dim=1)
        logits = model.logits(ids, position_ids=positions, sample_ids=torch.arange(4))[:, own]
        if block == 0:
            torch.testing.assert_close(logits, full.logits(noised[:, :2]), rtol=1e-4, atol=1e-4)
        ce = F.cross_entropy(logits.double().transpose(1, 2), clean[own].expand(4, 2), reduction="none")
        total += sum(weight[m] * loss.item() for m, loss in zip(masks.sum(-1).tolist(), (ce * masks).sum(-1)))
    per_step = steps_of(model, make(2), count=12_000)
    assert within_standard_errors(per_step, total / 4)
    assert per_step.std() / len(per_step) ** 0.5 < 0.03 * total / 4


@torch.no_grad()
def test_predictions_see_neither_their_own_answer_nor_the_future():
    model = tiny_model(BlockDiffusion(8), vocab=64, seq=SEQ)
    objective = make_objective("--objective", "block_diffusion", "--block-size", "8")
    batch = prepare(objective, make_tokens(1), torch.arange(1))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model.logits(ids, position_ids=batch.inputs.position_ids, sample_ids=batch.inputs.sample_ids)[0, :SEQ]

    before = logits(batch.inputs.input_ids)
    changed = batch.inputs.input_ids.clone()
    changed[0, SEQ + 10] = (changed[0, SEQ + 10] + 1) % 50  # a clean token of block 1 (positions 8 to 15)
    difference = (logits(changed) - before).abs().amax(-1)
    assert difference[:16].max() == 0.0  # its own block and the one before
    assert difference[16:].min() > 1e-5  # every later block
    changed = batch.inputs.input_ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50  # the noised copy is seen in its own block only
    difference = (logits(changed) - before).abs().amax(-1)
    assert difference[8:16].min() > 1e-5 and difference[:8].max() == 0.0 and difference[16:].max() == 0.0


def test_evaluation_is_free_of_training_flags():
    tokens, ids = make_tokens(8), torch.arange(8)
    flags = ["--objective", "block_diffusion", "--block-size", "8"]
    for estimator in ([], ["--valid-data-path", "x", "--valid-estimator", "bernoulli"]):
        plain = prepare(make_objective(*flags, *estimator).for_eval(1, 2), tokens, ids)
        for others in (["--noise-schedule", "cosine"], ["--independent-t"]):
            assert_same_batch(prepare(make_objective(*flags, *estimator, *others).for_eval(1, 2), tokens, ids), plain)
    plain = prepare(make_objective(*flags).for_eval(1, 2), tokens, ids)
    other = make_objective(*flags, seed=5, batch=4).for_eval(1, 2)
    assert_same_batch(prepare(other, tokens, ids), plain)


@pytest.mark.parametrize("flags", [[], ["--block-size", "5"], ["--block-size", "0"], ["--block-size", "64"]])
def test_wrong_block_sizes_are_refused(flags):
    with pytest.raises(ValueError, match="--block-size"):
        make_objective("--objective", "block_diffusion", *flags)


def test_an_added_loss_is_autoregression_on_the_clean_half():
    """The clean half is a causal model of its own: its losses are those of ``ar`` with the same weights, W times."""
    tokens, ids = make_tokens(4, vocab=40), torch.arange(4)
    objective = make_objective("--objective", "block_diffusion", "--block-size", "8", "--block-ar-weight", "0.25")
    assert objective.attention_mask == BlockDiffusion(8, causal=True)
    assert objective.label == "not a likelihood bound" and objective.for_eval().label == "NLL bound"
    assert objective.loss_fraction == objective.for_eval().loss_fraction == pytest.approx(1.5, abs=1e-3)
    model, causal = (tiny_model(mask, vocab=64, seq=SEQ) for mask in (objective.attention_mask, Causal()))
    without = make_objective("--objective", "block_diffusion", "--block-size", "8")
    batch, plain = prepare(objective, tokens, ids), prepare(without, tokens, ids)
    ar = prepare(Autoregressive(), tokens, ids)
    assert torch.equal(batch.inputs.input_ids, plain.inputs.input_ids)
    assert torch.equal(batch.targets.loss_weights[:, :SEQ], plain.targets.loss_weights[:, :SEQ])
    assert torch.equal(batch.targets.num_tokens, plain.targets.num_tokens)
    with torch.no_grad():
        losses, alone = model.token_losses(batch), causal.token_losses(ar)
        torch.testing.assert_close(losses[:, SEQ:], 0.25 * alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses[:, :SEQ], model.token_losses(plain)[:, :SEQ], rtol=1e-4, atol=1e-5)
        total = losses[:, :SEQ].sum() / (4 * SEQ) + 0.25 * causal.loss(ar)
        torch.testing.assert_close(model.loss(batch), total, rtol=1e-5, atol=1e-5)
        evaluated = model.token_losses(prepare(objective.for_eval(), tokens, ids))
        torch.testing.assert_close(evaluated[:, SEQ:], alone, rtol=1e-4, atol=1e-5)  # with weight 1


def test_the_added_loss_keeps_to_tokens_that_have_one():
    tokens, ids = make_tokens(2), torch.arange(2)
    has_loss = torch.rand(2, SEQ + 1, generator=torch.Generator().manual_seed(1)) < 0.6
    batch = prepare(make(8, ar_weight=2.0), tokens, ids, loss_mask=has_loss.numpy())
    assert torch.equal(batch.targets.loss_weights[:, SEQ:], 2.0 * has_loss[:, :SEQ])
    assert torch.equal(batch.targets.num_tokens, has_loss[:, :SEQ].sum(1).float())


@torch.no_grad()
def test_a_causal_clean_half_sees_nothing_behind_itself():
    model = tiny_model(BlockDiffusion(8, causal=True), vocab=64, seq=SEQ)
    ids, positions = make_tokens(1)[:, :SEQ].repeat(1, 2), torch.arange(SEQ).repeat(2)[None]
    before = model.logits(ids, position_ids=positions)[0]
    changed = ids.clone()
    changed[0, SEQ + 10] = (changed[0, SEQ + 10] + 1) % 50
    moved = (model.logits(changed, position_ids=positions)[0] - before).abs().amax(-1) > 1e-6
    assert moved.tolist() == [place >= 16 for place in range(SEQ)] + [place >= 10 for place in range(SEQ)]


@pytest.mark.parametrize("weight", ["-0.1", "nan", "inf", "1001", "much"])
def test_wrong_weights_of_the_added_loss_are_refused(weight, capsys):
    flags = ["--objective", "block_diffusion", "--block-size", "8", "--block-ar-weight", weight]
    with pytest.raises((UserError, SystemExit)) as caught:
        make_objective(*flags)
    assert "--block-ar-weight" in str(caught.value) + capsys.readouterr().err
    with pytest.raises((UserError, SystemExit)):
        make_objective("--objective", "mdm", "--block-ar-weight", "1")  # of another objective
