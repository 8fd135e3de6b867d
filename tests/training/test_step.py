"""The way of a step's numbers to the host."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.training.reporting import precision_warning
from megatron.training.step import PendingStep, StepNumbers, StepResult


def test_numbers_are_those_of_the_step_also_when_it_has_gone_on() -> None:
    loss = torch.tensor(2.5)
    pending = PendingStep(StepResult(loss, torch.tensor(0.5), torch.tensor(False), 1e-3))
    loss.fill_(9.0)  # the next step reuses the buffer
    assert pending.read() == StepNumbers(2.5, 0.5, False, 1e-3)


def test_what_ranks_wish_travels_with_the_numbers() -> None:
    wishes = torch.tensor([0.0, 3.0])
    pending = PendingStep(StepResult(torch.tensor(2.5), torch.tensor(0.5), torch.tensor(False), 1e-3, wishes))
    assert pending.read() == StepNumbers(2.5, 0.5, False, 1e-3, (0, 3))


def test_fp32_on_a_gpu_is_named() -> None:
    assert "--bf16" in (precision_warning("cuda", bf16=False) or "")
    assert precision_warning("cuda", bf16=True) is precision_warning("cpu", bf16=False) is None


def test_a_skipped_step_keeps_its_nan_and_its_infinite_norm() -> None:
    numbers = PendingStep(StepResult(torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(True), 0.0)).read()
    assert math.isnan(numbers.loss) and numbers.grad_norm == math.inf and numbers.skipped is True


@pytest.mark.gpu
def test_the_copy_does_not_wait_for_the_device() -> None:
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    zero = (busy @ busy).sum() * 0  # libraries and the first pinned memory, which wait
    PendingStep(StepResult(zero, zero, zero > 0, 0.1)).read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):
            busy = busy @ busy
        loss = busy.sum() * 0 + 1.0
        pending = PendingStep(StepResult(loss, loss, torch.zeros((), dtype=torch.bool, device=device), 0.1))
        assert pending._arrived is not None and not pending._arrived.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.read().lr == 0.1
