"""Autoregressive language modelling: the exact likelihood, left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron.config.schema import Config
from megatron.model.batch import ModelBatch
from megatron.model.mask import AttentionMask, Causal
from megatron.objectives.base import EXACT


@dataclass(frozen=True)
class Autoregressive:
    """Predict token i + 1 from tokens 0 … i: ``loss = Σ ce / (batch · seq)``."""

    attention_mask: AttentionMask = Causal()
    label: str = EXACT
    loss_fraction: float = 1.0
    needs_mask_token: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Config) -> Autoregressive:
        """Build from a resolved configuration."""
        return cls()

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """Inputs are the first seq tokens, labels the last seq; see :class:`Objective`."""
        labels = tokens[:, 1:].contiguous()
        weights = torch.ones(labels.shape, dtype=torch.float32)
        return ModelBatch.build(
            input_ids=tokens[:, :-1].contiguous(), labels=labels, loss_weights=weights, sample_ids=sample_ids
        )

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """The same: there is no noise."""
        return self
