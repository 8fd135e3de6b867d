"""What goes into the model: one micro-batch, prepared by an objective."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

# What the last stage needs to know: labels [batch, seq] int64, loss weights [batch, seq] fp32, the positions in the
# loss [n] int64 (indices into batch·seq, made on the CPU so that the device is not asked how many there are), and the
# normalizer [] fp32.
Targets = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ModelBatch:
    """One micro-batch, ready for the model.

    Attributes:
        input_ids: [batch, seq] int64.
        labels: [batch, seq] int64.
        loss_weights: [batch, seq] fp32; 0 means that the position is not in the loss.
        loss_positions: [n] int64, indices into batch·seq of the positions with a weight.
        normalizer: [] fp32, the divisor of the weighted sum.
        sample_ids: [batch] int64, index of each sample in the whole training stream.
        position_ids: [batch, seq] int64, or None for 0 … seq − 1.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_weights: torch.Tensor
    loss_positions: torch.Tensor
    normalizer: torch.Tensor
    sample_ids: torch.Tensor
    position_ids: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        *,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        loss_weights: torch.Tensor,
        sample_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        num_tokens: int | None = None,
    ) -> ModelBatch:
        """Complete a batch: the positions in the loss are counted here, on the CPU.

        The normalizer is the number of tokens of data: batch·seq, or ``num_tokens`` where inputs hold copies of them.
        """
        return cls(
            input_ids=input_ids,
            labels=labels,
            loss_weights=loss_weights,
            loss_positions=loss_weights.reshape(-1).nonzero().squeeze(-1),
            normalizer=torch.tensor(float(labels.numel() if num_tokens is None else num_tokens)),
            sample_ids=sample_ids,
            position_ids=position_ids,
        )

    @property
    def targets(self) -> Targets:
        """What the loss needs, as a tuple of tensors (the form in which DeepSpeed's pipeline takes labels)."""
        return self.labels, self.loss_weights, self.loss_positions, self.normalizer

    @property
    def inputs(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the first stage needs: ids alone, or ids, positions and sample ids."""
        if self.position_ids is None:
            return self.input_ids
        return self.input_ids, self.position_ids, self.sample_ids

    def to(self, device: torch.device) -> ModelBatch:
        """The batch on ``device``; from pinned memory the copies do not block."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **moved)

    def pin_memory(self) -> ModelBatch:
        """Called by the data loader for CUDA devices."""
        pinned = {f.name: v.pin_memory() for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(self, **pinned)
