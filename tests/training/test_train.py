"""What a run makes of step results: averages over log intervals, skipped steps, the best validation, the story in order."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import jobs
from layouts.pool import WorkerPool

from megatron import screen
from megatron.config.schema import RunConfig
from megatron.data.batches import Batches
from megatron.data.loader import build_loader
from megatron.errors import Failure
from megatron.parallel.connection import Connection
from megatron.parallel.context import ParallelContext
from megatron.parallel.launch import Launch
from megatron.runs.record import TrainRow
from megatron.training.progress import Interval, Progress, Throughput
from megatron.training.reporting import Screen
from megatron.training.step import StepResult
from megatron.training.stop import StopRequest

UNIQUE_TOKENS, PARAMETERS, BATCH, SEQ = 400, 7, 4, 10


def drive(
    *results: tuple[float, bool], log_interval: int = 2, progress: Progress | None = None, max_skipped: int = 10
) -> list[TrainRow]:
    """The rows of a run whose steps give (loss, skipped)."""
    progress = progress or Progress()
    throughput = Throughput(
        batch_size=BATCH, seq_length=SEQ, flops_per_token=1.0, num_devices=1, device=torch.device("cpu")
    )
    screen = Screen(total_steps=9, first_step=0, enabled=True)
    interval, rows = Interval(progress, screen, throughput, max_skipped=max_skipped), []
    for count, (loss, skipped) in enumerate(results, 1):
        progress.advance(samples=BATCH, tokens=BATCH * SEQ)
        norm = torch.tensor(math.inf if skipped else 1.0)
        interval.add(StepResult(torch.tensor(loss), norm, torch.tensor(skipped), 1e-3))
        if progress.step % log_interval == 0 or count == len(results):
            rows.append(interval.row(progress.position(unique_tokens=UNIQUE_TOKENS, compute=6 * PARAMETERS)))
    return rows


def test_a_log_line_averages_its_interval_and_says_where_the_run_is() -> None:
    first, second, last = drive((1.0, False), (2.0, False), (6.0, False), (4.0, False), (9.0, False))
    assert [row.loss for row in (first, second, last)] == [1.5, 5.0, 9.0]
    assert (second.step, second.samples, second.tokens, second.batch_size) == (4, 16, 160, BATCH)
    assert (second.epoch, second.flops) == (160 / 400, 6 * 7 * 160)


def test_skipped_steps_are_counted_but_not_averaged(capsys: pytest.CaptureFixture) -> None:
    """Also where the loss of the skipped step is finite and only its gradient is not."""
    results = [(2.0, False), (100.0, True), (math.nan, True), (math.inf, True), (4.0, False)]
    first, second, last = drive(*results)
    assert (first.loss, first.skipped_steps) == (2.0, 1)
    assert math.isnan(second.loss)  # no loss at all, which is not a loss of 0
    assert second.skipped_steps == 3
    assert (last.loss, last.skipped_steps, last.grad_norm) == (4.0, 3, 1.0)
    assert "step 2 skipped: its gradient is not finite (1 so far)" in capsys.readouterr().out


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    """The limit is on steps in a row: single bad steps may add up to more. It is noticed one step late."""
    drive(*[(1.0, step % 2 == 0) for step in range(9)], max_skipped=2, log_interval=100)
    progress = Progress()
    with pytest.raises(Failure, match=r"3 steps in a row .*--max-skipped-steps 2\).* lower --lr"):
        drive((1.0, False), *[(math.nan, True)] * 8, max_skipped=2, log_interval=100, progress=progress)
    assert progress.step == 5


def test_an_interval_goes_on_after_a_restart() -> None:
    progress = Progress(step=2, consumed_samples=8, tokens=80, loss_sum=3.0, loss_count=2)
    assert [row.loss for row in drive((6.0, False), (7.0, False), log_interval=3, progress=progress)] == [3.0, 7.0]


def test_epochs_of_other_data_are_kept() -> None:
    manifest = {"step": 5, "consumed_samples": 40, "tokens": 1000, "unique_tokens": 500}
    same = Progress.of(manifest, unique_tokens=500)
    other = Progress.of(manifest, unique_tokens=250)
    assert same.epoch(500) == other.epoch(250) == 2.0
    for progress in (same, other):
        progress.advance(samples=10, tokens=250)
    assert (same.epoch(500), other.epoch(250)) == (2.5, 3.0)
    resumed = Progress.of({**vars(other), "unique_tokens": 250}, unique_tokens=250)
    assert resumed == other and resumed.epoch(250) == 3.0
    first_version = {"step": 5, "consumed_samples": 40, "config": {"model": {"seq_length": 16}}}
    assert Progress.of(first_version, unique_tokens=500).tokens == 640


def test_rates_are_those_of_one_device_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    throughput = Throughput(
        batch_size=8, seq_length=16, flops_per_token=1e12, num_devices=4, device=torch.device("cpu")
    )
    interval = Interval(Progress(), Screen(total_steps=9, first_step=0, enabled=False), throughput, max_skipped=1)
    for _ in range(3):
        interval.add(StepResult(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(False), 1e-3))
        now[0] += 2.0
        with interval.paused():
            now[0] += 50.0
    row = interval.row(Progress().position(unique_tokens=1, compute=1.0))
    assert (row.seconds, row.step_seconds, row.tokens_per_second, row.tflops) == (6.0, 2.0, 64.0, 16.0)


def test_losses_and_skips_of_the_unfinished_interval_travel_with_the_checkpoint() -> None:
    throughput = Throughput(batch_size=1, seq_length=1, flops_per_token=1.0, num_devices=1, device=torch.device("cpu"))
    progress = Progress()
    interval = Interval(progress, Screen(total_steps=9, first_step=0, enabled=False), throughput, max_skipped=1)
    for loss, skipped in ((1.0, False), (2.0, False), (math.nan, True)):
        interval.add(StepResult(torch.tensor(loss), torch.tensor(1.0), torch.tensor(skipped), 1e-3))
    interval.store()
    assert (progress.loss_sum, progress.loss_count) == (3.0, 2)
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (1, 1), "that of the step before the save, too"


def test_saves_fall_on_the_interval_and_on_the_last_step(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """And come before the validation of the same step, which may take long."""
    options: dict[str, Any] = {
        "train_iters": 5,
        "save_interval": 2,
        "log_interval": 3,
        "eval_interval": 4,
        "eval_iters": 1,
    }
    argv = jobs.flags(token_files, tmp_path, valid_data_path=token_files / "valid", **options)
    assert pools(1).run(jobs.train, "mdm", argv)[0].status == 0
    lines = pools(1).output(0).splitlines()
    story = [line.split()[0] + line.split("global_step")[1][0] for line in lines if line.startswith("saved")]
    assert story == ["saved2", "saved4", "saved5"]
    order = [line.split()[0] for line in lines if line.startswith(("saved", "validation at"))]
    assert order == ["saved", "saved", "validation", "saved", "validation"]
    assert list(jobs.records(tmp_path)) == [3, 5]


def engines_kept(argv: list[str]) -> int:
    """Engines that a run leaves in its process."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    def count() -> int:
        gc.collect()
        return sum(isinstance(each, DeepSpeedEngine) for each in gc.get_objects())

    before = count()
    jobs.train("mdm", argv)
    return count() - before


def test_a_finished_run_lets_go_of_its_engine(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """Hooks of DeepSpeed would keep weights, optimizer and process groups until the end of a process that trains twice."""
    for number, layout in enumerate([{}, {"tp_size": 2}]):
        argv = jobs.flags(token_files, tmp_path / str(number), train_iters=2, **layout)
        assert pools(2).run(engines_kept, argv) == [0, 0], layout


def beats(argv: list[str]) -> int:
    """How often a run says that it goes on."""
    from megatron.parallel.connection import Connection

    heard: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "beat", lambda self: heard.append(None))
        assert jobs.train("mdm", argv).status == 0
    return len(heard)


def limits_of_loaders(argv: list[str]) -> list[float]:
    """How long a run waits for a batch, in seconds, of every loader that it makes."""
    found: list[float] = []

    def build(*arguments: Any, timeout_seconds: float = 0, **options: Any) -> Batches:
        found.append(timeout_seconds)
        return build_loader(*arguments, timeout_seconds=timeout_seconds, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("train", "validation"):
            patch.setattr(f"megatron.training.{module}.build_loader", build)
        assert jobs.train("mdm", argv).status == 0
    return found


def test_a_loader_process_that_hangs_is_waited_for_as_long_in_a_validation(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    more = {
        "valid_data_path": token_files / "valid",
        "eval_iters": 2,
        "distributed_timeout_minutes": 7,
    }
    (found,) = pools(1).run(limits_of_loaders, jobs.flags(token_files, tmp_path, train_iters=1, **more))
    assert found == [420, 420]


def progress_of_validations(argv: list[str]) -> list[tuple[int, int | None]]:
    """How far each validation of a run says that it is at its end, and of what."""
    found: list[tuple[int, int | None]] = []

    class Seen(screen.Progress):
        def close(self) -> None:
            found.append((self.done, self.total))
            super().close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.training.validation.Progress", Seen)
        assert jobs.train("mdm", argv).status == 0
    return found


def test_a_validation_ends_at_a_hundred_percent(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """Also where its samples are no whole rounds of micro-batches."""
    sizes = {"micro_batch_size": 4, "global_batch_size": 8, "train_iters": 1}
    more = {"valid_data_path": token_files / "valid", "eval_iters": "full", "num_mc": 2, **sizes}
    found = pools(2).run(progress_of_validations, jobs.flags(token_files, tmp_path, **more))
    assert all(done == total for ((done, total),) in found), found


def test_the_time_limit_counts_from_the_start_of_the_program() -> None:
    """A script passes what is left of its job when it starts; what building and loading take is not added to it."""
    for minutes_ago, is_over in ((9.0, False), (11.0, True)):
        connection = Connection(Launch(began=time.monotonic() - 60 * minutes_ago))
        stop = StopRequest(ParallelContext(), connection, RunConfig(exit_duration_in_mins=10.0))
        assert stop.hear(()) == ("--exit-duration-in-mins" if is_over else None)


def test_a_run_that_goes_on_says_so_in_every_step_and_within_a_validation(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """Else its watch takes it for one that hangs, and shows its stacks."""
    plain = {"train_iters": 6, "log_interval": 3}
    validated = {**plain, "valid_data_path": token_files / "valid", "eval_interval": 6, "eval_iters": 4}
    found = [
        pools(2).run(beats, jobs.flags(token_files, tmp_path / str(number), **flags))
        for number, flags in enumerate((plain, validated))
    ]
    assert min(found[0]) >= 6, found
    assert all(more > count for count, more in zip(*found)), found
