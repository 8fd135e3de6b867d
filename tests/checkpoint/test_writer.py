"""Writing a tag that exists already: the new one takes its place, and the old one goes last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import select
from megatron.checkpoint.writer import write_checkpoint
from megatron.errors import Failure
from megatron.objectives import parse
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec


def save(run_dir: Path, value: float) -> Path:
    """Step 5 of a model of one tensor that is ``value`` everywhere."""
    config = parse(["--model", "7M", "--train-samples", "8", "--seq-length", "8"], objective="ar")
    return write_checkpoint(
        run_dir,
        fragments=[Fragment("weight", "w", 0, 1, 0, torch.full((4,), value))],
        specs={"w": ShardSpec((4,))},
        state={"step": 5, "consumed_samples": 0, "optimizer_steps": 0, "config": config},
        context=ParallelContext(),
    )


def value(run_dir: Path) -> float:
    """What the newest complete checkpoint holds."""
    found = select(run_dir)
    assert found.tag is not None and not found.skipped
    return float(CheckpointReader(found.tag).tensor("w").unique())


def test_the_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1.0)
    tag = save(tmp_path, 2.0)
    assert value(tmp_path) == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [tag.name, "latest"]


def test_a_save_that_cannot_take_the_place_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1.0)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.suffix == ".saving":
            raise OSError("stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(Failure, match="stale file handle"):
        save(tmp_path, 2.0)
    assert value(tmp_path) == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step5", "latest"]


def test_a_failure_after_the_exchange_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1.0)
    replace = os.replace

    def refuse_latest(source: Path, target: Path) -> None:
        if Path(target).name == "latest":
            raise OSError("stale file handle")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_latest)
    with pytest.raises(Failure, match="stale file handle"):
        save(tmp_path, 2.0)
    assert value(tmp_path) == 2.0
    monkeypatch.undo()
    save(tmp_path, 3.0)
    assert value(tmp_path) == 3.0
    assert not list(tmp_path.glob("*.replaced"))
