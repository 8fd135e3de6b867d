"""Small run directories for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import Selection
from megatron.checkpoint.writer import Saving
from megatron.objectives import parse
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec


def save(run_dir: Path, step: int, *, value: float | None = None, **state: Any) -> Path:
    """A checkpoint of a model of one tensor, which is ``value`` (default: the step) everywhere."""
    config = parse(["--model", "7M", "--train-samples", "8", "--seq-length", "8"], objective="ar")
    data = torch.full((4,), float(step if value is None else value))
    return Saving(
        run_dir,
        fragments=[Fragment("weight", "w", 0, 1, 0, data)],
        specs={"w": ShardSpec((4,))},
        state={"step": step, "consumed_samples": 8 * step, "optimizer_steps": step, "config": config, **state},
        context=ParallelContext(),
    ).publish()


def value(found: Selection) -> float:
    """What the selected checkpoint holds."""
    assert found.tag is not None
    return float(CheckpointReader(found.tag).tensor("w").unique())


def names(run_dir: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in run_dir.iterdir())
