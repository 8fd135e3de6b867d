"""Autoregressive modelling over several token orders (the order ablation of arXiv 2507.15857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron import randomness as noise
from megatron.config.option import Range, option
from megatron.errors import require
from megatron.model.batch import ModelBatch, Samples
from megatron.objectives.ar import Autoregressive, next_token_batch
from megatron.objectives.base import BOUND, Setting


@dataclass(frozen=True)
class PermutedOptions:
    """Flags of AR over permuted orders."""

    num_order_list: int | None = option(
        None,
        "number of token orders, the first left-to-right; 0: off",
        unit="ORDERS",
        range=Range(0, at_most=10**6),
        chooses=True,
    )
    use_order_list: bool = option(False, "AR over permuted orders; needs --num-order-list", chooses=True)
    use_predefined_order: bool = option(
        False, "order i sorts position + i*N(0,1) instead of a uniform permutation", needs=("num_order_list",)
    )


@dataclass(frozen=True, kw_only=True)
class PermutedAR(Autoregressive):
    """Predict the next token of a randomly chosen order; tokens keep their own RoPE positions.

    Order 0 is left to right. Order i sorts ``position + i · N(0, 1)`` when ``predefined``, else it is a uniformly random
    permutation. Position 0 stays first in every order. Each sample draws one of the orders uniformly. Where attention
    stays within documents, an order runs through one document after the other, the first token of each one first.
    The loss is a likelihood in the drawn order; averaged over orders it bounds that of their mixture.

    Attributes:
        num_orders: orders, the first left to right.
        predefined: whether order i is a noisy left-to-right order.
        seed: seed of the orders and of the choice.
    """

    num_orders: int
    predefined: bool
    seed: int
    label: str = BOUND

    Options: ClassVar[type] = PermutedOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> PermutedAR:
        """See :class:`Objective`."""
        assert isinstance(options, PermutedOptions)
        orders = options.num_order_list or 0
        require(
            orders >= 1,
            f"--num-order-list is {options.num_order_list}",
            "training over permuted orders needs at least one order",
            "pass --num-order-list N",
        )
        return cls(num_orders=orders, predefined=options.use_predefined_order, seed=setting.seed)

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Permute the seq + 1 tokens of each sample together with their positions; see :class:`Objective`."""
        batch, length = samples.tokens.shape
        chosen = [self._choice(sample) for sample in samples.ids.tolist()]
        orders = np.stack([self.order(index, length) for index in chosen])
        if samples.segment_ids is not None:
            orders = document_by_document(orders, samples.segment_ids)
        positions = samples.position_ids
        if positions is None:
            positions = np.broadcast_to(np.arange(length), (batch, length))
        moved = [None if array is None else np.take_along_axis(array, orders, axis=1)
                 for array in (samples.tokens, samples.loss_mask, samples.segment_ids, positions)]  # fmt: skip
        tokens, loss_mask, segment_ids, position_ids = moved
        assert tokens is not None
        permuted = Samples(tokens, samples.ids, loss_mask, segment_ids, position_ids)
        return next_token_batch(permuted, tokens[:, :-1])

    def _choice(self, sample_id: int) -> int:
        return int(noise.generator(self.seed, noise.Purpose.NOISE, sample_id).integers(self.num_orders))

    def order(self, index: int, length: int) -> np.ndarray:
        """Order ``index``: positions in the order in which they are predicted, int64 [length]; entry 0 is 0."""
        positions = np.arange(length)
        if index == 0:
            return positions
        random = noise.generator(self.seed, noise.Purpose.ORDER, index)
        if self.predefined:
            rest = 1 + np.argsort(positions[1:] + index * random.standard_normal(length - 1), kind="stable")
        else:
            rest = 1 + random.permutation(length - 1)
        return np.concatenate((positions[:1], rest))

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """Left to right, so that results compare with plain AR."""
        return Autoregressive()


def document_by_document(orders: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Orders that keep each document's tokens together, and its first token first; int64 [batch, seq + 1].

    Args:
        orders: [batch, seq + 1] positions in the order of their prediction.
        segment_ids: [batch, seq + 1] ascending segment of each position.
    """
    is_first = np.diff(segment_ids, axis=1, prepend=-1) != 0
    rank = 2 * segment_ids + ~is_first
    by_rank = np.argsort(np.take_along_axis(rank, orders, axis=1), axis=1, kind="stable")
    return np.take_along_axis(orders, by_rank, axis=1)
