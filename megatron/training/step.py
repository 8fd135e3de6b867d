"""What an optimizer step reports: tensors on the device, their way to the host without a wait, and who may look on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron.model.batch import ModelBatch, Targets

if TYPE_CHECKING:
    from megatron.training.engine import Engine


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports. The tensors are scalars on the device: reading one waits for it.

    Attributes:
        loss: [] fp32, mean over the global batch.
        grad_norm: [] fp32, global gradient norm before clipping; infinite when the step was skipped.
        skipped: [] bool, whether a NaN or infinite gradient kept the weights from changing.
        lr: learning rate of the step.
        wishes: [n] fp32, ranks that wished to stop when they had queued the step, by reason; None: nobody was asked.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    lr: float
    wishes: torch.Tensor | None = None


@dataclass(frozen=True)
class StepNumbers:
    """A :class:`StepResult` as plain numbers."""

    loss: float
    grad_norm: float
    skipped: bool
    lr: float
    wishes: tuple[int, ...] = ()


class PendingStep:
    """The numbers of a step on their way to the host: the copy is started, and nothing waits.

    Read it one step late: by then the device has long made them, so the host goes on preparing the next step instead of
    waiting for this one.
    """

    def __init__(self, result: StepResult) -> None:
        self._lr = result.lr
        self._numbers = torch.stack((result.loss, result.grad_norm, result.skipped.to(result.loss.dtype)))
        if result.wishes is not None:
            self._numbers = torch.cat((self._numbers, result.wishes))
        self._arrived: torch.cuda.Event | None = None
        if self._numbers.device.type == "cuda":
            on_device = self._numbers
            self._numbers = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._numbers.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> StepNumbers:
        """The numbers; waits for the device if the step has not ended."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm, skipped, *wishes = self._numbers.tolist()
        return StepNumbers(loss, grad_norm, bool(skipped), self._lr, tuple(map(int, wishes)))


class Observer:
    """Callbacks of one rank's run, for tests and instruments; override those of interest. The default costs nothing.

    They look and change nothing. What goes on inside the model is seen by hooks on ``engine.module``, which is the plain
    model or this rank's stage of the pipeline.
    """

    def built(self, engine: Engine) -> None:
        """The engine stands, with initial weights and no checkpoint loaded yet."""

    def step_begins(self, engine: Engine, consumed_samples: int) -> None:
        """A training step is about to read its first micro-batch."""

    def batch_read(self, batch: ModelBatch) -> None:
        """The engine took a micro-batch from the loader, for training or for validation."""

    def loss_asked(self, targets: Targets) -> None:
        """The loss of a micro-batch is about to be computed against these targets (last stage only)."""

    def step_ended(self, result: StepResult) -> None:
        """A training step is queued on the device; reading the result waits for it."""
