"""What samplers and scorers ask of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import nn

from megatron.model.attention import LayerCache
from megatron.model.batch import Inputs
from megatron.model.mask import AttentionMask


class LogitsFn(Protocol):
    """The model, as far as this package knows it."""

    def __call__(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of ``input_ids`` [batch, seq] int64: [batch, seq, vocab], or [selected, vocab] (row-major order) with
        ``positions`` [batch, seq] bool."""
        ...


class Predictor(Protocol):
    """One model or the mean of several, as far as caches know it; methods are those of :class:`megatron.model.gpt.GPTModel`."""

    @property
    def layers(self) -> Iterable[nn.Module]:
        """Blocks, of which each has a cache."""
        ...

    def logits(
        self,
        inputs: Inputs[torch.Tensor],
        mask: AttentionMask,
        *,
        positions: torch.Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Logits over the padded vocabulary."""
        ...

    def hidden_states(
        self, inputs: Inputs[torch.Tensor], mask: AttentionMask, caches: Sequence[LayerCache] | None = None
    ) -> torch.Tensor:
        """What the last blocks give; the caches then hold the inputs too."""
        ...
