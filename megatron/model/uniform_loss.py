"""The loss of uniform-state diffusion, a file of its own because only its runs need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.model.loss import HeadOutput, WeightedLoss

if TYPE_CHECKING:
    import torch

    from megatron.model.batch import Targets
    from megatron.parallel.context import ParallelContext


@dataclass(frozen=True)
class UniformBound(WeightedLoss):
    """``Σ loss_weights · Σ_j D(r_j ‖ rθ_j)/k / Σ num_tokens``, see :mod:`megatron.parallel.uniform_bound`.

    Attributes:
        vocab_size: tokens V that noise draws from; the softmax runs over them and over no other row.
    """

    vocab_size: int

    def head_loss(
        self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`WeightedLoss`."""
        from megatron.parallel.uniform_bound import linear_uniform_bound

        assert targets.noised is not None and targets.odds is not None
        states = (targets.labels, targets.noised, targets.odds)
        return linear_uniform_bound(output, states, targets.loss_weights, context, vocab_size=self.vocab_size)
