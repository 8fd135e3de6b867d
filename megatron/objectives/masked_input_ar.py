"""Autoregressive modelling with masked input tokens (an ablation of arXiv 2507.15857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from megatron import randomness as noise
from megatron.config.schema import Config
from megatron.model.batch import ModelBatch
from megatron.model.mask import AttentionMask, Causal
from megatron.objectives.ar import Autoregressive
from megatron.objectives.base import BOUND


@dataclass(frozen=True)
class MaskedInputAR:
    """Next-token prediction from a corrupted past: each input token is replaced by the mask token with the probability
    of its sequence, r ~ U(0, ``max_ratio``). Labels are the true tokens and all are in the loss.

    Under given noise the loss is a likelihood; averaged over the noise it bounds that of the mixture.

    Attributes:
        mask_token_id: id that replaces an input token.
        max_ratio: largest share of masked inputs.
        seed: seed of the noise.
    """

    mask_token_id: int
    max_ratio: float
    seed: int
    attention_mask: AttentionMask = Causal()
    label: str = BOUND
    loss_fraction: float = 1.0
    needs_mask_token: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Config) -> MaskedInputAR:
        """Build from a resolved configuration."""
        options = config.objective
        assert options.mask_token_id is not None
        return cls(mask_token_id=options.mask_token_id, max_ratio=options.input_mask_ratio, seed=config.run.seed)

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """Inputs are the first seq tokens with some masked, labels the last seq; see :class:`Objective`."""
        labels = tokens[:, 1:].contiguous()
        is_masked = torch.from_numpy(np.stack([self._mask(sample, labels.shape[1]) for sample in sample_ids.tolist()]))
        return ModelBatch.build(
            input_ids=tokens[:, :-1].masked_fill(is_masked, self.mask_token_id),
            labels=labels,
            loss_weights=torch.ones(labels.shape, dtype=torch.float32),
            sample_ids=sample_ids,
        )

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """Plain AR: nothing is masked."""
        return Autoregressive()

    def _mask(self, sample_id: int, seq_length: int) -> np.ndarray:
        """Which inputs of one sample are masked, bool [seq]."""
        random = noise.generator(self.seed, sample_id)
        ratio = self.max_ratio * random.random()
        return random.random(seq_length, dtype=np.float32) < ratio
