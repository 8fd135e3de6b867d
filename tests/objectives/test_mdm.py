"""Masked diffusion: the properties of its noise, and its bound against enumeration."""

import numpy as np
import pytest
import torch
from objective_helpers import (
    MASK_ID,
    SEQ,
    assert_same_batch,
    conditionals_of,
    exact_bound,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
    within_standard_errors,
)

from megatron import randomness as noise
from megatron.errors import UserError
from megatron.model.mask import Full
from megatron.objectives.mdm import MaskedDiffusion
from megatron.objectives.schedules import MIN_MASK_PROB, mask_probability
from megatron.testing.oracles import by_order


def probabilities(objective: MaskedDiffusion, sample_ids: np.ndarray) -> np.ndarray:
    return mask_probability(objective.schedule, objective.times(sample_ids))


def test_inputs_labels_and_weights():
    tokens = make_tokens(8)
    objective = make_objective()
    batch = prepare(objective, tokens, torch.arange(8))
    is_masked = batch.inputs.input_ids == MASK_ID
    assert torch.equal(batch.targets.labels, tokens[:, :-1])  # label and input are the same tokens, not shifted
    assert torch.equal(batch.inputs.input_ids[~is_masked], batch.targets.labels[~is_masked])
    t = noise.diffusion_times(1234, np.arange(8), global_batch_size=8, scheme=2)
    p = torch.from_numpy((1 - 1e-3) * t + 1e-3).float().unsqueeze(-1)
    torch.testing.assert_close(batch.targets.loss_weights, is_masked / p)
    assert batch.targets.num_tokens.sum() == 8 * SEQ and batch.inputs.position_ids is None
    assert torch.equal(batch.targets.positions, is_masked.flatten().nonzero().squeeze(-1))
    assert isinstance(objective.attention_mask, Full) and objective.label == "NLL bound"


def test_masks_have_the_stated_probability():
    tokens = make_tokens(1, seq=4000)
    for sample in range(6):
        batch = prepare(
            MaskedDiffusion(mask_token_id=MASK_ID, global_batch_size=6, seed=5), tokens, torch.tensor([sample])
        )
        p = 1 / batch.targets.loss_weights.max().item()
        share = (batch.inputs.input_ids == MASK_ID).float().mean().item()
        assert abs(share - p) < 4 * (p * (1 - p) / 4000) ** 0.5


def test_expected_weights_are_one():
    batch = prepare(make_objective(batch=64, seed=1235), make_tokens(6400), torch.arange(6400))
    means = batch.targets.loss_weights.mean(-1).double().numpy()
    assert within_standard_errors(means, 1.0)
    assert abs(means.mean() - 1) < 0.02


def test_loss_fraction_is_the_mean_share_of_masked_tokens():
    objective = make_objective(batch=64)
    batch = prepare(objective, make_tokens(6400), torch.arange(6400))
    assert batch.targets.positions.numel() / batch.targets.labels.numel() == pytest.approx(
        objective.loss_fraction, abs=0.005
    )


def test_noise_does_not_depend_on_layout_or_tokens():
    objective, tokens = make_objective(batch=16), make_tokens(32)
    whole = prepare(objective, tokens, torch.arange(32))
    for ids in ([5], [30, 2, 17], [8, 9, 10, 11]):  # any micro-batch of any rank, in any order
        part = prepare(objective, tokens[ids], torch.tensor(ids))
        assert torch.equal(part.inputs.input_ids, whole.inputs.input_ids[ids]) and torch.equal(
            part.targets.loss_weights, whole.targets.loss_weights[ids]
        )
    other = prepare(objective, make_tokens(32, seed=1), torch.arange(32))
    assert torch.equal(other.targets.loss_weights, whole.targets.loss_weights)


def test_samples_epochs_and_seeds_differ():
    tokens = make_tokens(1)
    rows = [
        prepare(make_objective(seed=seed), tokens, torch.tensor([i])).targets.loss_weights
        for seed in (1, 2)
        for i in (3, 4, 803)
    ]
    assert len({tuple(row[0].tolist()) for row in rows}) == 6


def test_low_probabilities_may_mask_nothing_and_cost_nothing():
    objective = make_objective("--independent-t")
    batch = prepare(objective, make_tokens(4000), torch.arange(4000))
    empty = (batch.targets.loss_weights > 0).sum(-1) == 0
    assert empty.any()  # about 1/(seq + 1) of the samples
    lowest = prepare(objective, make_tokens(1), empty.nonzero()[0])
    assert tiny_model(Full(), vocab=64, seq=SEQ).loss(lowest).item() == 0.0


@pytest.mark.parametrize("ar_ratio", [1.0, 0.5])
def test_ar_ratio_masks_the_last_tokens(ar_ratio):
    random = prepare(make_objective(), make_tokens(400), torch.arange(400)).inputs.input_ids == MASK_ID
    last = (
        prepare(make_objective("--ar-ratio", str(ar_ratio)), make_tokens(400), torch.arange(400)).inputs.input_ids
        == MASK_ID
    )
    assert torch.equal(random.sum(-1), last.sum(-1))  # as many as the random draw has
    is_suffix = (last.int().diff(dim=-1) >= 0).all(-1)
    was_suffix = (random.int().diff(dim=-1) >= 0).all(-1)
    assert torch.equal(last[~is_suffix], random[~is_suffix])
    moved = (is_suffix & ~was_suffix).float().mean().item()
    assert moved == pytest.approx(ar_ratio * (~was_suffix).float().mean().item(), abs=0.08)
    assert ar_ratio < 1 or is_suffix.all()


def test_ar_ratio_with_no_masked_token_masks_nothing():
    objective = make_objective("--ar-ratio", "1.0")
    for sample in range(50):
        assert not objective._mask(sample, 0.0, SEQ).any()  # not the whole row, as mask[-0:] would


def test_times_are_independent_where_that_is_asked_for():
    times = noise.diffusion_times(1234, np.arange(24), global_batch_size=8, scheme=2, stratified=False)
    assert np.array_equal(make_objective("--independent-t").times(np.arange(24)), times)


def test_low_noise_scales_t_in_the_first_iterations_only():
    plain, scaled = (
        make_objective(),
        make_objective("--low-noise-start", "--low-noise-iter", "3", "--low-noise-ratio", "0.25"),
    )
    ids = np.arange(48)  # six steps of 8
    before = (probabilities(plain, ids) - MIN_MASK_PROB) / (1 - MIN_MASK_PROB)
    after = (probabilities(scaled, ids) - MIN_MASK_PROB) / (1 - MIN_MASK_PROB)
    assert np.allclose(after[:24], before[:24] * 0.25) and np.array_equal(after[24:], before[24:])
    with pytest.raises(UserError, match="--low-noise-iter would have no effect; it needs --low-noise-start"):
        make_objective("--low-noise-iter", "3")

    default = make_objective("--low-noise-start")
    assert (default.low_noise_samples, default.low_noise_ratio) == (1000 * 8, 0.5)


TRAINING_FLAGS = [
    ["--ar-ratio", "1.0"],
    ["--low-noise-start", "--low-noise-iter", "100", "--low-noise-ratio", "0.1"],
    ["--independent-t"],
]


@pytest.mark.parametrize("flags", TRAINING_FLAGS, ids=lambda flags: flags[0])
def test_evaluation_noise_is_free_of_training_flags(flags):
    tokens, ids = make_tokens(24), torch.arange(24)
    plain = prepare(make_objective().for_eval(1, 4), tokens, ids)
    assert_same_batch(prepare(make_objective(*flags).for_eval(1, 4), tokens, ids), plain)


@pytest.mark.parametrize("options", [{"seed": 99}, {"batch": 16}, {"batch": 3}], ids=str)
def test_evaluation_noise_does_not_depend_on_seed_or_batch(options):
    """Two runs that differ in seed and batch size must be judged by the same draws."""
    tokens, ids = make_tokens(24), torch.arange(24)
    assert_same_batch(
        prepare(make_objective(**options).for_eval(), tokens, ids), prepare(make_objective().for_eval(), tokens, ids)
    )


def test_evaluation_draws_of_one_sample_are_spread_and_differ():
    flags = ("--valid-data-path", "x", "--valid-estimator", "bernoulli")
    draws = [make_objective(*flags).for_eval(draw, 8) for draw in range(8)]
    p = [probabilities(objective, np.arange(1))[0] for objective in draws]
    assert np.allclose(np.diff(np.sort(p)), (1 - MIN_MASK_PROB) / 8)
    masks = [objective._mask(0, 0.5, SEQ).tobytes() for objective in draws]
    assert len(set(masks)) == 8


@pytest.mark.parametrize("stratified", [True, False])
@torch.no_grad()
def test_the_bound_equals_enumeration(stratified):
    """4 tokens of a 5-symbol vocabulary (the mask is the sixth row), the real model."""
    model = tiny_model(Full(), vocab=8, seq=4)
    tokens = torch.tensor([2, 0, 4, 1, 3])
    step = 16
    objective = MaskedDiffusion(mask_token_id=5, global_batch_size=step, seed=7, stratified=stratified)
    count = 8_000
    batch = prepare(objective, tokens.expand(count, 5).contiguous(), torch.arange(count))
    losses = model.sample_losses(batch).double().numpy()
    # Samples of one step share their start, so that steps are the independent units.
    per_step = losses.reshape(-1, step).mean(-1)
    exact = exact_bound(model, tokens[:4], 5)
    assert within_standard_errors(per_step, exact)
    assert per_step.std() / len(per_step) ** 0.5 < 0.03 * exact  # sharp enough to notice a wrong weight


@torch.no_grad()
def test_the_bound_is_above_the_likelihood_it_bounds():
    """Against the exact any-order likelihood: the mean over orders of the product of conditionals is below the bound."""
    model = tiny_model(Full(), vocab=8, seq=4)
    tokens = torch.tensor([2, 0, 4, 1])
    log_likelihoods = by_order(conditionals_of(model, tokens, 5))
    mean_nll = -np.mean(log_likelihoods) / 4
    # Up to the floor of p, the bound is the mean over orders (arXiv 2406.03736, theorem on any-order models).
    assert exact_bound(model, tokens, 5) == pytest.approx(mean_nll, rel=5e-3)
    assert -np.log(np.mean(np.exp(log_likelihoods))) / 4 <= exact_bound(model, tokens, 5)
