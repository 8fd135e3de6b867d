"""What samplers and scorers ask of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import nn

from megatron.errors import require
from megatron.model.attention import LayerCache
from megatron.model.batch import Inputs
from megatron.model.mask import AttentionMask


class LogitsFn(Protocol):
    """The model, as far as this package knows it."""

    def __call__(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of ``input_ids`` [batch, seq] int64: [batch, seq, vocab], or [selected, vocab] (row-major order) with
        ``positions`` [batch, seq] bool."""


def at_tokens(logits_fn: LogitsFn, shift: int) -> LogitsFn:
    """A model whose rows of logits are about the token ``shift`` places behind, asked about tokens where they stand.

    Of the first ``shift`` tokens it says nothing: their logits are all alike, and they cannot be among ``positions``.
    """
    if shift == 0:
        return logits_fn

    def logits(input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        if positions is None:
            found = logits_fn(input_ids)
            return torch.cat((torch.zeros_like(found[:, :shift]), found[:, :-shift]), dim=1)
        require(
            not bool(positions[:, :shift].any()),
            "the first token of a text without anything before it",
            "this model predicts a token from the position before it",
            "give at least one token of context",
        )
        return logits_fn(input_ids, positions=positions.roll(-shift, dims=1))

    return logits


class Predictor(Protocol):
    """One model or the mean of several, as far as caches know it; methods are those of :class:`megatron.model.gpt.GPTModel`."""

    @property
    def layers(self) -> Iterable[nn.Module]:
        """Blocks, of which each has a cache."""

    def logits(
        self,
        inputs: Inputs[torch.Tensor],
        mask: AttentionMask,
        *,
        positions: torch.Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Logits over the padded vocabulary."""

    def hidden_states(
        self, inputs: Inputs[torch.Tensor], mask: AttentionMask, caches: Sequence[LayerCache] | None = None
    ) -> torch.Tensor:
        """What the last blocks give; the caches then hold the inputs too."""
