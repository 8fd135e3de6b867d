"""Where a run is, counted in samples and tokens that were trained on, never derived from steps; and what happens between
two log lines: losses summed on the device, skipped steps noticed one step late, time and rates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from megatron.errors import Failure
from megatron.model.arithmetic import peak_flops
from megatron.runs.record import DIVERGED, TrainRow
from megatron.training.reporting import Screen
from megatron.training.step import PendingStep, StepNumbers, StepResult


@dataclass
class Progress:
    """Everything that a checkpoint needs besides tensors.

    Attributes:
        step: optimizer steps made, skipped ones included.
        consumed_samples: samples of the training stream consumed.
        tokens: tokens trained on, whatever the sequence length was when.
        tokens_before, epochs_before: where the training data were last changed, and how often they had been seen by then.
        skipped_steps: steps skipped for a NaN or infinite gradient, in the whole run.
        skipped_in_a_row: the same, since the last good step.
        loss_sum, loss_count: losses since the last log line, so that a resumed run prints the same line.
        best_step, best_text: best validation so far, with its label and error.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    tokens_before: int = 0
    epochs_before: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best_step: int | None = None
    best_text: str = ""

    @classmethod
    def of(cls, manifest: dict[str, Any], *, unique_tokens: int) -> Progress:
        """Where a checkpoint stopped.

        Args:
            manifest: of the checkpoint, of this version or an earlier one; empty: at the beginning.
            unique_tokens: of the training data from now on; epochs of other data are kept.
        """
        progress = cls(**{item.name: manifest[item.name] for item in fields(cls) if item.name in manifest})
        if manifest and "tokens" not in manifest:
            progress.tokens = progress.consumed_samples * manifest["config"]["model"]["seq_length"]
        before = manifest.get("unique_tokens", unique_tokens)
        if before != unique_tokens:
            progress.epochs_before = progress.epoch(before)
            progress.tokens_before = progress.tokens
        return progress

    def epoch(self, unique_tokens: int) -> float:
        """How often the training data were seen; 0 without any."""
        return self.epochs_before + (self.tokens - self.tokens_before) / unique_tokens if unique_tokens else 0.0

    def position(self, *, unique_tokens: int, compute: float) -> dict[str, Any]:
        """The fields that every row of metrics.jsonl begins with.

        Args:
            unique_tokens: tokens of one epoch.
            compute: FLOPs per token, by C = 6·N·D.
        """
        return {
            "step": self.step,
            "samples": self.consumed_samples,
            "tokens": self.tokens,
            "epoch": self.epoch(unique_tokens),
            "flops": compute * self.tokens,
        }

    def advance(self, *, samples: int, tokens: int) -> None:
        """One more step is on its way."""
        self.step += 1
        self.consumed_samples += samples
        self.tokens += tokens

    def count_skip(self, skipped: bool, *, limit: int) -> None:
        """Note whether a step was skipped.

        Raises:
            Failure: more than ``limit`` in a row were.
        """
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_steps += int(skipped)
        if self.skipped_in_a_row > limit:
            raise Failure(
                f"{self.skipped_in_a_row} {DIVERGED}",
                f"a run that diverges ends (--max-skipped-steps {limit})",
                "resume from an earlier checkpoint with a lower --lr",
            )


@dataclass(frozen=True)
class Throughput:
    """Tokens per second, TFLOP/s and MFU of one device over log intervals.

    Attributes:
        batch_size: samples in a step, over all ranks.
        seq_length: tokens per sample.
        flops_per_token: forward and backward.
        num_devices: devices that share the work; ``device`` is one of them.
    """

    batch_size: int
    seq_length: int
    flops_per_token: float
    num_devices: int
    device: torch.device

    def report(self, *, steps: int, seconds: float) -> dict[str, Any]:
        """``tokens_per_second``, ``tflops``, ``mfu`` and ``batch_size`` over ``steps`` steps that took ``seconds``."""
        tokens_per_second = steps * self.batch_size * self.seq_length / max(seconds, 1e-9)
        flops, peak = tokens_per_second * self.flops_per_token / self.num_devices, peak_flops(self.device)
        return {
            "tokens_per_second": tokens_per_second,
            "batch_size": self.batch_size,
            "tflops": flops / 1e12,
            "mfu": None if peak is None else flops / peak,
        }


class Interval:
    """Steps since the last log line. Nothing waits for the device until :meth:`row`.

    Attributes:
        numbers: of the last step that was read, the same on every rank.
    """

    def __init__(self, progress: Progress, screen: Screen, throughput: Throughput, *, max_skipped: int) -> None:
        """Args:
        progress: where the run is; a resumed interval goes on with its losses.
        screen: hears of skipped steps.
        throughput: rates of this run.
        max_skipped: steps in a row that may be skipped.
        """
        self.progress, self.screen, self.throughput, self.max_skipped = progress, screen, throughput, max_skipped
        self.numbers = StepNumbers(math.nan, math.nan, skipped=False, lr=math.nan)
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
        self._read()
        self._pending = self.progress.step, PendingStep(result)

    def row(self, position: dict) -> TrainRow:
        """The log line; begins a new interval. The only wait for the device in a run.

        Args:
            position: see :meth:`Progress.position`.
        """
        self.store()
        seconds, progress = time.perf_counter() - self._started, self.progress
        row = TrainRow(
            **position,
            # Where every step was skipped there is no loss to show.
            loss=progress.loss_sum / progress.loss_count if progress.loss_count else math.nan,
            lr=self.numbers.lr,
            grad_norm=self.numbers.grad_norm,
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
        """Note in the progress what the steps of the interval gave, for a checkpoint in the middle of it.

        Raises:
            Failure: too many steps in a row were skipped.
        """
        self._read()
        self.progress.loss_sum, self.progress.loss_count = self._sum.item(), int(self._count.item())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Validation and saving are no training time."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        self.numbers = pending.read()
        self.progress.count_skip(self.numbers.skipped, limit=self.max_skipped)
        if self.numbers.skipped:
            total = self.progress.skipped_steps
            self.screen.print(f"step {step} skipped: its gradient is not finite ({total} so far)")
