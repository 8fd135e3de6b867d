"""The loss of every objective, written once: ``Σ loss_weights · ce / normalizer`` over the positions that need it."""

from __future__ import annotations

import torch

from megatron.model.batch import Targets
from megatron.parallel.context import ParallelContext
from megatron.parallel.cross_entropy import linear_cross_entropy

HeadOutput = tuple[torch.Tensor, torch.Tensor]


def weighted_loss(output: HeadOutput, targets: Targets, context: ParallelContext) -> torch.Tensor:
    """Scalar loss of one micro-batch, fp32.

    Args:
        output: hidden states [batch, seq, hidden] and this rank's rows of the output matrix.
        targets: see :data:`Targets`.
        context: this process.
    """
    normalizer = targets[3]
    loss, _ = _cross_entropy(output, targets, context)
    return loss / normalizer


def sample_losses(output: HeadOutput, targets: Targets, context: ParallelContext) -> torch.Tensor:
    """Loss of each sample [batch] fp32; their mean is :func:`weighted_loss`."""
    _, loss_weights, positions, normalizer = targets
    batch, seq = loss_weights.shape
    _, ce = _cross_entropy(output, targets, context)
    weighted = ce * loss_weights.reshape(-1)[positions]
    sums = torch.zeros(batch, dtype=torch.float32, device=ce.device)
    sums.index_add_(0, positions // seq, weighted)
    return sums * (batch / normalizer)


def _cross_entropy(output: HeadOutput, targets: Targets, context: ParallelContext) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = output
    labels, loss_weights, positions, _ = targets
    # The rows of the output are the same on every tensor-parallel rank; linear_cross_entropy sums the gradients.
    rows = hidden.reshape(-1, hidden.shape[-1])
    if positions.numel() < rows.shape[0]:
        rows = rows.index_select(0, positions)
    return linear_cross_entropy(
        rows, weight, labels.reshape(-1)[positions], loss_weights.reshape(-1)[positions], context
    )
