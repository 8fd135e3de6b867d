"""Sums of validations, read back from files, halved and paired; and quantiles of Student's t."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.errors import UserError
from megatron.runs.sums import difference, halves, load_sums, t_quantile, take
from megatron.statistics import ValidationSums, mean_loss
from tests.test_statistics import corpus, validate


def test_differences_take_common_samples_and_other_token_counts():
    """AR does not score the first token of a sample, so that counts differ by one."""
    owner, effects = corpus(0, documents=40)
    first = validate(owner, effects, 1)
    later = owner.copy()
    later[:, 0] = -1
    second = ValidationSums.of_tokens(np.arange(len(owner)), later, np.full(owner.shape, 2.0))
    assert difference(first, take(second, second.sample < 10)).value == pytest.approx(
        2.0 - mean_loss(take(first, first.sample < 10)).value
    )
    with pytest.raises(UserError, match="without a common sample"):
        difference(take(first, first.sample < 5), take(second, second.sample >= 5))


def test_sums_survive_the_file(tmp_path):
    owner, effects = corpus(0, documents=2000)
    sums = validate(owner, effects, 1, mask=1.0).with_halves(np.arange(2000) % 2 == 0)
    sums.save(tmp_path / "step00000040.npz")
    again = load_sums(tmp_path / "step00000040.npz")
    assert mean_loss(again) == mean_loss(sums)
    assert again.draws == 1
    assert [array.dtype for array in (again.sample, again.document, again.tokens, again.loss)] == [
        np.int32, np.int32, np.int32, np.float64,
    ]  # fmt: skip
    np.testing.assert_array_equal(again.in_selection, sums.in_selection)
    assert [path.name for path in tmp_path.iterdir()] == ["step00000040.npz"]
    assert (tmp_path / "step00000040.npz").stat().st_size < 16 * len(sums.loss)


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "lengths"])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "step1.npz"
    ValidationSums.collect([0, 1], [0, 1], [3, 4], [1.0, 2.0]).save(file)
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[60] ^= 255
        file.write_bytes(data)
    elif damage == "other":
        np.savez(file, a=np.zeros(3))
    else:
        np.savez(file, sample=[0, 1], document=[0], tokens=[1, 1], loss=[1.0, 1.0], draws=0)
    with pytest.raises(UserError, match=r"step1\.npz"):
        load_sums(file)


def test_halves_of_sums_hold_whole_documents():
    owner, effects = corpus(0, documents=50)
    sums = validate(owner, effects, 1)
    assert halves(sums) is None
    chosen = np.arange(50) < 20
    found = halves(sums.with_halves(chosen))
    assert found is not None
    assert set(found[0].document) == set(range(20)) & set(sums.document)
    assert found[0].loss.sum() + found[1].loss.sum() == pytest.approx(sums.loss.sum())
    assert halves(sums.with_halves(np.ones(50, bool))) is None, "an empty half decides nothing"


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.30265), (10, 2.228139), (100, 1.983972), (1e9, 1.959964)]
)
def test_t_quantiles(degrees, expected):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-5)
    assert t_quantile(0.025, degrees) == pytest.approx(-expected, rel=1e-5)


def test_t_quantile_between_integers_and_below_one():
    assert t_quantile(0.975, 3) < t_quantile(0.975, 2.5) < t_quantile(0.975, 2)
    assert math.isnan(t_quantile(0.975, 0.5))
