"""Reading ranges and whole tensors, whatever else the shards hold."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint import reader
from megatron.checkpoint.files import Fragment, grouped, read_manifest, ungrouped, write_manifest
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import select
from megatron.checkpoint.writer import Saving
from megatron.checkpoint.writer import save_file as save_shard
from megatron.errors import UserError
from megatron.files import sha256_of
from megatron.objectives import parse
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec
from tests.checkpoint.saved import save

SPECS = {"w": ShardSpec((12, 3), 0, (8, 4)), "columns": ShardSpec((3, 12), 1, (12,))}
FULL = {name: torch.arange(36.0).view(spec.full_shape) for name, spec in SPECS.items()}


@pytest.fixture
def tag(tmp_path: Path) -> Path:
    """Two tensors in two tensor-parallel shards of three fragments each."""
    config = parse(["--model", "7M", "--train-samples", "8", "--seq-length", "8"], objective="ar")
    fragments = [
        Fragment("weight", name, rank, 2, first, spec.shard(FULL[name], rank, 2).reshape(-1)[first:last])
        for name, spec in SPECS.items()
        for rank in range(2)
        for first, last in itertools.pairwise((0, 5, 10, 18))  # as text, 10 comes before 5
    ]
    state = {"step": 1, "consumed_samples": 0, "optimizer_steps": 0, "config": config}
    return Saving(tmp_path, fragments=fragments, specs=SPECS, state=state, context=ParallelContext()).publish()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_any_range_of_any_layout_comes_from_any_other(
    tag: Path, tp_size: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no byte is read that was not asked for."""
    found, spec, read = CheckpointReader(tag), SPECS[name], []
    assert torch.equal(found.tensor(name), FULL[name])
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: read.append(preadv(*given)) or read[-1])
    for rank in range(tp_size):
        shard = spec.shard(FULL[name], rank, tp_size).reshape(-1)
        for first, last in itertools.combinations(range(len(shard) + 1), 2):
            fragment = Fragment("weight", name, rank, tp_size, first, torch.zeros(last - first))
            read.clear()
            found.read(fragment)
            assert torch.equal(fragment.data, shard[first:last])
            assert sum(read) == 4 * (last - first)


def test_data_that_the_disk_cannot_be_read_into_is_filled_too(tag: Path) -> None:
    data = torch.zeros(36, dtype=torch.float64)
    CheckpointReader(tag).read(Fragment("weight", "w", 0, 1, 18, data[::2]))
    assert torch.equal(data[::2], FULL["w"].reshape(-1)[18:].double()) and not data[1::2].any()


def test_only_files_that_are_needed_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the map in the manifest; a tag of before has none, and is searched. No more stay open than may."""
    tag = save(tmp_path, 3)
    manifest = read_manifest(tag)
    names = {f"shard-{rank:05d}.safetensors": f"w{rank}" for rank in range(5)}
    for file_name, name in names.items():
        tensors = {f"weight/{name}/0-1/0": torch.full((4,), float(name[1:]))}
        checksum = save_shard(tensors, tag / file_name)
        listed = {"bytes": (tag / file_name).stat().st_size, "sha256": checksum, "keys": grouped(tensors)}
        manifest["files"][file_name] = listed
    manifest["tensors"] = dict.fromkeys(names.values(), manifest["tensors"]["w"])
    write_manifest(tag, manifest)
    opened: list[str] = []
    plain = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(Path(path).name) or plain(path, *rest))
    monkeypatch.setattr(reader, "OPEN_FILES", 2)

    def opens_of(*wanted: str) -> list[str]:
        opened.clear()
        found = CheckpointReader(tag)
        before = len(os.listdir("/proc/self/fd"))
        for name in wanted:
            assert found.tensor(name).tolist() == [float(name[1:])] * 4
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        return [file for file in opened if file in names]

    assert opens_of() == []
    assert opens_of("w3", "w1", "w3") == ["shard-00003.safetensors", "shard-00001.safetensors"]
    assert opens_of("w0", "w1", "w2", "w0") == [f"shard-0000{rank}.safetensors" for rank in (0, 1, 2, 0)]
    for listed in manifest["files"].values():
        del listed["keys"]
    write_manifest(tag, manifest)
    assert set(opens_of("w4")) == set(names)


def test_keys_are_listed_by_the_kinds_that_a_fragment_has() -> None:
    """So that a name stands there once and not for every kind."""
    keys = [f"{kind}/{name}" for name in ("a/0-1/0", "b.c/1-2/7") for kind in ("weight", "exp_avg", "exp_avg_sq")]
    keys += ["weight/d/0-1/0", "momentum/d/0-1/0"]
    assert grouped(keys) == {"exp_avg exp_avg_sq weight": ["a/0-1/0", "b.c/1-2/7"], "momentum weight": ["d/0-1/0"]}
    assert sorted(ungrouped(grouped(keys))) == sorted(keys)


def test_shards_that_no_split_makes_are_refused(tmp_path: Path) -> None:
    config = parse(["--model", "7M", "--train-samples", "8", "--seq-length", "8"], objective="ar")
    state = {"step": 1, "consumed_samples": 0, "optimizer_steps": 0, "config": config}
    for size in (5, 16):
        fragments = [Fragment("weight", "w", rank, size, 0, torch.zeros(36)) for rank in range(size)]
        run_dir = tmp_path / str(size)
        found = Saving(run_dir, fragments=fragments, specs=SPECS, state=state, context=ParallelContext()).publish()
        with pytest.raises(UserError, match="has no weight of w"):
            CheckpointReader(found).tensor("w")


def test_kinds_that_this_version_does_not_know_are_left_alone(tmp_path: Path) -> None:
    """DESIGN names momentum and ema; a checkpoint that has them loads here."""
    tag = save(tmp_path, 7)
    path = tag / "shard-00000.safetensors"
    tensors = {
        **load_file(path),
        "ema/w/0-1/0": torch.ones(4),
        "momentum/w/0-1/0": torch.ones(4),
        "rng": torch.ones(()),
    }
    save_file(tensors, path)
    manifest = read_manifest(tag)
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_manifest(tag, {**manifest, "later": {"field": 1}})
    assert select(tmp_path).tag == tag
    found = CheckpointReader(tag)
    assert torch.equal(found.tensor("w"), torch.full((4,), 7.0))
    assert torch.equal(found.tensor("w", "ema"), torch.ones(4))


def test_what_is_not_there_is_named(tag: Path) -> None:
    found = CheckpointReader(tag)
    with pytest.raises(UserError, match="has no tensor v"):
        found.tensor("v")
    with pytest.raises(UserError, match="has no exp_avg of w"):
        found.tensor("w", "exp_avg")
    found.specs["w"] = ShardSpec((2**50, 3), 0, (2**50,))
    with pytest.raises(UserError, match="weight of w has 36 of"):  # no memory is taken for what is not there
        found.tensor("w")
    shard = tag / "shard-00000.safetensors"
    whole = shard.read_bytes()
    for damaged in (b"", b"?", b"\xff" * 8, whole[:60], (9).to_bytes(8, "little") + b"[" * 9, whole[:-4], None):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"shard-00000.safetensors cannot be read"):
            CheckpointReader(tag).tensor("w")
