"""Trouble on one rank concerns all: skipped steps, failed saves and requests to stop are agreed upon."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from layouts import jobs
from layouts.pool import WorkerPool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp_size": 2}),
    "pp2": (2, {"pp_size": 2}),
    "dp2": (2, {}),
    "zero3": (2, {"zero_stage": 3}),
    "offload": (1, {"cpu_optimizer": True}),
    "bf16": (2, {"bf16": True}),
}


@contextlib.contextmanager
def infinite_weights(first: int, last: int) -> Iterator[None]:
    """Samples first … last − 1 of the training stream have infinite loss weights."""
    import dataclasses

    import torch

    from megatron.objectives.mdm import MaskedDiffusion

    original = MaskedDiffusion.prepare

    def prepare(self: Any, tokens: Any, sample_ids: Any) -> Any:
        batch = original(self, tokens, sample_ids)
        is_bad = ((sample_ids >= first) & (sample_ids < last)).unsqueeze(-1) & (batch.loss_weights > 0)
        weights = torch.where(is_bad, torch.inf, batch.loss_weights)
        return dataclasses.replace(batch, loss_weights=weights)

    with mock.patch.object(MaskedDiffusion, "prepare", prepare):
        yield


def train_with_infinite_weights(first: int, last: int, argv: list[str]) -> jobs.Trace:
    with infinite_weights(first, last):
        return jobs.train("mdm", argv)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_rank_skips_the_same_step(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, layout: str
) -> None:
    """Step 3 (samples 16 … 23) is bad in its last two samples only: with dp 2 those are on one rank."""
    size, changes = LAYOUTS[layout]
    argv = jobs.flags(token_files, tmp_path / "run", train_iters=6, log_interval=2, **changes)
    traces = pools(size).run(train_with_infinite_weights, 22, 24, argv)
    for trace in traces:
        assert trace.status == 0
        assert trace.skipped == [False, False, True, False, False, False]
        assert trace.losses[3:] == traces[0].losses[3:]
        assert all(0 < loss < 20 for loss in trace.losses[3:])
    lines = jobs.records(tmp_path / "run")
    assert [lines[step]["skipped_steps"] for step in (2, 4, 6)] == [0, 1, 1]
    # The line of steps 3 and 4 averages the good step alone.
    assert lines[4]["loss"] == pytest.approx(traces[0].losses[3], abs=1e-6)


def test_a_skipped_step_changes_no_weight(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    from megatron.checkpoint.reader import CheckpointReader

    argv = jobs.flags(token_files, tmp_path / "run", train_iters=3, save_interval=1)
    pools(1).run(train_with_infinite_weights, 16, 24, argv)
    before, after = (CheckpointReader(tmp_path / "run" / f"global_step{step}") for step in (2, 3))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert all((before.tensor(name, kind) == after.tensor(name, kind)).all() for name in before.names)
    assert (after.manifest["skipped_steps"], after.manifest["skipped_in_a_row"]) == (1, 1)
    assert (after.manifest["optimizer_steps"], after.manifest["step"]) == (2, 3)


def test_a_diverged_run_stops_with_a_message(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    argv = jobs.flags(token_files, tmp_path / "run", train_iters=20, max_skipped_steps=3)
    traces, output = pools(2).run(train_with_infinite_weights, 40, 10**9, argv), pools(2).output(0)
    assert [trace.status for trace in traces] == [1, 1]
    assert [len(trace.losses) for trace in traces] == [9, 9]
    assert "4 steps in a row had a NaN or infinite gradient" in output
    assert "--max-skipped-steps 3" in output and "lower --lr" in output
    assert "Traceback" not in output


def save_with_full_disk(rank: int, argv: list[str]) -> jobs.Trace:
    """Training in which one rank cannot write its part of the second checkpoint."""
    import torch.distributed as dist

    from megatron.checkpoint import writer as checkpoint

    original = checkpoint.save_file
    calls = 0

    def save_file(tensors: Any, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 and dist.get_rank() == rank:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    with mock.patch.object(checkpoint, "save_file", save_file):
        return jobs.train("mdm", argv)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_save_fails_on_all_ranks_and_leaves_the_earlier_one(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, rank: int
) -> None:
    from megatron.checkpoint.files import find_checkpoint

    run_dir = tmp_path / "run"
    argv = jobs.flags(token_files, run_dir, train_iters=6, save_interval=2)
    traces, output = pools(2).run(save_with_full_disk, rank, argv), pools(2).output(rank)
    assert [trace.status for trace in traces] == [1, 1]
    assert f"rank {rank}: OSError: [Errno 28] No space left on device" in output
    assert "earlier checkpoints are complete and untouched" in output
    assert find_checkpoint(run_dir) == (run_dir / "global_step2", [])
    assert not list(run_dir.glob("*.saving"))
    assert (run_dir / "latest").read_text() == "global_step2"


def train_until_signal(rank: int, step: int, argv: list[str]) -> jobs.Trace:
    """Training in which one rank alone gets SIGTERM during a step."""
    import os

    import torch.distributed as dist

    from megatron.training.deepspeed.engine import Engine

    original, calls = Engine.train_step, 0

    def train_step(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    with mock.patch.object(Engine, "train_step", train_step):
        return jobs.train("mdm", argv)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, layout: str
) -> None:
    size, changes = LAYOUTS[layout]
    argv = jobs.flags(token_files, tmp_path / "run", **changes)
    traces = pools(size).run(train_until_signal, 1, 4, argv)
    assert [(trace.status, len(trace.losses)) for trace in traces] == [(0, 4), (0, 4)]
    assert (tmp_path / "run" / "latest").read_text() == "global_step4"
    assert "stopped by a signal to another rank at step 4" in pools(size).output(0)
