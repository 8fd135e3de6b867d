"""Noise schedules: the bound is the same under each."""

import itertools

import numpy as np
import pytest
import torch
from objective_helpers import (
    MASK_ID,
    assert_same_batch,
    conditionals_of,
    exact_bound,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
    within_standard_errors,
)

from megatron.errors import UserError
from megatron.model.mask import Full
from megatron.objectives.curves import Cosine, Polynomial
from megatron.objectives.mdm import MaskedDiffusion
from megatron.objectives.schedules import (
    MIN_MASK_PROB,
    Linear,
    bound_weight,
    build_schedule,
    mask_probability,
    mean_mask_probability,
)
from megatron.testing.oracles import all_masks

SCHEDULES = [Linear(), Cosine(), Polynomial(2.0), Polynomial(3.0)]
TOKENS = torch.tensor([2, 0, 4, 1, 3])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_share_rate_and_mean_belong_together(schedule):
    t = np.linspace(1e-3, 1 - 1e-3, 999)
    numeric = (schedule.share(t + 1e-6) - schedule.share(t - 1e-6)) / 2e-6
    assert np.allclose(schedule.rate(t), numeric, rtol=1e-5)
    ends = schedule.share(np.array([0.0, 1.0]))
    assert np.allclose(ends, [0, 1]) and (schedule.rate(t) > 0).all()
    nodes, weights = np.polynomial.legendre.leggauss(400)
    mean = (weights / 2 * schedule.share((nodes + 1) / 2)).sum()
    assert schedule.mean_share == pytest.approx(mean, abs=1e-5)
    mean = (weights / 2 * mask_probability(schedule, (nodes + 1) / 2)).sum()
    assert mean_mask_probability(schedule) == pytest.approx(mean, abs=1e-5)
    p = mask_probability(schedule, np.array([0.0, 1.0]))
    assert np.allclose(p, [MIN_MASK_PROB, 1.0])


def test_the_weights_are_those_of_the_papers():
    """−α'/(1 − α) of arXiv 2406.04329, table 4, away from the floor: 1/t, π/2·tan(π/2·(1 − t)), w/t."""
    t = np.linspace(0.5, 0.99, 20)
    for schedule, weight in (
        (Linear(), 1 / t),
        (Cosine(), np.pi / 2 * np.tan(np.pi / 2 * (1 - t))),
        (Polynomial(3.0), 3 / t),
    ):
        assert np.allclose(bound_weight(schedule, t), weight, rtol=0.01)
    assert np.array_equal(bound_weight(Linear(), t), 1 / ((1 - 1e-3) * t + 1e-3))  # the recipe of arXiv 2507.15857


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_bound_by_enumeration_does_not_depend_on_the_schedule(schedule):
    """∫ weight(t) · Σ_masks P(mask | p(t)) · loss(mask) dt, with the functions that the objective uses."""
    model = tiny_model(Full(), vocab=8, seq=4)
    losses = -conditionals_of(model, TOKENS[:4], 5).sum(-1)
    count = all_masks(4).sum(-1).numpy()
    edges = np.concatenate(([0.0], np.geomspace(1e-9, 1, 60)))  # fine where the weights vary: near t = 0
    nodes, weights = np.polynomial.legendre.leggauss(30)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        t = low + (high - low) * (nodes + 1) / 2
        p = mask_probability(schedule, t)[:, None]
        expected = (p**count * (1 - p) ** (4 - count) * losses).sum(-1)
        total += ((high - low) / 2 * weights * bound_weight(schedule, t) * expected).sum()
    assert total / 4 == pytest.approx(exact_bound(model, TOKENS[:4], 5), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=str)
def test_the_estimator_of_each_schedule_has_the_same_mean(schedule):
    model, step, count = tiny_model(Full(), vocab=8, seq=4), 16, 8_000
    objective = MaskedDiffusion(mask_token_id=5, global_batch_size=step, seed=7, schedule=schedule)
    batch = prepare(objective, TOKENS.expand(count, 5).contiguous(), torch.arange(count))
    per_step = model.sample_losses(batch).double().numpy().reshape(-1, step).mean(-1)
    exact = exact_bound(model, TOKENS[:4], 5)
    assert within_standard_errors(per_step, exact)
    assert per_step.std() / len(per_step) ** 0.5 < 0.05 * exact
    assert within_standard_errors(batch.targets.loss_weights.double().numpy().reshape(-1, step * 4).mean(-1), 1.0)


FLAGS = {
    "cosine": (["--noise-schedule", "cosine"], Cosine()),
    "polynomial": (["--noise-schedule", "polynomial"], Polynomial(2.0)),
    "power": (["--noise-schedule", "polynomial", "--noise-schedule-power", "3"], Polynomial(3.0)),
    "default": ([], Linear()),
}


@pytest.mark.parametrize(("flags", "schedule"), FLAGS.values(), ids=FLAGS)
def test_flags_choose_the_schedule(flags, schedule):
    objective = make_objective(*flags, batch=64)
    assert objective.schedule == schedule and objective.label == "NLL bound"
    batch = prepare(objective, make_tokens(1280), torch.arange(1280))
    assert objective.loss_fraction == mean_mask_probability(schedule)
    share = (batch.inputs.input_ids == MASK_ID).float().mean().item()
    assert share == pytest.approx(objective.loss_fraction, abs=0.01)
    assert_same_batch(
        prepare(objective.for_eval(), make_tokens(8), torch.arange(8)),
        prepare(make_objective().for_eval(), make_tokens(8), torch.arange(8)),
    )


@pytest.mark.parametrize("power", [0.99, 0.0, -1.0, float("nan")])
def test_powers_with_unbounded_weights_are_refused(power):
    with pytest.raises(UserError, match="unbounded"):
        Polynomial(power)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_weights_are_bounded(schedule):
    assert (
        bound_weight(schedule, np.concatenate(([0.0], np.geomspace(1e-300, 1, 10_000)))).max()
        <= np.pi / 2 / MIN_MASK_PROB
    )


def test_build_schedule_knows_the_names():
    assert [build_schedule(name) for name in ("linear", "cosine", "polynomial")] == [
        Linear(),
        Cosine(),
        Polynomial(2.0),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--noise-schedule-power", "2"],
        ["--noise-schedule", "cosine", "--noise-schedule-power", "2"],
        ["--noise-schedule", "polynomial", "--noise-schedule-power", "0"],
        ["--noise-schedule", "polynomial", "--noise-schedule-power", "0.5"],
    ],
)
def test_a_power_without_its_schedule_is_refused(flags):
    with pytest.raises(ValueError, match="--noise-schedule-power"):
        make_objective(*flags)
