"""AR with random attention masking."""

import pytest
import torch
from objective_helpers import SEQ, assert_same_batch, make_objective, make_tokens, prepare, tiny_model

from megatron.model.batch import Stream
from megatron.model.mask import Causal, RandomKeyDrop
from megatron.model.visibility import visible_keys
from megatron.objectives.masked_attention_ar import MaskedAttentionAR


def dense(mask: RandomKeyDrop, sample_ids: torch.Tensor, seq: int) -> torch.Tensor:
    """[sample, query, key]."""
    seen = visible_keys(mask, Stream(torch.zeros(len(sample_ids), seq, 1), sample_ids=sample_ids))
    assert isinstance(seen, torch.Tensor)
    return seen[:, 0]


def allowed(ratio: float, samples: int = 64, seq: int = 64, seed: int = 1) -> torch.Tensor:
    return dense(RandomKeyDrop(ratio, seed), torch.arange(samples), seq)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_never_the_diagonal_never_the_future(ratio):
    mask = allowed(ratio)
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert not mask.triu(1).any()


def test_ratio_zero_is_causal():
    assert torch.equal(allowed(0.0, samples=2), torch.ones(64, 64, dtype=torch.bool).tril().expand(2, 64, 64))


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_drop_rates(ratio):
    mask = allowed(ratio, samples=300)
    earlier = torch.ones(64, 64).tril(-1)
    kept = (mask * earlier).sum(-1) / earlier.sum(-1).clamp(min=1)  # [sample, query]
    late = kept[:, 40:]  # at least 40 earlier keys each
    # A chosen query keeps 1 − q of its keys, q ~ U(1e-3, 1): rates are uniform, not one constant.
    assert (late < 1).float().mean().item() == pytest.approx(ratio * (1 - 1 / 53), abs=0.02)
    assert late.mean().item() == pytest.approx(1 - ratio / 2, abs=0.02)
    chosen = late[late < 1]
    for quantile in (0.25, 0.5, 0.75):
        assert torch.quantile(chosen, quantile).item() == pytest.approx(quantile, abs=0.06)


def test_keys_are_dropped_independently():
    rows = allowed(1.0, samples=1000, seq=42)
    assert rows[:, 40, :40].float().mean(0).sub(0.5).abs().max() < 0.07  # every key alike
    agreement = (rows[:, 40, :30] == rows[:, 41, :30]).float().mean().item()
    assert agreement == pytest.approx(0.5, abs=0.03)  # neighbouring queries share nothing


def test_a_function_of_the_sample_id_only():
    mask = RandomKeyDrop(0.5, 3)
    whole = dense(mask, torch.arange(32), 48)
    for ids in ([3], [31, 4, 4], list(range(8, 16))):
        assert torch.equal(dense(mask, torch.tensor(ids), 48), whole[ids])
    shorter = dense(mask, torch.arange(32), 20)
    assert torch.equal(shorter, whole[:, :20, :20])  # also independent of the length that is asked for
    assert len({row.numpy().tobytes() for row in whole}) == 32
    assert not torch.equal(dense(RandomKeyDrop(0.5, 4), torch.arange(32), 48), whole)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**62 + 12345, 2**63 - 1])
def test_any_seed(seed):
    """--no-load-rng makes seeds of 63 bits."""
    mask = dense(RandomKeyDrop(1.0, seed), torch.tensor([0, 2**40]), 16)
    assert not mask.triu(1).any() and mask.diagonal(dim1=-2, dim2=-1).all()


@torch.no_grad()
def test_the_model_uses_the_mask_of_each_sample():
    objective = make_objective("--randmask-ratio", "1.0", objective="ar")
    assert isinstance(objective, MaskedAttentionAR)
    batch = prepare(objective, make_tokens(4), torch.tensor([10, 11, 12, 13]))
    model = tiny_model(objective.attention_mask, vocab=64, seq=SEQ)
    whole = model.sample_losses(batch)
    alone = prepare(objective, make_tokens(4)[2:3], torch.tensor([12]))
    torch.testing.assert_close(model.sample_losses(alone), whole[2:3])
    other = prepare(objective, make_tokens(4)[2:3], torch.tensor([99]))
    assert (model.loss(other) - whole[2]).abs() > 1e-4
    plain = tiny_model(Causal(), vocab=64, seq=SEQ)
    assert (plain.sample_losses(batch) - whole).abs().min() > 1e-4


def test_evaluation_is_plain_ar():
    objective = make_objective("--randmask-ratio", "0.5", objective="ar").for_eval()
    assert isinstance(objective.attention_mask, Causal) and objective.label == "NLL (exact)"
    plain = make_objective(objective="ar")
    assert_same_batch(
        prepare(objective, make_tokens(2), torch.arange(2)), prepare(plain, make_tokens(2), torch.arange(2))
    )


def test_without_a_ratio_it_is_refused():
    with pytest.raises(ValueError, match="--randmask-ratio"):
        make_objective("--objective", "masked_attention_ar", objective="ar")
