"""Likelihoods by enumeration, from any function that returns logits: for vocabularies and texts of a few tokens.

A text of L tokens has 2^L ways to be masked, and :func:`conditionals` asks the model about each of them once. Everything else is
arithmetic on that table, so no oracle shares code with a scorer, an estimator or a sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import permutations, product

import numpy as np
import torch

LogitsFn = Callable[[torch.Tensor], torch.Tensor]
"""From ids [batch, seq] int64 to logits [batch, seq, vocab]. The softmax runs over all of vocab: what can never be drawn (the
mask, padding rows) is −inf or left out. Row i of a masked model is about token i, of a causal one about token i + 1."""


def all_texts(vocab_size: int, length: int) -> list[tuple[int, ...]]:
    """Every text of ``length`` tokens below ``vocab_size``."""
    return list(product(range(vocab_size), repeat=length))


def all_masks(length: int) -> torch.Tensor:
    """Every set of masked positions, bool [2^length, length]; read as a binary number, a row is its own index."""
    return torch.tensor(list(product([False, True], repeat=length)))


@torch.no_grad()
def conditionals(logits_fn: LogitsFn, text: Sequence[int], mask_id: int, *, context: Sequence[int] = ()) -> np.ndarray:
    """log p of every masked token of ``text`` under each of :func:`all_masks`, given the others and the context before it.

    Returns:
        nats, fp64 [2^length, length]; 0 where a token is not masked.
    """
    masks = all_masks(len(text))
    labels = torch.tensor(list(text)).expand(masks.shape)
    before = torch.tensor(list(context), dtype=torch.long).expand(len(masks), -1)
    logits = logits_fn(torch.cat((before, labels.masked_fill(masks, mask_id)), -1))[:, len(context) :]
    log_p = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return log_p.masked_fill(~masks, 0.0).numpy()


def chain_rule(table: np.ndarray, order: Sequence[int]) -> float:
    """log-likelihood of a text whose tokens are uncovered one by one in ``order``, nats.

    Args:
        table: :func:`conditionals` of the text.
        order: its positions.
    """
    length = table.shape[1]
    masked, total = 2**length - 1, 0.0
    for position in order:
        total += float(table[masked, position])
        masked -= 2 ** (length - 1 - position)
    return total


def by_order(table: np.ndarray) -> np.ndarray:
    """log-likelihoods of a text in all orders, nats, fp64 [length!], in the order of ``itertools.permutations``."""
    return np.array([chain_rule(table, order) for order in permutations(range(table.shape[1]))])


def mixture_nll(table: np.ndarray) -> float:
    """−log of the mean likelihood over all orders, nats: what ancestral sampling in many steps draws from."""
    return -float(np.logaddexp.reduce(by_order(table))) + math.lgamma(table.shape[1] + 1)


def bound_nll(table: np.ndarray, *, floor: float = 0.0) -> float:
    """The bound of masked diffusion, nats, integrated exactly.

    A mask of m of L tokens weighs ∫ p^(m−1) (1 − p)^(L−m) dp over [floor, 1], divided by 1 − floor. Without a floor that is
    1 / (m · C(L, m)), and the bound is the mean of −log p over all orders (Ou et al., arXiv 2406.03736).

    Args:
        table: :func:`conditionals` of the text.
        floor: least probability of a mask; a small one keeps the weights of coins finite.
    """
    length = table.shape[1]
    weights = np.array([0.0, *(_weight(count, length, floor) for count in range(1, length + 1))])
    return -float(weights[all_masks(length).sum(-1).numpy()] @ table.sum(-1))


def _weight(count: int, length: int, floor: float) -> float:
    if floor == 0.0:
        return 1 / (count * math.comb(length, count))
    powers = range(length - count + 1)  # of (1 - p)^(L-m), expanded
    terms = [(-1) ** k * math.comb(length - count, k) * (1 - floor ** (count + k)) / (count + k) for k in powers]
    return math.fsum(terms) / (1 - floor)


@torch.no_grad()
def causal_nll(logits_fn: LogitsFn, texts: Sequence[Sequence[int]], *, context: Sequence[int]) -> np.ndarray:
    """−log p of texts of one length, nats, fp64 [texts]: the chain rule of a causal model, given at least one token before."""
    rows = torch.tensor([[*context, *text] for text in texts])
    log_p = logits_fn(rows[:, :-1]).double().log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    return -log_p[:, len(context) - 1 :].sum(-1).numpy()
