"""The seam between data, objective and model.

Every objective is a weighted cross-entropy: ``loss = Σ loss_weights · ce / normalizer``. Only the preparation of a batch
differs, and that runs on the CPU, in the data loader's workers, without collectives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol

import torch

from megatron.config.schema import Config
from megatron.model.head import Targets
from megatron.model.mask import AttentionMask


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


# What a loss may be called. The mean over noise of a bound is an upper bound on the negative log-likelihood.
EXACT = "NLL (exact)"
BOUND = "NLL bound"
NO_BOUND = "not a likelihood bound"


class Objective(Protocol):
    """What is predicted from what.

    Attributes:
        attention_mask: which keys a query sees: all that the model knows of the objective.
        label: what its loss may be called: :data:`EXACT`, :data:`BOUND` or :data:`NO_BOUND`.
        loss_fraction: expected share of tokens in the loss (for FLOP counts).
        needs_mask_token: whether the vocabulary must have room for a mask token.
    """

    needs_mask_token: ClassVar[bool]

    @property
    def attention_mask(self) -> AttentionMask: ...

    @property
    def label(self) -> str: ...

    @property
    def loss_fraction(self) -> float: ...

    @classmethod
    def from_config(cls, config: Config) -> Objective:
        """Build from a resolved configuration."""
        ...

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """Make a batch.

        Args:
            tokens: [batch, seq + 1] int64.
            sample_ids: [batch] int64; all noise is a function of (seed, sample id).
        """
        ...

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Objective:
        """The same objective with evaluation settings: no training-only noise, a fixed seed.

        Args:
            draw: which of the noise draws this is.
            num_draws: how many there are; stratified times spread over them.
        """
        ...


def is_exact(objective: Objective) -> bool:
    """Whether the loss is a likelihood, not a bound on one."""
    return objective.label == EXACT
