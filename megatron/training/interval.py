"""What happens between two log lines: losses summed on the device, skipped steps noticed one step late, time and rates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.runs.record import TrainRow
from megatron.training.progress import Progress
from megatron.training.reporting import Screen, Throughput
from megatron.training.step import PendingStep, StepNumbers, StepResult


class Interval:
    """Steps since the last log line. Nothing waits for the device until :meth:`row`."""

    def __init__(self, progress: Progress, screen: Screen, throughput: Throughput, *, max_skipped: int) -> None:
        """Args:
        progress: where the run is; a resumed interval goes on with its losses.
        screen: hears of skipped steps.
        throughput: rates of this run.
        max_skipped: steps in a row that may be skipped.
        """
        self.progress, self.screen, self.throughput, self.max_skipped = progress, screen, throughput, max_skipped
        self._sum = torch.tensor(progress.loss_sum, device=throughput.device)
        self._count = torch.tensor(progress.loss_count, device=throughput.device)
        self._pending: tuple[int, PendingStep] | None = None
        self._num_steps = 0
        self._started = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Take in a step and read the one before it, whose numbers the device has long made.

        Raises:
            Failure: too many steps in a row were skipped.
        """
        self._sum += torch.where(result.skipped, 0.0, result.loss)
        self._count += ~result.skipped
        self._num_steps += 1
        before, self._pending = self._pending, (self.progress.step, result.to_host())
        if before is not None:
            self._read(*before)

    def row(self, position: dict) -> TrainRow:
        """The log line; begins a new interval. The only wait for the device in a run.

        Args:
            position: see :meth:`Progress.position`.
        """
        assert self._pending is not None
        numbers, self._pending = self._read(*self._pending), None
        self.store()
        seconds, progress = time.perf_counter() - self._started, self.progress
        row = TrainRow(
            **position,
            # Where every step was skipped there is no loss to show.
            loss=progress.loss_sum / progress.loss_count if progress.loss_count else math.nan,
            lr=numbers.lr,
            grad_norm=numbers.grad_norm,
            seconds=seconds,
            step_seconds=seconds / self._num_steps,
            skipped_steps=progress.skipped_steps,
            **self.throughput.report(steps=self._num_steps, seconds=seconds),
        )
        self._sum.zero_()
        self._count.zero_()
        self._num_steps, self._started = 0, time.perf_counter()
        return row

    def store(self) -> None:
        """Note the sums in the progress, for a checkpoint in the middle of an interval."""
        self.progress.loss_sum, self.progress.loss_count = self._sum.item(), int(self._count.item())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Validation and saving are no training time."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def _read(self, step: int, pending: PendingStep) -> StepNumbers:
        numbers = pending.read()
        self.progress.count_skip(numbers.skipped, limit=self.max_skipped)
        if numbers.skipped:
            total = self.progress.skipped_steps
            self.screen.print(f"step {step} skipped: its gradient is not finite ({total} so far)")
        return numbers
