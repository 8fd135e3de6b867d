"""The training loop: steps, log lines, validation, checkpoints, and the ways to stop."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megatron.config.schema import Config
from megatron.files import write_atomically
from megatron.model.arithmetic import flops_after
from megatron.model.batch import ModelBatch
from megatron.training.deepspeed.engine import Engine, StepResult
from megatron.training.reporting import MetricsLog, Progress, Throughput


@dataclass
class TrainState:
    """Where a run is; everything that a checkpoint needs besides tensors.

    Attributes:
        step: optimizer steps made, skipped ones included.
        consumed_samples: samples of the training stream consumed.
        skipped_steps: steps skipped for a NaN or infinite gradient, in the whole run.
        skipped_in_a_row: the same, since the last good step.
        loss_sum: losses since the last log line, so that a resumed run prints the same line.
        loss_count: their number.
        best_step, best_nll: best validation so far.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best_step: int | None = None
    best_nll: float | None = None


class StopRequest:
    """Signals, a kill-switch file and a time limit, agreed between all ranks once per step."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.deadline = None
        if config.run.exit_duration_in_mins is not None:
            self.deadline = time.monotonic() + 60 * config.run.exit_duration_in_mins
        self.signal_name: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt  # Ctrl-C twice: do not wait for the checkpoint
        self.signal_name = signal.Signals(number).name

    def reason(self) -> str | None:
        """Why to save and stop now, or None. A collective call."""
        switch = self.config.run.kill_switch_file
        flags = [
            self.signal_name is not None,
            switch is not None and Path(switch).exists(),
            self.deadline is not None and time.monotonic() > self.deadline,
        ]
        names = (
            str(self.signal_name or "a signal to another rank"),
            f"the kill-switch file {switch}",
            "--exit-duration-in-mins",
        )
        return next((name for flag, name in zip(self.engine.context.any_rank(flags), names) if flag), None)


@dataclass
class Loop:
    """One training run.

    Attributes:
        config: resolved configuration.
        engine: model and optimizer.
        batches: this rank's micro-batches from ``state.consumed_samples`` on.
        state: where the run is.
        validate: runs a validation, or None without validation data.
        save: writes a checkpoint of the state, or None without ``--save``.
        log, progress, throughput: reporting; the log exists on the first rank only.
        unique_tokens, parameters: for epochs and FLOPs.
    """

    config: Config
    engine: Engine
    batches: Iterator[ModelBatch]
    state: TrainState
    validate: Callable[[], dict] | None
    save: Callable[[TrainState], None] | None
    log: MetricsLog | None
    progress: Progress
    throughput: Throughput
    unique_tokens: int
    parameters: int

    def run(self) -> str | None:
        """Train to the end. Returns why it stopped early, or None.

        Raises:
            RuntimeError: too many steps in a row had a NaN or infinite gradient.
        """
        run, state = self.config.run, self.state
        assert run.train_samples and run.global_batch_size
        last_step = run.train_samples // run.global_batch_size
        stop = StopRequest(self.config, self.engine)
        loss_sum = torch.tensor(state.loss_sum, device=self.engine.context.device)
        interval_started, interval_step = time.perf_counter(), state.step
        reason = None
        while state.step < last_step and reason is None:
            result = self.engine.train_step(self.batches, consumed_samples=state.consumed_samples)
            state.step += 1
            state.consumed_samples += run.global_batch_size
            self._count_skips(result)
            if not result.skipped:
                loss_sum += result.loss
                state.loss_count += 1
            self.progress.step()
            if state.step % run.log_interval == 0 or state.step == last_step:
                # The only wait for the device in the loop. Where every step was skipped there is no loss to show.
                mean = loss_sum.item() / state.loss_count if state.loss_count else math.nan
                self._log_train(mean, result, state.step - interval_step, time.perf_counter() - interval_started)
                loss_sum.zero_()
                state.loss_count = 0
                interval_started, interval_step = time.perf_counter(), state.step
            paused = time.perf_counter()
            is_last = state.step == last_step
            if self.validate and (is_last or (run.eval_interval and state.step % run.eval_interval == 0)):
                self.log_validation(self.validate())
            reason = None if is_last else stop.reason()
            if self.save and (is_last or reason or (run.save_interval and state.step % run.save_interval == 0)):
                state.loss_sum = loss_sum.item()
                self.save(state)
            interval_started += time.perf_counter() - paused  # validation and saving do not count as training time
        return reason

    def log_validation(self, result: dict) -> None:
        """Record a validation and remember the best one."""
        state = self.state
        is_best = math.isfinite(result["nll"]) and (state.best_nll is None or result["nll"] < state.best_nll)
        if is_best:
            state.best_step, state.best_nll = state.step, result["nll"]
        record = {"kind": "valid", **self._position(), **result, "best": is_best}
        if self.log is not None:
            self.log.write(record)
            if is_best:
                best = {"step": state.best_step, "nll": state.best_nll, "label": result["label"]}
                write_atomically(self.log.run_dir / "best.json", json.dumps(best))
        self.progress.valid_line(record)

    def _log_train(self, loss: float, result: StepResult, steps: int, seconds: float) -> None:
        rates = self.throughput.report(steps=steps, seconds=seconds)
        record = {"kind": "train", **self._position(), "loss": loss, "lr": result.lr, "grad_norm": result.grad_norm,
                  "seconds": seconds, "step_seconds": seconds / max(1, steps), "batch_size": self.config.run.global_batch_size,
                  **rates, "skipped_steps": self.state.skipped_steps}  # fmt: skip
        if self.log is not None:
            self.log.write(record)
        self.progress.train_line(record)

    def _position(self) -> dict[str, float]:
        samples = self.state.consumed_samples
        tokens = samples * self.config.model.seq_length
        epoch = tokens / self.unique_tokens if self.unique_tokens else 0.0
        flops = flops_after(samples, self.config, self.parameters)
        return {"step": self.state.step, "samples": samples, "tokens": tokens, "epoch": epoch, "flops": flops}

    def _count_skips(self, result: StepResult) -> None:
        state, limit = self.state, self.config.optimizer.max_skipped_steps
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.skipped else 0
        state.skipped_steps += int(result.skipped)
        if result.skipped:
            self.progress.print(f"step {state.step} skipped: its gradient is not finite ({state.skipped_steps} so far)")
        if state.skipped_in_a_row > limit:
            raise RuntimeError(
                f"{state.skipped_in_a_row} steps in a row had a NaN or infinite gradient; the run has diverged "
                f"(--max-skipped-steps {limit}); resume from an earlier checkpoint with a lower --lr"
            )


def state_to_dict(state: TrainState) -> dict:
    """Fields of a checkpoint's manifest."""
    return asdict(state)


def state_from_dict(values: dict) -> TrainState:
    """The inverse of :func:`state_to_dict`; unknown fields are ignored."""
    known = {name: values[name] for name in asdict(TrainState()) if name in values}
    return replace(TrainState(), **known)
