"""Tiny models that can be enumerated (megatron.testing.oracles does)."""

from __future__ import annotations

import torch
from torch import nn


class ToyMaskedModel(nn.Module):
    """A random bidirectional network over ``vocab`` tokens and a mask token, for rows of one fixed length."""

    def __init__(self, vocab: int = 5, length: int = 6, width: int = 24, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vocab, self.mask_id = vocab, vocab
        self.embedding = torch.randn(length, vocab + 1, width, generator=generator)
        self.mix = torch.randn(length, width, generator=generator)
        self.head = torch.randn(length, width, vocab, generator=generator) * 0.6
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += len(input_ids)
        seq = input_ids.shape[1]
        embedded = self.embedding[torch.arange(seq), input_ids]  # [batch, seq, width]
        state = torch.tanh(embedded.sum(1, keepdim=True) / 2 + self.mix[:seq])
        logits = torch.einsum("bsw,swv->bsv", state, self.head[:seq])
        return logits if positions is None else logits[positions]


class ToyCausalModel(nn.Module):
    """A random causal network: the state is a running mean of embeddings."""

    def __init__(self, vocab: int = 11, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocab, width, generator=generator)
        self.head = torch.randn(width, vocab, generator=generator)

    def forward(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        counts = torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        logits = torch.tanh(self.embedding[input_ids].cumsum(1) / counts) @ self.head
        return logits if positions is None else logits[positions]
