"""What an optimizer step reports: tensors on the device, and their way to the host without a wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports. The tensors are scalars on the device: reading one waits for it.

    Attributes:
        loss: [] fp32, mean over the global batch.
        grad_norm: [] fp32, global gradient norm before clipping; infinite when the step was skipped.
        skipped: [] bool, whether a NaN or infinite gradient kept the weights from changing.
        lr: learning rate of the step.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    lr: float

    def to_host(self) -> PendingStep:
        """Start the copy to the host and return at once."""
        return PendingStep(self)


@dataclass(frozen=True)
class StepNumbers:
    """A :class:`StepResult` as plain numbers."""

    loss: float
    grad_norm: float
    skipped: bool
    lr: float


class PendingStep:
    """The numbers of a step on their way to the host.

    Read it one step late: by then the device has long made them, so the host goes on preparing the next step instead of
    waiting for this one.
    """

    def __init__(self, result: StepResult) -> None:
        self._lr = result.lr
        self._numbers = torch.stack((result.loss, result.grad_norm, result.skipped.to(result.loss.dtype)))
        self._arrived: torch.cuda.Event | None = None
        if self._numbers.device.type == "cuda":
            on_device, self._numbers = self._numbers, torch.empty(3, dtype=self._numbers.dtype, pin_memory=True)
            self._numbers.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def is_here(self) -> bool:
        """Whether :meth:`read` would not wait."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> StepNumbers:
        """The numbers; waits for the device if the step has not ended."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm, skipped = self._numbers.tolist()
        return StepNumbers(loss, grad_norm, bool(skipped), self._lr)
