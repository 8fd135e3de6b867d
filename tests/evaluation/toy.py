"""Tiny models that can be enumerated, and likelihoods worked out by hand on them."""

from __future__ import annotations

import itertools
import math

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


def masked_logprob(model, context, target, masked, index) -> float:
    """log p(target[index] | everything not in ``masked``), one plain forward pass."""
    row = [*context, *(model.mask_id if i in masked else token for i, token in enumerate(target))]
    logits = model(torch.tensor([row]))[0, len(context) + index]
    return float(torch.log_softmax(logits.double(), -1)[target[index]])


def chain_rule(model, context, target, order) -> float:
    """Log-likelihood of generating ``target`` in ``order``."""
    total, masked = 0.0, set(range(len(target)))
    for index in order:
        total += masked_logprob(model, context, target, masked, index)
        masked.discard(index)
    return total


def all_orders(model, context, target) -> float:
    """Mean of the chain rule over all L! orders: what every bound estimates."""
    orders = list(itertools.permutations(range(len(target))))
    return sum(chain_rule(model, context, target, order) for order in orders) / len(orders)


def bernoulli_truth(model, context, target, floor: float) -> float:
    """The Bernoulli bound with p from [floor, 1], integrated exactly: sum over masks of log p times the integral of
    p^(m-1) (1-p)^(L-m) / (1-floor)."""
    length, total = len(target), 0.0
    for mask in itertools.product([False, True], repeat=length):
        masked = {i for i in range(length) if mask[i]}
        if not masked:
            continue
        m, integral = len(masked), 0.0
        for power in range(length - m + 1):  # (1-p)^(L-m) expanded
            exponent = m + power
            term = math.comb(length - m, power) * (-1) ** power * (1 - floor**exponent) / exponent
            integral += term
        total += integral / (1 - floor) * sum(masked_logprob(model, context, target, masked, i) for i in masked)
    return total
