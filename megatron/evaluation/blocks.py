"""Scores of a model of blocks: the bound of every block given the text before it, all blocks in one pass.

``log p(x) = Σ_b log p(x_b | x_<b)``, and each term has the bound of masked diffusion within its block (Arriola et al., arXiv
2503.09573, eq. 8). So a draw masks each block by a draw of its own, and the clean text stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron.evaluation.estimators import Draws, Estimator, LeftToRight, for_length
from megatron.evaluation.scorer import MaskedScorer, Request
from megatron.generation.blocks import block_sizes
from megatron.inference.blocks import BlockLogitsFn
from megatron.inference.model import InferenceModel


def scorer_of(loaded: InferenceModel, logits_fn: BlockLogitsFn | None = None, **options: Any) -> MaskedScorer:
    """The scorer of a loaded model of masked diffusion.

    Args:
        loaded: the model.
        logits_fn: asked instead of it.
        options: of :class:`MaskedScorer`; ``max_length`` is the model's where none is given.
    """
    options = {"mask_id": loaded.mask_id, "max_length": loaded.max_length, "device": loaded.device, **options}
    if loaded.block_size is None:
        return MaskedScorer(logits_fn or loaded.logits, **options)
    return BlockScorer(logits_fn or loaded.logits, block_size=loaded.block_size, **options)


@dataclass(frozen=True)
class ByBlocks:
    """An estimator within each block of a target; one token to a block has one order, and no sampling.

    The draws of two blocks have noise of their own; their times keep their distance from draw to draw, so the strata of
    the first block order the draws of all.

    Attributes:
        within: estimator of a block.
        size: tokens per block.
        start: position at which the target begins.
    """

    within: Estimator
    size: int
    start: int

    @classmethod
    def of(cls, estimator: Estimator, *, size: int, start: int, length: int, num_draws: int) -> ByBlocks:
        """For a target of ``length`` tokens; short blocks enumerate all masks (see :func:`for_length`)."""
        longest = max(block_sizes(start, length, size))
        return cls(LeftToRight() if longest == 1 else for_length(estimator, longest, num_draws=num_draws), size, start)

    @property
    def name(self) -> str:
        """Such as ``exact-count, stratified, blocks of 16``."""
        return f"{self.within.name}, blocks of {self.size}"

    @property
    def kind(self) -> str:
        """``exact`` or ``bound``."""
        return self.within.kind

    @property
    def stratified(self) -> bool:
        """Whether the draws are spread over the times."""
        return getattr(self.within, "stratified", False)

    def max_draws(self, length: int) -> int | None:
        """See :class:`Estimator`."""
        return self.within.max_draws(max(block_sizes(self.start, length, self.size)))

    def draws(self, length: int, *, key: str, start: int, count: int) -> Draws:
        """See :class:`Estimator`; ``passes`` is that of the block with most of them."""
        sizes = block_sizes(self.start, length, self.size)
        parts = [
            self.within.draws(size, key=f"{key}|{block}" if block else key, start=start, count=count)
            for block, size in enumerate(sizes)
        ]
        passes = max(part.masks.shape[1] for part in parts)

        def joined(arrays: list[np.ndarray]) -> np.ndarray:
            filled = [np.pad(array, ((0, 0), (0, passes - array.shape[1]), (0, 0))) for array in arrays]
            return np.concatenate(filled, axis=-1)

        masks, weights = joined([part.masks for part in parts]), joined([part.weights for part in parts])
        return Draws(masks, weights, parts[0].strata)

    def standard_error(self, values: np.ndarray, strata: np.ndarray) -> float:
        """See :class:`Estimator`."""
        return self.within.standard_error(values, strata)


class BlockScorer(MaskedScorer):
    """Runs estimators on a model of blocks.

    Args:
        logits_fn: model of blocks; called without gradients.
        block_size: tokens per block.
        options: of :class:`MaskedScorer`.
    """

    def __init__(self, logits_fn: BlockLogitsFn, *, block_size: int, **options: Any) -> None:
        super().__init__(logits_fn, **options)
        self.block_size, self._block_logits = block_size, logits_fn

    def estimator_for(self, request: Request, estimator: Estimator, *, num_draws: int) -> Estimator:
        """See :class:`MaskedScorer`."""
        where = {"size": self.block_size, "start": len(request.context), "length": len(request.target)}
        return ByBlocks.of(estimator, num_draws=num_draws, **where)

    def masked_logits(self, input_ids: torch.Tensor, clean: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See :class:`MaskedScorer`."""
        return self._block_logits(input_ids, positions=positions, clean=clean)

    def open_positions(self, masked: torch.Tensor) -> torch.Tensor:
        """See :class:`MaskedScorer`: those of the first block that holds one."""
        block = torch.arange(masked.shape[1], device=masked.device) // self.block_size
        return masked & (block == block[masked.int().argmax(-1)][:, None])
