"""Random numbers are a function of (seed, purpose, index) and of nothing else."""

import numpy as np
import pytest

from megatron import randomness as noise
from megatron.randomness import Purpose

NOISE_7 = [0.37283175037958094, 0.7587750444085439]
TIMES_OF_SCHEME_1 = [0.17756174472866693, 0.3025617447286669, 0.7852280191285685]
TIMES_OF_SCHEME_2 = [
    0.5247671183220023,
    0.4414337849886689,
    0.8581004516553357,
    0.10810045165533566,
    0.5991465551199576,
]
EVALUATION_TIMES = [0.5560978818906173, 0.18109788189061726, 0.7953556943906173]
ESTIMATOR_NOISE = [0.4104838711720249, 0.5314351869257254]
WEIGHT_SEED = 1433362220103589966


def draws(seed: int, purpose: Purpose | str, index: int) -> tuple[float, ...]:
    return tuple(noise.generator(seed, purpose, index).random(4))


def test_the_same_arguments_give_the_same_numbers():
    assert draws(1, Purpose.NOISE, 5) == draws(1, Purpose.NOISE, 5)


def test_different_arguments_give_different_numbers():
    purposes = [*Purpose, "a", "b"]
    arguments = [(s, p, i) for s in (0, 1, 2**63 - 1, -1) for p in purposes for i in (0, 1, 2, 10**12)]
    assert len({draws(*a) for a in arguments}) == len(arguments)


def test_long_streams_of_neighbours_do_not_overlap():
    """Neighbouring indices must not be one stream read from neighbouring places."""
    first, second = (noise.generator(1, Purpose.NOISE, index).random(20_000) for index in (0, 1))
    assert not np.isin(first, second).any()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_radical_inverses_are_even_over_prefixes_and_runs():
    for size in (1, 2, 8, 64):
        assert sorted(noise.radical_inverse(np.arange(size)).tolist()) == [i / size for i in range(size)]
        run = np.sort(noise.radical_inverse(np.arange(37, 37 + size)))
        assert np.array_equal(np.floor(run * size), np.arange(size))
    assert noise.radical_inverse(np.array([1, 6, 2**40])).tolist() == [0.5, 0.375, 2.0**-41]


def test_streams_of_runs_before_the_schemes_are_unchanged():
    """Numbers that the code before this module drew: runs and evaluations of then go on with them."""
    assert noise.generator(1234, Purpose.NOISE, 7).random(2).tolist() == NOISE_7
    times = noise.diffusion_times(1234, np.arange(16), global_batch_size=8, scheme=1)
    assert times[[0, 1, 15]].tolist() == TIMES_OF_SCHEME_1
    times = noise.diffusion_times(1234, np.arange(24), global_batch_size=12, scheme=2)
    assert times[[0, 1, 2, 3, 23]].tolist() == TIMES_OF_SCHEME_2
    assert noise.evaluation_times(np.array([0, 5, 700]), draw=1, num_draws=3).tolist() == EVALUATION_TIMES
    assert noise.generator(1234, "q", 3).random(2).tolist() == ESTIMATOR_NOISE
    assert noise.named_seed(1234, "layers.0.mlp.dense_4h_to_h.weight") == WEIGHT_SEED


@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 12, 15, 16])
def test_every_step_holds_one_time_in_each_stratum(count, scheme):
    times = noise.diffusion_times(1, np.arange(4 * count), global_batch_size=count, scheme=scheme).reshape(4, count)
    assert (times >= 0).all() and (times < 1).all()
    assert (np.sort(np.floor(times * count), axis=1) == np.arange(count)).all()
    assert np.allclose(np.diff(np.sort(times, axis=1), axis=1), 1 / count)
    assert len(np.unique(np.round(times[:, 0] * 1e9))) == 4  # each step has its own start


class AtTheEnd(np.random.Generator):
    """Draws the largest number below one."""

    def random(self) -> float:  # type: ignore[override]
        return float(np.nextafter(1.0, 0.0))


def test_no_time_rounds_up_to_one():
    times = noise._balanced_times(AtTheEnd(np.random.PCG64(0)), 16)
    assert times.min() >= 0 and times.max() < 1


@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize(("place", "count"), [(3, 16), (8, 16), (14, 15), (0, 1)])
def test_each_stratified_time_is_uniform(place, count, scheme):
    ids = place + count * np.arange(4000)  # one place of many steps
    times = noise.diffusion_times(1, ids, global_batch_size=count, scheme=scheme)
    counts, _ = np.histogram(times, bins=10, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared with 9 degrees of freedom, 0.1 %


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("ranks", [8, 16, 32])
@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_data_parallel_ranks_have_equal_head_rows(ranks, accumulated, micro_batch_size):
    """The head computes masked tokens only, and a step waits for the rank that has most of them."""
    shape, seq_length, steps = (accumulated, ranks, micro_batch_size), 2048, 50
    batch = int(np.prod(shape))
    busiest = {}
    for scheme in (1, 2):
        t = noise.diffusion_times(1234, np.arange(steps * batch), global_batch_size=batch, scheme=scheme)
        masked = np.random.default_rng(0).binomial(seq_length, (1 - 1e-3) * t + 1e-3)
        rows = masked.reshape(steps, *shape).sum(-1)  # [step, micro-batch, rank]
        busiest[scheme] = float((rows.max(axis=2) / rows.mean(axis=2)).max())
    assert busiest[2] <= 1.15, f"busiest rank at {ranks} ranks: {busiest[2]:.3f} of the mean, in any step"
    assert busiest[1] > 1.8, f"scheme 1: {busiest[1]:.2f}"


@pytest.mark.parametrize("stratified", [True, False])
def test_times_do_not_depend_on_how_samples_are_grouped(stratified):
    options = {"global_batch_size": 16, "stratified": stratified, "scheme": 2}
    whole = noise.diffusion_times(1, np.arange(48), **options)
    parts = [noise.diffusion_times(1, np.arange(i, i + 3), **options) for i in range(0, 48, 3)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_independent_times_ignore_the_batch_and_are_not_even():
    one, two = (
        noise.diffusion_times(1, np.arange(64), global_batch_size=b, stratified=False, scheme=2) for b in (16, 64)
    )
    assert np.array_equal(one, two)
    assert not np.allclose(np.diff(np.sort(one)), 1 / 64)


@pytest.mark.parametrize("count", [2, 8, 64])
def test_evaluation_times_cover_the_range_for_any_number_of_samples(count):
    times = np.sort(noise.evaluation_times(np.arange(count)))
    assert np.allclose(np.diff(times), 1 / count) and 0 <= times[0] < 1 / count
    counts, _ = np.histogram(noise.evaluation_times(np.arange(100)), bins=10, range=(0, 1))
    assert counts.min() >= 8 and counts.max() <= 12


def test_evaluation_draws_of_one_sample_are_spread():
    times = [noise.evaluation_times(np.array([5]), draw=draw, num_draws=8)[0] for draw in range(8)]
    assert np.allclose(np.diff(np.sort(times)), 1 / 8)
