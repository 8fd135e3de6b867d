"""The order of samples: golden cases, the rule of the last epoch, the cache."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megatron.data import order
from megatron.data.dataset import GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.order import build_maps, load_or_build_maps, plan_order

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


def test_one_epoch_is_read_once(make_data) -> None:
    prefix = make_data("x", [13, 50, 1, 40])
    dataset = GPTDataset(prefix, None, 10, 3)
    assert len(dataset) == dataset.num_samples == 10
    ends = [dataset[index][:-1] for index in range(10)]
    assert len(np.unique(np.concatenate(ends))) == 100  # every token at most once as an input


def test_too_short_for_one_epoch(make_data) -> None:
    with pytest.raises(ValueError, match=r"x: the data set has 10 tokens and seq_length is 10; .* --seq-length"):
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


def test_cache_is_used_and_keyed_by_all_inputs(make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = make_data("x", [30, 40, 50])
    built: list[object] = []
    monkeypatch.setattr(order, "build_maps", lambda sizes, plan: built.append(plan) or build_maps(sizes, plan))
    first = GPTDataset(prefix, 20, 10, 1)
    again = GPTDataset(prefix, 20, 10, 1)
    assert len(built) == 1
    np.testing.assert_array_equal(first.maps.sample_order, again.maps.sample_order)
    for samples, seq_length, seed in ((200, 10, 1), (20, 9, 1), (20, 10, 2)):
        GPTDataset(prefix, samples, seq_length, seed)
    assert len(built) == 4
    make_data("x", [40, 30, 50])  # other documents of the same total under the same name
    GPTDataset(prefix, 20, 10, 1)
    assert len(built) == 5
    assert (tmp_path / "index-cache").is_dir()


def test_damaged_cache_is_built_again(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [30, 40, 50])
    good = GPTDataset(prefix, 20, 10, 1, cache_path=str(tmp_path / "c"))
    expected = np.array(good.maps.sample_starts)
    (folder,) = (path for path in (tmp_path / "c").iterdir() if path.is_dir())
    for damage in (0, 100, 200):
        os.truncate(folder / "sample_starts.npy", damage)
        with pytest.warns(UserWarning, match="damaged index cache"):
            again = GPTDataset(prefix, 20, 10, 1, cache_path=str(tmp_path / "c"))
        np.testing.assert_array_equal(again.maps.sample_starts, expected)
        assert not list((tmp_path / "c").glob("*.tmp"))


def test_falls_back_to_another_folder(make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = make_data("x", [30, 40, 50])
    (tmp_path / "index-cache").write_text("a file: no folder can be made here, not even by root")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.warns(UserWarning, match="cannot cache index maps"):
        dataset = GPTDataset(prefix, 20, 10, 1)
    assert list((tmp_path / "other").glob("megatron-index-cache-*/train-*/sample_order.npy"))
    sizes, plan = IndexedDataset(prefix).sizes, dataset.plan
    blocked = tmp_path / "index-cache" / "below"
    with pytest.warns(UserWarning, match="cannot cache index maps"):
        memory = load_or_build_maps(sizes, plan, name="x", folders=[blocked])  # nothing writable: in memory
    np.testing.assert_array_equal(memory.sample_order, dataset.maps.sample_order)


def _open_dataset(prefix: str, start: float, queue: multiprocessing.Queue) -> None:
    time.sleep(max(0.0, start - time.time()))
    dataset = GPTDataset(prefix, 5000, 16, 7)
    queue.put([int(dataset[index].sum()) for index in (0, 1, 4999)])


def test_many_processes_build_one_cache(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [int(size) for size in np.random.default_rng(0).integers(1, 300, 2000)])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    start = time.time() + 3
    processes = [context.Process(target=_open_dataset, args=(prefix, start, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert all(answer == answers[0] for answer in answers)
    names = sorted(path.suffix for path in (tmp_path / "index-cache").iterdir())
    assert names == ["", ".lock"]  # one map, no leftovers


def test_without_locks_the_rename_alone_is_safe(make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builders at once: the second finds the finished folder when it renames, and uses it."""
    sizes = IndexedDataset(make_data("x", [30, 40, 50])).sizes
    plan = plan_order(tokens_per_epoch=120, num_samples=30, seq_length=10, seed=1)

    def race(sizes: np.ndarray, plan: order.OrderPlan) -> order.IndexMaps:
        monkeypatch.setattr(order, "build_maps", build_maps)
        order._store(next(iter(tmp_path.glob("c/*.lock"))).with_suffix(""), build_maps(sizes, plan), plan)
        return build_maps(sizes, plan)

    monkeypatch.setattr(order, "build_maps", race)
    maps = load_or_build_maps(sizes, plan, name="x", folders=[tmp_path / "c"])
    np.testing.assert_array_equal(maps.sample_order, build_maps(sizes, plan).sample_order)
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == ["", ".lock"]
