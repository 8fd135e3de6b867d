"""The cache of index maps: one build for many processes, nothing damaged or foreign believed."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import megatron.data.order as data_order
from megatron.data.dataset import GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.order import IndexMaps, OrderPlan, build_maps, load_or_build_maps, plan_order
from megatron.errors import UserError


def test_cache_is_used_and_keyed_by_all_inputs(make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = make_data("x", [30, 40, 50])
    built: list[object] = []
    monkeypatch.setattr(data_order, "build_maps", lambda sizes, plan: built.append(plan) or build_maps(sizes, plan))
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


def test_what_killed_builders_of_other_maps_left_is_swept(make_data, tmp_path: Path) -> None:
    """Each as large as the maps; nobody may ever build the same ones again."""
    prefix, left = make_data("x", [30, 40, 50]), []
    for name, age in ((".train-0.1.0a1b2c3d.tmp", 2 * 24 * 3600), (".train-1.1.0a1b2c3d.tmp", 0)):
        left.append(tmp_path / "c" / name)
        left[-1].mkdir(parents=True)
        os.utime(left[-1], (time.time() - age,) * 2)
    GPTDataset(prefix, 20, 10, 1, cache_path=str(tmp_path / "c"))
    assert not left[0].exists() and left[1].exists()  # a young one may be somebody's work


@pytest.mark.filterwarnings("error")
def test_without_locks_the_rename_alone_is_safe(make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builders at once: the second finds the finished folder when it renames, and uses it."""
    sizes = IndexedDataset(make_data("x", [30, 40, 50])).sizes
    plan = plan_order(tokens_per_epoch=120, num_samples=30, seq_length=10, seed=1)

    def race(sizes: np.ndarray, plan: OrderPlan) -> IndexMaps:
        monkeypatch.setattr(data_order, "build_maps", build_maps)
        data_order._store(next(iter(tmp_path.glob("c/*.lock"))).with_suffix(""), build_maps(sizes, plan), plan)
        return build_maps(sizes, plan)

    monkeypatch.setattr(data_order, "build_maps", race)
    maps = load_or_build_maps(sizes, plan, name="x", folders=[tmp_path / "c"])
    np.testing.assert_array_equal(maps.sample_order, build_maps(sizes, plan).sample_order)
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == ["", ".lock"]


def cached(prefix: str, cache: Path) -> tuple[GPTDataset, Path]:
    """A data set of 12 samples or more, and the folder of its maps."""
    data = GPTDataset(prefix, 20, 10, 1, cache_path=str(cache))
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return data, folder


def test_a_map_zeroed_after_its_header_is_built_again(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [30, 40, 50])
    data, folder = cached(prefix, tmp_path / "c")
    expected = np.array(data.maps.sample_order)
    raw = (folder / "sample_order.npy").read_bytes()
    (folder / "sample_order.npy").write_bytes(raw[:128] + bytes(len(raw) - 128))
    with pytest.warns(UserWarning, match="damaged index cache .*its checksums differ"):
        again = GPTDataset(prefix, 20, 10, 1, cache_path=str(tmp_path / "c"))
    np.testing.assert_array_equal(again.maps.sample_order, expected)
    assert (folder / "sample_order.npy").read_bytes() == raw


def test_an_index_out_of_range_is_built_again_and_stops_no_restart(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [30, 40, 50])
    _, folder = cached(prefix, tmp_path / "c")
    broken = np.load(folder / "document_order.npy")
    broken[:] = 99
    np.save(folder / "document_order.npy", broken)
    with pytest.warns(UserWarning, match="damaged index cache"):
        data = GPTDataset(prefix, 20, 10, 1, cache_path=str(tmp_path / "c"))
    assert [len(data[index]) for index in range(len(data))] == [11] * len(data)


def test_maps_without_digests_are_built_again(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [30, 40, 50])
    data, folder = cached(prefix, tmp_path / "c")
    (folder / "plan.json").write_text(json.dumps(vars(data.plan)))
    with pytest.warns(UserWarning, match="damaged index cache .*its checksums differ"):
        GPTDataset(prefix, 20, 10, 1, cache_path=str(tmp_path / "c"))
    assert "digests" in json.loads((folder / "plan.json").read_text())


def test_maps_of_other_documents_are_not_taken(make_data, tmp_path: Path) -> None:
    _, one = cached(make_data("x", [30, 40, 50]), tmp_path / "a")
    other_data, other = cached(make_data("y", [50, 30, 40]), tmp_path / "b")
    for path in other.iterdir():
        path.unlink()
    for path in one.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="damaged index cache"):
        again = GPTDataset(other_data.documents.prefix, 20, 10, 1, cache_path=str(tmp_path / "b"))
    np.testing.assert_array_equal(again.maps.sample_starts, other_data.maps.sample_starts)


def test_a_cache_that_everyone_may_write_to_is_not_used(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [30, 40, 50])
    _, folder = cached(prefix, tmp_path / "c")
    for path in (folder, folder.parent):
        path.chmod(0o777)
        with pytest.warns(UserWarning, match="is not used: everyone may write to it"):
            data = GPTDataset(prefix, 20, 10, 1, cache_path=str(tmp_path / "c"))
        assert str(tmp_path / "index-cache") in str(data.maps.sample_order.filename)  # type: ignore[attr-defined]
        path.chmod(0o755)


def test_a_cache_that_another_user_made_in_the_temporary_folder_is_not_used(
    make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = make_data("x", [30, 40, 50])
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    cached(prefix, shared / "c")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner == 0:
        os.chown(shared / "c", 12345, -1)  # root's own would be trusted
    with pytest.warns(UserWarning, match=r"tmp/c is not used: it belongs to user \d+, in a folder where everyone may"):
        data = GPTDataset(prefix, 20, 10, 1, cache_path=str(shared / "c"))
    assert str(tmp_path / "index-cache") in str(data.maps.sample_order.filename)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("error")
def test_a_cache_of_another_user_where_only_some_may_write_is_used(
    make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a group's, beside its data; and one where everyone may make files but nobody may touch those of others."""
    prefix = make_data("x", [30, 40, 50])
    _, folder = cached(prefix, tmp_path / "c")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner == 0:
        os.chown(tmp_path / "c", 12345, -1)  # root's own would be trusted
    for mode in (0o775, 0o1777):
        (tmp_path / "c").chmod(mode)
        if mode == 0o1777:
            monkeypatch.undo()
        data = GPTDataset(prefix, 20, 10, 1, cache_path=str(tmp_path / "c"))
        assert str(folder) in str(data.maps.sample_order.filename)  # type: ignore[attr-defined]


def test_maps_made_under_an_open_umask_are_used_again(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [30, 40, 50])
    umask = os.umask(0)
    try:
        _, folder = cached(prefix, tmp_path / "c")
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o002 == folder.parent.stat().st_mode & 0o002 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached(prefix, tmp_path / "c")


def test_an_order_beyond_the_memory_is_refused_before_it_is_made(tmp_path: Path) -> None:
    plan = plan_order(tokens_per_epoch=1000, num_samples=10**15, seq_length=100, seed=1)
    with pytest.raises(UserError, match=r"samples, takes .* GB; it is made in memory, of which .*--train-epochs"):
        load_or_build_maps(np.full(100, 10), plan, name="train", folders=[tmp_path])
    assert not list(tmp_path.iterdir())
