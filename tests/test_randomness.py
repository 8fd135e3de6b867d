"""Noise is a function of (seed, stream, index) and of nothing else."""

import numpy as np
import pytest

from megatron import randomness as noise


def draws(seed: int, index: int, stream: int = noise.STREAM_SAMPLE) -> tuple[float, ...]:
    return tuple(noise.generator(seed, index, stream).random(4))


def test_the_same_arguments_give_the_same_numbers():
    assert draws(1, 5) == draws(1, 5)


def test_different_arguments_give_different_numbers():
    arguments = [(s, i, stream) for s in (0, 1, 2**63 - 1, -1) for i in (0, 1, 2, 10**12) for stream in (0, 1, 2)]
    assert len({draws(*a) for a in arguments}) == len(arguments)


def test_long_streams_of_neighbours_do_not_overlap():
    """Neighbouring indices must not be one stream read from neighbouring places."""
    first, second = (noise.generator(1, index).random(20_000) for index in (0, 1))
    assert not np.isin(first, second).any()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_stratified_times_cover_every_step_evenly():
    times = noise.diffusion_times(1, np.arange(64), global_batch_size=16)
    for step in range(4):
        part = np.sort(times[step * 16 : step * 16 + 16])
        assert np.allclose(np.diff(part), 1 / 16) and 0 <= part[0] < 1 / 16
    assert len(np.unique(np.round(times[::16] * 1e9))) == 4  # each step has its own start


def test_each_stratified_time_is_uniform():
    times = noise.diffusion_times(1, 3 + 16 * np.arange(4000), global_batch_size=16)  # place 3 of many steps
    counts, _ = np.histogram(times, bins=10, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared with 9 degrees of freedom, 0.1 %


@pytest.mark.parametrize("stratified", [True, False])
def test_times_do_not_depend_on_how_samples_are_grouped(stratified):
    options = {"global_batch_size": 16, "stratified": stratified}
    whole = noise.diffusion_times(1, np.arange(48), **options)
    parts = [noise.diffusion_times(1, np.arange(i, i + 3), **options) for i in range(0, 48, 3)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_independent_times_ignore_the_batch_and_are_not_even():
    one, two = (noise.diffusion_times(1, np.arange(64), global_batch_size=b, stratified=False) for b in (16, 64))
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
