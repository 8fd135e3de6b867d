"""Autoregressive modelling over several token orders (the order ablation of arXiv 2507.15857)."""

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
class PermutedAR:
    """Predict the next token of a randomly chosen order; tokens keep their own RoPE positions.

    Order 0 is left to right. Order i sorts ``position + i · N(0, 1)`` when ``predefined``, else it is a uniformly random
    permutation. Position 0 stays first in every order. Each sample draws one of the orders uniformly.
    The loss is a likelihood in the drawn order; averaged over orders it bounds that of their mixture.

    Attributes:
        num_orders: orders, the first left to right.
        predefined: whether order i is a noisy left-to-right order.
        seed: seed of the orders and of the choice.
    """

    num_orders: int
    predefined: bool
    seed: int
    attention_mask: AttentionMask = Causal()
    label: str = BOUND
    loss_fraction: float = 1.0
    needs_mask_token: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Config) -> PermutedAR:
        """Build from a resolved configuration."""
        options = config.objective
        assert options.num_order_list is not None
        return cls(num_orders=options.num_order_list, predefined=options.use_predefined_order, seed=config.run.seed)

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """Permute the seq + 1 tokens of each sample together with their positions; see :class:`Objective`."""
        length = tokens.shape[1]
        chosen = [int(noise.generator(self.seed, i).integers(self.num_orders)) for i in sample_ids.tolist()]
        orders = torch.from_numpy(np.stack([self.order(index, length) for index in chosen]))
        permuted = tokens.gather(1, orders)
        return ModelBatch.build(
            input_ids=permuted[:, :-1].contiguous(),
            labels=permuted[:, 1:].contiguous(),
            loss_weights=torch.ones(tokens.shape[0], length - 1, dtype=torch.float32),
            sample_ids=sample_ids,
            position_ids=orders[:, :-1].contiguous(),
        )

    def order(self, index: int, length: int) -> np.ndarray:
        """Order ``index``: positions in the order in which they are predicted, int64 [length]; entry 0 is 0."""
        positions = np.arange(length)
        if index == 0:
            return positions
        random = noise.generator(self.seed, index, noise.STREAM_ORDER)
        if self.predefined:
            rest = 1 + np.argsort(positions[1:] + index * random.standard_normal(length - 1), kind="stable")
        else:
            rest = 1 + random.permutation(length - 1)
        return np.concatenate((positions[:1], rest))

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """Left to right, so that results compare with plain AR."""
        return Autoregressive()
