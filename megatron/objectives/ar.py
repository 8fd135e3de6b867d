"""Autoregressive language modelling: the exact likelihood, left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron.model.batch import Inputs, ModelBatch, Samples, build_batch
from megatron.model.loss import LossKind, WeightedCrossEntropy
from megatron.model.mask import AttentionMask, Causal
from megatron.objectives.base import EXACT, CausalDecoding, Decoding, NoOptions, Setting, first_tokens


@dataclass(frozen=True)
class Autoregressive:
    """Predict token i + 1 from tokens 0 … i: ``loss = Σ ce / (batch · seq)``."""

    attention_mask: AttentionMask = Causal()
    loss: LossKind = WeightedCrossEntropy()
    decoding: Decoding = CausalDecoding()
    label: str = EXACT
    loss_fraction: float = 1.0
    num_views: int = 1
    beside: ClassVar[None] = None
    needs_mask_token: ClassVar[bool] = False
    Options: ClassVar[type] = NoOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> Autoregressive:
        """There is nothing to choose."""
        return cls()

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Inputs are the first seq tokens, labels the last seq; see :class:`Objective`."""
        return next_token_batch(samples, samples.tokens[:, :-1])

    def token_weights(self, sample_ids: np.ndarray, seq_length: int) -> np.ndarray:
        """All count once."""
        return np.ones((len(sample_ids), seq_length))

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """The same: there is no noise."""
        return self


def next_token_batch(samples: Samples, input_ids: np.ndarray) -> ModelBatch[np.ndarray]:
    """Every token predicts the next one.

    Args:
        samples: gives the labels.
        input_ids: [batch, seq] int64, the first seq tokens, or what stands in for them.
    """
    labels = samples.tokens[:, 1:]
    positions, segments = first_tokens(samples.position_ids), first_tokens(samples.segment_ids)
    return build_batch(
        Inputs(input_ids, positions, samples.ids, segments),
        labels=labels,
        loss_weights=np.ones(labels.shape, dtype=np.float32),
        has_loss=first_tokens(samples.loss_mask),
    )
