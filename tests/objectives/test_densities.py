"""Densities of the masked share, with importance weights, and complementary masks: the bound stays what it is."""

import itertools

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

from megatron.errors import UserError
from megatron.model.mask import Full
from megatron.objectives.densities import Bell, Measured
from megatron.objectives.mdm import MaskedDiffusion
from megatron.objectives.schedules import (
    MIN_MASK_PROB,
    Linear,
    bound_weight,
    build_schedule,
    is_symmetric,
    mask_probability,
)
from megatron.testing.checks import check_is_bound
from megatron.testing.oracles import all_masks, bound_nll, mixture_nll

DENSITIES = [Bell(0.8), Bell(0.3), Bell(0.999), Measured((3.0, 1.0, 0.5, 1.5)), Measured("1,2")]
TOKENS = torch.tensor([2, 0, 4, 1, 3])


def density(schedule, share: np.ndarray) -> np.ndarray:
    if isinstance(schedule, Bell):
        return 1 - schedule.depth * np.cos(2 * np.pi * share)
    return schedule.density[np.minimum((share * len(schedule.spread)).astype(int), len(schedule.spread) - 1)]


@pytest.mark.parametrize("schedule", DENSITIES, ids=str)
def test_shares_have_the_density_and_its_inverse_as_weight(schedule):
    t = (np.arange(200_000) + 0.5) / 200_000
    shares = schedule.share(t)
    assert np.allclose(schedule.share(np.array([0.0, 1.0])), [0, 1], atol=1e-12) and (np.diff(shares) > 0).all()
    found, edges = np.histogram(shares, bins=40, range=(0, 1), density=True)
    middles = (edges[1:] + edges[:-1]) / 2
    assert np.allclose(found, density(schedule, middles), atol=0.02)
    assert np.allclose(schedule.rate(t), 1 / density(schedule, shares), rtol=1e-9)
    assert schedule.mean_share == pytest.approx(shares.mean(), abs=1e-6)
    assert schedule.rate(t).mean() == pytest.approx(1.0, abs=2e-3)  # a token weighs 1 in expectation


def test_one_part_for_all_and_no_depth_are_the_linear_schedule():
    t = np.linspace(0, 1, 101)
    for schedule in (Bell(0.0), Measured((2.0, 2.0, 2.0))):
        assert np.allclose(schedule.share(t), t) and np.allclose(schedule.rate(t), 1)


@pytest.mark.parametrize("schedule", DENSITIES, ids=str)
def test_the_bound_by_enumeration_is_unchanged(schedule):
    """∫ weight(t) · Σ_masks P(mask | p(t)) · loss(mask) dt, with the functions that the objective uses."""
    model = tiny_model(Full(), vocab=8, seq=4)
    losses = -conditionals_of(model, TOKENS[:4], 5).sum(-1)
    count = all_masks(4).sum(-1).numpy()
    steps = schedule._ends[1:-1] if isinstance(schedule, Measured) else []  # where the weight jumps
    near_the_ends = np.geomspace(1e-9, 1, 80)
    edges = np.unique(np.concatenate(([0.0], near_the_ends, 1 - near_the_ends, steps)))
    nodes, weights = np.polynomial.legendre.leggauss(30)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        t = low + (high - low) * (nodes + 1) / 2
        p = mask_probability(schedule, t)[:, None]
        expected = (p**count * (1 - p) ** (4 - count) * losses).sum(-1)
        total += ((high - low) / 2 * weights * bound_weight(schedule, t) * expected).sum()
    assert total / 4 == pytest.approx(exact_bound(model, TOKENS[:4], 5), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("schedule", [DENSITIES[0], DENSITIES[3]], ids=str)
def test_training_draws_have_that_expectation(schedule):
    model, step, count = tiny_model(Full(), vocab=8, seq=4), 16, 8000
    objective = MaskedDiffusion(mask_token_id=5, global_batch_size=step, seed=7, schedule=schedule)

    def losses(text):
        batch = prepare(objective, torch.tensor(text).expand(count, 5).contiguous(), torch.arange(count))
        return 4 * model.sample_losses(batch).double().numpy().reshape(-1, step).mean(-1)

    check_is_bound(
        losses,
        texts=[tuple(TOKENS.tolist())],
        truth=lambda text: mixture_nll(conditionals_of(model, torch.tensor(text[:4]), 5)),
        expected=lambda text: bound_nll(conditionals_of(model, torch.tensor(text[:4]), 5), floor=MIN_MASK_PROB),
    )
    assert objective.label == "NLL bound"


def test_a_density_proportional_to_the_spread_has_the_least_variance():
    """Of a quantity whose root mean square is 4, 1, 1 and 2 in the parts: uniform, inverse and measured densities."""
    spread, t = np.array([4.0, 1.0, 1.0, 2.0]), (np.arange(400_000) + 0.5) / 400_000
    sign = np.where(np.arange(400_000) % 2, 1.0, -1.0)

    def second_moment(schedule) -> float:
        part = np.minimum((schedule.share(t) * 4).astype(int), 3)
        return float(np.mean((schedule.rate(t) * spread[part] * sign) ** 2))

    found = {name: second_moment(s) for name, s in (("measured", Measured((4.0, 1.0, 1.0, 2.0))), ("uniform", Linear()),
             ("inverse", Measured((1.0, 4.0, 4.0, 2.0))), ("near", Measured((4.4, 1.0, 1.0, 2.0))))}  # fmt: skip
    assert found["measured"] == pytest.approx(spread.mean() ** 2, rel=1e-3)
    assert found["measured"] < found["near"] < found["uniform"] < found["inverse"]


FLAGS = {
    "bell": (["--noise-schedule", "bell"], Bell(0.8)),
    "depth": (["--noise-schedule", "bell", "--noise-schedule-depth", "0.5"], Bell(0.5)),
    "measured": (["--noise-schedule", "measured", "--noise-schedule-spread", "2,1,1.5"], Measured((2.0, 1.0, 1.5))),
}


@pytest.mark.parametrize(("flags", "schedule"), FLAGS.values(), ids=FLAGS)
def test_flags_choose_the_density_and_validation_stays_the_standard_one(flags, schedule):
    objective = make_objective(*flags, batch=64)
    assert objective.schedule == schedule and objective.label == "NLL bound"
    batch = prepare(objective, make_tokens(1280), torch.arange(1280))
    share = (batch.inputs.input_ids == MASK_ID).float().mean().item()
    assert share == pytest.approx(objective.loss_fraction, abs=0.01)
    assert_same_batch(
        prepare(objective.for_eval(), make_tokens(8), torch.arange(8)),
        prepare(make_objective().for_eval(), make_tokens(8), torch.arange(8)),
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--noise-schedule", "measured"],
        ["--noise-schedule", "measured", "--noise-schedule-spread", "1"],
        ["--noise-schedule", "measured", "--noise-schedule-spread", "1,0"],
        ["--noise-schedule", "measured", "--noise-schedule-spread", "1,nan"],
        ["--noise-schedule", "measured", "--noise-schedule-spread", "1,two"],
        ["--noise-schedule", "measured", "--noise-schedule-spread", "1,1e4"],
        ["--noise-schedule", "bell", "--noise-schedule-spread", "1,2"],
        ["--noise-schedule", "bell", "--noise-schedule-depth", "1"],
        ["--noise-schedule-depth", "0.5"],
    ],
    ids=lambda flags: " ".join(flags[1:]),
)
def test_a_density_that_is_none_is_refused(flags):
    with pytest.raises(UserError, match="--noise-schedule"):
        make_objective(*flags)


def pair(*flags: str):
    return make_objective("--complementary-masks", *flags)


def test_a_sample_is_there_under_a_mask_and_its_complement():
    tokens, ids = make_tokens(512), torch.arange(512)
    batch = prepare(pair(), tokens, ids)
    first, second = (batch.inputs.input_ids == MASK_ID).chunk(2)
    assert (first | second).all()
    assert (first & second).double().mean() < 4 * MIN_MASK_PROB  # the floor of p is in both
    plain = prepare(make_objective(), tokens, ids)
    assert torch.equal(first, plain.inputs.input_ids == MASK_ID)  # the first view is the one without the flag
    assert torch.equal(batch.targets.loss_weights[:512] * 2, plain.targets.loss_weights)
    assert torch.equal(batch.targets.num_tokens, torch.tensor([SEQ, 0.0]).repeat_interleave(512))
    assert torch.equal(batch.inputs.sample_ids, ids.repeat(2)) and pair().num_views == 2
    assert pair().label == "NLL bound" and pair().for_eval().num_views == 1
    assert_same_batch(prepare(pair().for_eval(), tokens, ids), prepare(make_objective().for_eval(), tokens, ids))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"schedule": Bell(0.8)}, {"shifted": True}], ids=str)
def test_each_half_has_the_expectation_of_the_bound_and_both_have_less_variance(options):
    model, step, count = tiny_model(Full(), vocab=8, seq=4), 16, 8000
    objective = MaskedDiffusion(mask_token_id=5, global_batch_size=step, seed=7, complementary=True, **options)
    batch = prepare(objective, TOKENS.expand(count, 5).contiguous(), torch.arange(count))
    halves = model.token_losses(batch).double().sum(-1).numpy().reshape(2, -1, step).mean(-1) / 4
    if "shifted" not in options:
        exact = exact_bound(model, TOKENS[:4], 5)
        assert within_standard_errors(2 * halves[0], exact) and within_standard_errors(2 * halves[1], exact)
        assert within_standard_errors(halves.sum(0), exact)
    # Two draws of their own would have half the variance of one.
    assert halves.sum(0).var() < 0.9 * (2 * halves[0]).var() / 2


def test_only_symmetric_schedules_have_complements():
    assert [is_symmetric(build_schedule(name)) for name in ("linear", "cosine", "polynomial", "bell")] == [
        True, False, False, True,
    ]  # fmt: skip
    assert is_symmetric(Measured((1, 2, 1))) and not is_symmetric(Measured((1, 2, 3)))
    for flags in (["--noise-schedule", "cosine"], ["--ar-ratio", "0.5"], ["--low-noise-start"]):
        with pytest.raises(UserError, match="--complementary-masks"):
            pair(*flags)
    assert pair("--loss-weighting", "flat").label == "not a likelihood bound"
