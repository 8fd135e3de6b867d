"""Kinds of loss: from the output of the model to a scalar for training, or to a number per token for evaluation.

Imports no torch, so that objectives can name their loss; the kernels are imported where they run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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


class LossKind(ABC):
    """One way from predictions to a loss, ``Σ loss_weights · loss / Σ num_tokens`` over the positions with a weight. A kind says
    what the loss of a row is; one that needs more than labels and weights adds fields to Targets."""

    def reduce(self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext) -> torch.Tensor:
        """Scalar loss of one micro-batch, fp32, differentiable: the sum of :meth:`per_token` over ``Σ num_tokens``."""
        loss, _ = self._weighted(output, targets, context)
        return loss / targets.num_tokens.sum().clamp(min=1)  # a micro-batch may be without any token in the loss

    def per_token(self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext) -> torch.Tensor:
        """What each position adds to the loss of its sample, in nats, fp32 [batch, width]; 0 where there is no loss."""
        _, own = self._weighted(output, targets, context)
        weights = targets.loss_weights.reshape(-1)
        losses = weights.new_zeros(weights.shape)
        losses[targets.positions] = own * weights[targets.positions]
        return losses.view(targets.loss_weights.shape)

    def _weighted(
        self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum, and the unweighted losses [n] of the positions in the loss."""
        rows = output.hidden.reshape(-1, output.hidden.shape[-1])
        if targets.positions.numel() < rows.shape[0]:
            rows = rows.index_select(0, targets.positions)
        # The rows are the same on every tensor-parallel rank; the head sums the gradients.
        return self.head_loss(HeadOutput(rows, output.matrix), targets.flat(), context)

    @abstractmethod
    def head_loss(
        self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of rows, in chunks: see :func:`megatron.parallel.cross_entropy.linear_loss`.

        Args:
            output: hidden is [n, hidden], the positions in the loss.
            targets: theirs, [n].
            context: this process.
        """


@dataclass(frozen=True)
class WeightedCrossEntropy(LossKind):
    """``Σ loss_weights · ce / Σ num_tokens``."""

    def head_loss(
        self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`LossKind`."""
        from megatron.parallel.cross_entropy import linear_cross_entropy

        return linear_cross_entropy(output.hidden, output.matrix, targets.labels, targets.loss_weights, context)
