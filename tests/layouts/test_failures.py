"""Trouble on one rank concerns all: skipped steps, failed saves and requests to stop are agreed upon."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from layouts import jobs
from layouts.pool import ENVIRONMENT, Process, WorkerPool

REPO = Path(__file__).resolve().parents[2]

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
    import numpy as np

    from megatron.objectives.mdm import MaskedDiffusion

    original = MaskedDiffusion.prepare

    def prepare(self: Any, samples: Any) -> Any:
        batch = original(self, samples)
        targets = batch.targets
        is_bad = ((samples.ids >= first) & (samples.ids < last))[:, None] & (targets.loss_weights > 0)
        weights = np.where(is_bad, np.float32(np.inf), targets.loss_weights)
        return batch._replace(targets=targets._replace(loss_weights=weights))

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

    argv = jobs.flags(token_files, tmp_path / "run", train_iters=3, save_interval=1, ema_decay=0.9)
    pools(1).run(train_with_infinite_weights, 16, 24, argv)
    before, after = (CheckpointReader(tmp_path / "run" / f"global_step{step}") for step in (2, 3))
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        assert all((before.tensor(name, kind) == after.tensor(name, kind)).all() for name in before.specs)
    assert (after.manifest["skipped_steps"], after.manifest["skipped_in_a_row"]) == (1, 1)
    assert [after.manifest[name] for name in ("optimizer_steps", "average_updates", "step")] == [2, 2, 3]


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

    from megatron.checkpoint import writer

    original = writer.save_file
    calls = 0

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> str:
        nonlocal calls
        calls += 1
        if calls == 2 and dist.get_rank() == rank:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return original(tensors, path, metadata)

    with mock.patch.object(writer, "save_file", save_file):
        return jobs.train("mdm", argv)


@pytest.mark.parametrize(("rank", "is_beside"), [(0, False), (1, False), (1, True)])
def test_a_failed_save_fails_on_all_ranks_and_leaves_the_earlier_one(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, rank: int, is_beside: bool
) -> None:
    """Also one that is written beside the training, at the end of a later step."""
    from megatron.checkpoint.select import select

    run_dir = tmp_path / "run"
    argv = jobs.flags(token_files, run_dir, train_iters=6, save_interval=2, async_save=is_beside)
    traces, output = pools(2).run(save_with_full_disk, rank, argv), pools(2).output(rank)
    assert [trace.status for trace in traces] == [1, 1]
    shard = run_dir / "global_step4.saving" / f"shard-{rank:05d}.safetensors"
    assert f"rank {rank}: {shard} could not be written (No space left on device)" in output
    assert "earlier checkpoints are complete and untouched" in output
    assert select(run_dir).tag == run_dir / "global_step2"
    assert not list(run_dir.glob("*.saving"))
    assert (run_dir / "latest").read_text() == "global_step2"


def train_until_signal(rank: int, step: int, argv: list[str]) -> jobs.Trace:
    """Training in which one rank alone gets SIGTERM during a step."""
    import torch.distributed as dist

    def begins(number: int) -> None:
        if number == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    return jobs.train("mdm", argv, begins=begins)


@pytest.mark.parametrize(("layout", "log_interval", "last"), [("dp2", 1, 4), ("pp2", 100, 5), ("tp2", 100, 5)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, layout: str, log_interval: int, last: int
) -> None:
    """What a rank wishes is added up with the losses of step 4, which are read one step late, or at once for a log line."""
    size, changes = LAYOUTS[layout]
    argv = jobs.flags(token_files, tmp_path / "run", log_interval=log_interval, **changes)
    traces = pools(size).run(train_until_signal, 1, 4, argv)
    assert [(trace.status, len(trace.losses)) for trace in traces] == [(75, last), (75, last)]
    assert (tmp_path / "run" / "latest").read_text() == f"global_step{last}"
    assert f"stopped by a signal to another rank at step {last}" in pools(size).output(0)


PROGRAM = """
import os, signal, sys
from megatron.training.main import main
from megatron.training.step import Observer

class Trouble(Observer):
    steps = 0

    def step_begins(self, engine, consumed_samples):
        self.steps += 1
        if self.steps == 3 and engine.context.rank == 1:
            if sys.argv[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("token 7")

sys.exit(main("mdm", sys.argv[2:], observer=Trouble()))
"""


@pytest.mark.parametrize(("trouble", "layout"), [("raises", "pp2"), ("killed", "dp2")])
def test_the_job_ends_at_once_when_one_rank_does(token_files: Path, tmp_path: Path, trouble: str, layout: str) -> None:
    """As users start it: torchrun, loader workers, no pool. The other rank waits in a collective by then."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    argv = jobs.flags(token_files, tmp_path / "run", num_workers=None, log_interval=100, **LAYOUTS[layout][1])
    launcher = ["--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(tmp_path / "logs")]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(program), trouble, *argv]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            process.wait(timeout=90)  # a start takes ten seconds of it, on an idle machine
        finally:
            process.kill()
    waiting, troubled = ((next((tmp_path / "logs").rglob(f"{rank}/stderr.log"))).read_text() for rank in (0, 1))
    assert process.returncode == 1
    if trouble == "raises":
        assert troubled.count("Traceback") == 1 and troubled.endswith("KeyError: 'token 7'\n")
        reason = f"rank 1 on {socket.gethostname()} failed (KeyError: 'token 7')"
    else:
        reason = "a process at 127.0.0.1 is gone without a word (killed, or its host is down)"
    # torch's own warnings, of Python and of C++ (a slow answer of the store on a busy machine), are no words of ours.
    own = [
        line for line in waiting.splitlines() if "Warning" not in line and not re.match(r" |(\[rank\d+\]:)?\[W", line)
    ]
    (line,) = own
    assert line.startswith(f"error: rank 0 lost a peer: {reason}; a run needs all its ranks; ")


def run_with_a_stuck_rank(troubled: int, argv: list[str]) -> int:
    """Training in which one rank raises while the other waits for ever, as in a collective of NCCL, and so would whoever
    destroyed a process group."""
    import threading

    import torch.distributed as dist

    from megatron.parallel import connection
    from megatron.training.main import main
    from megatron.training.step import Observer

    connection.POLL_SECONDS, connection.GRACE_SECONDS = 1.0, 1.0
    dist.destroy_process_group = lambda *_: threading.Event().wait()  # type: ignore[assignment]

    class Trouble(Observer):
        steps = 0

        def step_begins(self, engine: Any, consumed_samples: int) -> None:
            self.steps += 1
            if self.steps == 3:
                if engine.context.rank == troubled:
                    raise KeyError("token 7")
                threading.Event().wait()

    return main("mdm", argv, observer=Trouble())


@pytest.mark.parametrize(("troubled", "layout"), [(0, "dp2"), (1, "pp2")])
def test_a_rank_in_a_stuck_collective_hears_that_another_has_failed(
    token_files: Path, tmp_path: Path, troubled: int, layout: str
) -> None:
    """Under a launcher that ends nobody (srun), with the meeting place at rank 0, which fails or waits."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    argv = jobs.flags(token_files, tmp_path / "run", **LAYOUTS[layout][1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        Process(run_with_a_stuck_rank, troubled, argv, environment={**place, "RANK": str(rank)}) for rank in range(2)
    ]
    ranks[troubled].wait_until(lambda: "KeyError" in ranks[troubled].output)
    assert [rank.wait(30) for rank in ranks] == [1, 1]
    host, waiting = socket.gethostname(), 1 - troubled
    assert ranks[troubled].output.endswith("KeyError: 'token 7'\n")
    last = ranks[waiting].output.splitlines()[-1]
    assert last.startswith(
        f"error: rank {waiting} lost a peer: rank {troubled} on {host} failed (KeyError: 'token 7'); "
    )
