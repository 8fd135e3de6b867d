"""A run goes on with another global batch: it trains on exactly the samples that were left, each once, in their order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import jobs
from layouts.pool import WorkerPool

SAMPLES, STOPPED_AT = 160, 80


@pytest.mark.parametrize(("batch", "micro_batch"), [(16, 4), (4, 4), (4, 2)])
def test_the_remaining_samples_are_those_of_the_straight_run(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, batch: int, micro_batch: int
) -> None:
    """Batch 8 until half of the way; the tokens that the engine reads then are those that it would have read."""
    options = {"train_iters": None, "train_samples": SAMPLES, "save_interval": STOPPED_AT // 8}
    run_dir = tmp_path / "run"
    (straight,) = pools(1).run(jobs.train, "ar", jobs.flags(token_files, run_dir, **options), ("tensors",))
    shutil.rmtree(run_dir / f"global_step{SAMPLES // 8}")
    (run_dir / "latest").write_text(f"global_step{STOPPED_AT // 8}")
    changes = {"load": run_dir, "global_batch_size": batch, "micro_batch_size": micro_batch}
    (resumed,) = pools(1).run(jobs.train, "ar", jobs.flags(token_files, run_dir, **options, **changes), ("tensors",))
    assert (straight.status, resumed.status) == (0, 0)
    expected, read = (torch.cat([batch.inputs.input_ids for batch in trace.batches]) for trace in (straight, resumed))
    assert len(expected) == SAMPLES and len(expected.unique(dim=0)) == SAMPLES
    assert torch.equal(read, expected[STOPPED_AT:])
    assert len(resumed.losses) == (SAMPLES - STOPPED_AT) // batch
