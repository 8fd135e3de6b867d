"""Small configurations, models and batches for the tests of objectives."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import torch
import torch.nn.functional as F

from megatron.config import Config, parse
from megatron.config.schema import ModelConfig
from megatron.config.validate import fill_model
from megatron.model import AttentionMask, GPTModel
from megatron.objectives import Objective, build_objective

MASK_ID = 50
SEQ = 32


def make_config(*flags: str, objective: str = "mdm", batch: int = 8, seed: int = 1234) -> Config:
    """A configuration as the command line makes it, for sequences of :data:`SEQ` tokens and ids below 50."""
    return parse(
        ["--model", "7M", "--seq-length", str(SEQ), "--train-iters", "10", "--micro-batch-size", "1",
         "--global-batch-size", str(batch), "--seed", str(seed), "--mask-token-id", str(MASK_ID), *flags],
        objective=objective,
    )  # fmt: skip


def make_objective(*flags: str, **options) -> Objective:
    return build_objective(make_config(*flags, **options))


def make_tokens(count: int, seq: int = SEQ, seed: int = 0, vocab: int = 50) -> torch.Tensor:
    """[count, seq + 1] int64."""
    return torch.randint(vocab, (count, seq + 1), generator=torch.Generator().manual_seed(seed))


def tiny_model(mask: AttentionMask, *, vocab: int, seq: int, seed: int = 3) -> GPTModel:
    """A model in evaluation mode with weights so large that its predictions are far from uniform."""
    config = fill_model(
        ModelConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            ffn_hidden_size=24,
            seq_length=seq,
            padded_vocab_size=vocab,
            init_method_std=0.35,
        )
    )
    return GPTModel(config, mask=mask, seed=seed).eval()


def assert_same_batch(first, second) -> None:
    """Equal in every tensor."""
    for name in ("input_ids", "labels", "loss_weights", "loss_positions", "normalizer", "sample_ids", "position_ids"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


def within_standard_errors(samples: np.ndarray, expected: float, count: float = 3.0) -> bool:
    """Whether the mean of independent samples is within ``count`` standard errors of ``expected``."""
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    return abs(samples.mean() - expected) <= count * error + 1e-9


def all_masks(length: int) -> torch.Tensor:
    """Every subset of the positions, bool [2^length, length]."""
    return torch.tensor(list(product([False, True], repeat=length)))


@torch.no_grad()
def losses_under_all_masks(model: GPTModel, tokens: torch.Tensor, mask_id: int) -> np.ndarray:
    """Sum of the cross-entropy of the masked tokens under each of :func:`all_masks`, fp64 [2^length]."""
    masks = all_masks(len(tokens))
    labels = tokens.expand(masks.shape)
    logits = model.logits(labels.masked_fill(masks, mask_id))
    ce = F.cross_entropy(logits.double().transpose(1, 2), labels, reduction="none")
    return (ce * masks).sum(-1).numpy()


def exact_bound(model: GPTModel, tokens: torch.Tensor, mask_id: int) -> float:
    """The bound by enumeration: over all masks, with the weight of m masked tokens of L integrated over t.

    Σ_masks [∫ p^m (1 − p)^(L−m) / p dt] · Σ_masked ce / L with p = (1 − 1e-3)·t + 1e-3.
    """
    length = len(tokens)
    nodes, quadrature = np.polynomial.legendre.leggauss(20)  # exact for these polynomials of degree below 40
    p = (1 - 1e-3) * (nodes + 1) / 2 + 1e-3
    weight = [0.0] + [
        float((quadrature / 2 * p ** (m - 1) * (1 - p) ** (length - m)).sum()) for m in range(1, length + 1)
    ]
    counts = all_masks(length).sum(-1).tolist()
    return sum(weight[m] * loss for m, loss in zip(counts, losses_under_all_masks(model, tokens, mask_id))) / length


@torch.no_grad()
def any_order_log_likelihoods(model: GPTModel, tokens: torch.Tensor, mask_id: int) -> list[float]:
    """log-likelihood of ``tokens`` in every order of unmasking, by the chain rule."""
    found = []
    for order in permutations(range(len(tokens))):
        current, total = torch.full_like(tokens, mask_id), 0.0
        for position in order:
            log_probabilities = model.logits(current[None])[0, position].log_softmax(-1)
            total += log_probabilities[tokens[position]].item()
            current[position] = tokens[position]
        found.append(total)
    return found
