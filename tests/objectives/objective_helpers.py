"""Small configurations, models and batches for the tests of objectives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron.config import Config
from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.data.loader import as_tensors
from megatron.model.batch import Inputs, ModelBatch, Samples
from megatron.model.gpt import GPTModel
from megatron.model.loss import LossKind, WeightedCrossEntropy
from megatron.model.mask import AttentionMask
from megatron.objectives import Objective, build_objective, parse
from megatron.objectives.schedules import MIN_MASK_PROB
from megatron.parallel.tensor import ParameterFactory
from megatron.testing.oracles import bound_nll, conditionals

MASK_ID = 50
SEQ = 32


def make_config(*flags: str, objective: str = "mdm", batch: int = 8, seed: int = 1234, world_size: int = 1) -> Config:
    """A configuration as the command line makes it, for sequences of :data:`SEQ` tokens and ids below 50."""
    config = parse(
        ["--model", "7M", "--seq-length", str(SEQ), "--train-iters", "10", "--micro-batch-size", "1",
         "--global-batch-size", str(batch), "--seed", str(seed), *flags],
        objective=objective,
        world_size=world_size,
    )  # fmt: skip
    return replace(config, objective=replace(config.objective, mask_token_id=MASK_ID))


def make_objective(*flags: str, **options) -> Objective:
    return build_objective(make_config(*flags, **options))


def make_tokens(count: int, seq: int = SEQ, seed: int = 0, vocab: int = 50) -> torch.Tensor:
    """[count, seq + 1] int64."""
    return torch.randint(vocab, (count, seq + 1), generator=torch.Generator().manual_seed(seed))


def prepare(objective: Objective, tokens: torch.Tensor, ids: torch.Tensor, **packed) -> ModelBatch[torch.Tensor]:
    """The batch of an objective as the loader hands it on; ``packed``: further fields of Samples."""
    return as_tensors(objective.prepare(Samples(tokens.numpy(), ids.numpy(), **packed)))


class UnderMask:
    """A model under one attention mask."""

    def __init__(self, model: GPTModel, mask: AttentionMask, kind: LossKind | None = None) -> None:
        self.model, self.mask, self.kind = model, mask, kind or WeightedCrossEntropy()

    def logits(self, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model.logits(Inputs(ids, **inputs), self.mask)

    def loss(self, batch: ModelBatch[torch.Tensor]) -> torch.Tensor:
        """[]: of the micro-batch."""
        return self.model(batch, self.mask, self.kind)

    def token_losses(self, batch: ModelBatch[torch.Tensor]) -> torch.Tensor:
        """[batch, width]: of each token."""
        return self.model(batch, self.mask, self.kind, per_token=True)

    def sample_losses(self, batch: ModelBatch[torch.Tensor]) -> torch.Tensor:
        """[batch]: mean of each sample."""
        return self.token_losses(batch).sum(-1) / batch.targets.num_tokens


def tiny_model(mask: AttentionMask, *, vocab: int, seq: int, seed: int = 3) -> UnderMask:
    """A model in evaluation mode with weights so large that its predictions are far from uniform."""
    config = Shape.of(
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
    return UnderMask(GPTModel(config, ParameterFactory(seed=seed)).eval(), mask)


def assert_same_batch(first, second) -> None:
    """Equal in every tensor."""
    for part, other in zip(first, second):
        for name, a, b in zip(part._fields, part, other):
            assert (a is None) == (b is None), name
            assert a is None or torch.equal(a, b), name


def within_standard_errors(samples: np.ndarray, expected: float, count: float = 3.0) -> bool:
    """Whether the mean of independent samples is within ``count`` standard errors of ``expected``."""
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    return abs(samples.mean() - expected) <= count * error + 1e-9


def conditionals_of(model: UnderMask, tokens: torch.Tensor, mask_id: int) -> np.ndarray:
    """log p of the masked tokens under every mask: what ``megatron.testing.oracles`` works with."""
    return conditionals(model.logits, tokens.tolist(), mask_id)


def exact_bound(model: UnderMask, tokens: torch.Tensor, mask_id: int) -> float:
    """The bound a token with p = (1 − 1e-3)·t + 1e-3, integrated exactly."""
    return bound_nll(conditionals_of(model, tokens, mask_id), floor=MIN_MASK_PROB) / len(tokens)
