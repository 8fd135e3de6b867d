"""Kinds of loss: from the output of the model to a scalar for training, or to a number per token for evaluation.

Imports no torch, so that objectives can name their loss; the kernels are imported where they run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from megatron.model.batch import Targets
    from megatron.parallel.context import ParallelContext


class HeadOutput(NamedTuple):
    """What the last layer hands to the loss, which decides the logits that are needed.

    Attributes:
        hidden: [batch, width, hidden], the same on every tensor-parallel rank.
        matrix: [vocab / tp, hidden], this rank's rows of the output matrix.
    """

    hidden: torch.Tensor
    matrix: torch.Tensor


class LossKind(Protocol):
    """One way from predictions to a loss. A kind that needs more than labels and weights adds fields to Targets."""

    def reduce(self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext) -> torch.Tensor:
        """Scalar loss of one micro-batch, fp32, differentiable: the sum of :meth:`per_token` over ``Σ num_tokens``."""

    def per_token(self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext) -> torch.Tensor:
        """What each position adds to the loss of its sample, in nats, fp32 [batch, width]; 0 where there is no loss."""


@dataclass(frozen=True)
class WeightedCrossEntropy:
    """``Σ loss_weights · ce / Σ num_tokens`` over the positions with a weight."""

    def reduce(self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext) -> torch.Tensor:
        """See :class:`LossKind`."""
        loss, _ = self._cross_entropy(output, targets, context)
        return loss / targets.num_tokens.sum().clamp(min=1)  # a micro-batch may be without any token in the loss

    def per_token(self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext) -> torch.Tensor:
        """See :class:`LossKind`."""
        _, ce = self._cross_entropy(output, targets, context)
        weights = targets.loss_weights.reshape(-1)
        losses = weights.new_zeros(weights.shape)
        losses[targets.positions] = ce * weights[targets.positions]
        return losses.view(targets.loss_weights.shape)

    def _cross_entropy(
        self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum, and the cross-entropy [n] of the positions in the loss."""
        from megatron.parallel.cross_entropy import linear_cross_entropy

        labels, weights, positions, _ = targets
        rows = output.hidden.reshape(-1, output.hidden.shape[-1])
        if positions.numel() < rows.shape[0]:
            rows = rows.index_select(0, positions)
        # The rows are the same on every tensor-parallel rank; linear_cross_entropy sums the gradients.
        return linear_cross_entropy(
            rows, output.matrix, labels.reshape(-1)[positions], weights.reshape(-1)[positions], context
        )
