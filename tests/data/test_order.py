"""The order of samples: golden cases, the rule of the last epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data import order
from megatron.data.dataset import GPTDataset
from megatron.data.order import build_maps, plan_order
from megatron.errors import UserError

from .conftest import GOLDEN

CASES = {"case0_golden_n300_train": "golden", "case1_golden_n330_train": "golden", "case3_rand_n300_train": "rand"}


def reference_starts(sizes: np.ndarray, documents: np.ndarray, seq_length: int, samples: int) -> np.ndarray:
    """Walk through the stream one sample after the other, as a plain program would."""
    rows = [(0, 0)]
    place = offset = 0
    for _ in range(samples):
        missing = seq_length + 1
        while True:
            left = int(sizes[documents[place]]) - offset
            if missing <= left:
                offset += missing - 1
                break
            missing -= left
            place, offset = place + 1, 0
        rows.append((place, offset))
    return np.array(rows)


@pytest.mark.parametrize(("case", "data"), CASES.items())
def test_golden_order(case: str, data: str, tmp_path: Path) -> None:
    with np.load(GOLDEN / f"{case}.npz") as golden:
        dataset = GPTDataset(
            str(GOLDEN / f"{data}_text_document"),
            int(golden["num_samples"]),
            int(golden["seq_length"]),
            int(golden["seed"]),
            cache_path=str(tmp_path),
        )
        assert dataset.plan.num_epochs == int(golden["num_epochs"])
        for ours, theirs in (
            (dataset.maps.document_order, golden["doc_idx"]),
            (dataset.maps.sample_starts, golden["sample_idx"]),
            (dataset.maps.sample_order, golden["shuffle_idx"]),
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        samples = np.stack([dataset[index] for index in range(20)])
        assert samples.dtype == np.int64
        np.testing.assert_array_equal(samples, golden["samples"])


def test_starts_agree_with_a_walk_through_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_CHUNK", 7)  # so that samples cross chunks
    rng = np.random.default_rng(1)
    for trial in range(40):
        sizes = rng.integers(0 if trial % 2 else 1, 30, rng.integers(1, 40)).astype(np.int32)
        sizes[rng.integers(len(sizes))] += 1
        samples, seq_length = int(rng.integers(1, 200)), int(rng.integers(1, 50))
        plan = plan_order(tokens_per_epoch=int(sizes.sum()), num_samples=samples, seq_length=seq_length, seed=trial)
        maps = build_maps(sizes, plan)
        expected = reference_starts(sizes, maps.document_order, seq_length, plan.total_samples)
        np.testing.assert_array_equal(maps.sample_starts, expected)
        assert plan.total_samples >= samples


@pytest.mark.parametrize(
    ("num_samples", "num_epochs", "first", "total"),
    [
        (1, 1, 9, 9),
        (9, 1, 9, 9),  # one token more than 9 * 10 is there: one epoch is enough
        (10, 2, 9, 19),  # 1 of 9 samples of the last epoch: kept apart
        (15, 2, 9, 19),  # 6 of 9: below 80 %
        (16, 2, 19, 19),  # 7 of 9: int(0.8 * 9) = 7 is not below 7
        (19, 2, 19, 19),
        (20, 3, 19, 29),
        (29, 3, 29, 29),
    ],
)
def test_last_epoch_is_kept_apart_below_80_percent(num_samples: int, num_epochs: int, first: int, total: int) -> None:
    plan = plan_order(tokens_per_epoch=100, num_samples=num_samples, seq_length=10, seed=0)
    assert (plan.num_epochs, plan.first_part_samples, plan.total_samples) == (num_epochs, first, total)
    maps = build_maps(np.full(20, 5, np.int32), plan)
    assert sorted(maps.sample_order[:first].tolist()) == list(range(first))
    assert sorted(maps.sample_order.tolist()) == list(range(total))
    together = 20 * (num_epochs - int(plan.separate_last_epoch))
    assert sorted(maps.document_order[:together].tolist()) == sorted(list(range(20)) * (together // 20))
    assert sorted(maps.document_order.tolist()) == sorted(list(range(20)) * num_epochs)


@pytest.mark.parametrize(("from_last", "is_apart"), [(79, True), (80, False)])
def test_the_share_of_the_last_epoch_is_80_percent(from_last: int, is_apart: bool) -> None:
    plan = plan_order(tokens_per_epoch=1001, num_samples=100 + from_last, seq_length=10, seed=0)
    assert plan.num_epochs == 2 and plan.separate_last_epoch == is_apart


def test_one_epoch_is_read_once(make_data) -> None:
    prefix = make_data("x", [13, 50, 1, 40])
    dataset = GPTDataset(prefix, None, 10, 3)
    assert len(dataset) == dataset.num_samples == 10
    ends = [dataset[index][:-1] for index in range(10)]
    assert len(np.unique(np.concatenate(ends))) == 100  # every token at most once as an input


def test_too_short_for_one_epoch(make_data) -> None:
    with pytest.raises(UserError, match=r"x has 10 tokens and seq_length is 10; .* --seq-length"):
        GPTDataset(make_data("x", [10]), None, 10, 3)
    assert len(GPTDataset(make_data("y", [10]), 7, 10, 3)) >= 7  # several epochs make up for it


def test_empty_data(make_data) -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        GPTDataset(make_data("x", []), 5, 10, 3)


def test_index_out_of_range(make_data) -> None:
    dataset = GPTDataset(make_data("x", [100]), 3, 10, 0)
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[index]
