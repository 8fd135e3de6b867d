"""Autoregressive modelling with random attention masking (an ablation of arXiv 2507.15857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron.config.schema import Config
from megatron.model.batch import ModelBatch
from megatron.model.mask import AttentionMask, RandomKeyDrop
from megatron.objectives.ar import Autoregressive
from megatron.objectives.base import BOUND


@dataclass(frozen=True)
class MaskedAttentionAR:
    """Next-token prediction under :class:`megatron.model.mask.RandomKeyDrop`.

    Under given drops the loss is a likelihood; averaged over them it bounds that of the mixture.

    Attributes:
        attention_mask: the random mask; a function of the sample ids that travel with the batch.
    """

    attention_mask: AttentionMask
    label: str = BOUND
    loss_fraction: float = 1.0
    needs_mask_token: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Config) -> MaskedAttentionAR:
        """Build from a resolved configuration."""
        return cls(attention_mask=RandomKeyDrop(ratio=config.objective.randmask_ratio, seed=config.run.seed))

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """As plain AR, with explicit positions so that the sample ids reach every stage."""
        labels = tokens[:, 1:].contiguous()
        return ModelBatch.build(
            input_ids=tokens[:, :-1].contiguous(),
            labels=labels,
            loss_weights=torch.ones(labels.shape, dtype=torch.float32),
            sample_ids=sample_ids,
            position_ids=torch.arange(labels.shape[1]).expand(labels.shape).contiguous(),
        )

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """Plain causal attention."""
        return Autoregressive()
