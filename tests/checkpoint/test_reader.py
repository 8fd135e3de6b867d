"""Reading ranges and whole tensors, whatever else the shards hold."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.files import Fragment, read_manifest, write_manifest
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import select
from megatron.checkpoint.writer import write_checkpoint
from megatron.errors import UserError
from megatron.files import sha256_of
from megatron.objectives import parse
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec
from tests.checkpoint.saved import save

SPEC = ShardSpec((12, 3), 0, (8, 4))
FULL = torch.arange(36.0).view(12, 3)


@pytest.fixture
def tag(tmp_path: Path) -> Path:
    """A tensor in two tensor-parallel shards of three fragments each."""
    config = parse(["--model", "7M", "--train-samples", "8", "--seq-length", "8"], objective="ar")
    fragments = [
        Fragment("weight", "w", rank, 2, first, SPEC.shard(FULL, rank, 2).reshape(-1)[first:last])
        for rank in range(2)
        for first, last in itertools.pairwise((0, 5, 6, 18))
    ]
    state = {"step": 1, "consumed_samples": 0, "optimizer_steps": 0, "config": config}
    return write_checkpoint(tmp_path, fragments=fragments, specs={"w": SPEC}, state=state, context=ParallelContext())


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_any_range_of_any_layout_comes_from_any_other(tag: Path, tp_size: int) -> None:
    reader = CheckpointReader(tag)
    assert torch.equal(reader.tensor("w"), FULL)
    for rank in range(tp_size):
        shard = SPEC.shard(FULL, rank, tp_size).reshape(-1)
        for first, last in itertools.combinations(range(len(shard) + 1), 2):
            fragment = Fragment("weight", "w", rank, tp_size, first, torch.zeros(last - first))
            reader.read(fragment)
            assert torch.equal(fragment.data, shard[first:last])


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
    reader = CheckpointReader(tag)
    assert torch.equal(reader.tensor("w"), torch.full((4,), 7.0))
    assert torch.equal(reader.tensor("w", "ema"), torch.ones(4))


def test_what_is_not_there_is_named(tag: Path) -> None:
    reader = CheckpointReader(tag)
    with pytest.raises(UserError, match="has no tensor v"):
        reader.tensor("v")
    with pytest.raises(UserError, match="has no exp_avg of w"):
        reader.tensor("w", "exp_avg")
    (tag / "shard-00000.safetensors").write_bytes(b"?")
    with pytest.raises(UserError, match=r"shard-00000.safetensors cannot be read"):
        CheckpointReader(tag)
