"""Small configurations, models and batches for the tests of objectives."""

from __future__ import annotations

import numpy as np
import torch

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
