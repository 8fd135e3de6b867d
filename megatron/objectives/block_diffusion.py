"""Block diffusion: autoregressive over blocks, masked diffusion within a block (Arriola et al., arXiv 2503.09573)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron import randomness as noise
from megatron.config.schema import Config
from megatron.model.batch import ModelBatch
from megatron.model.mask import AttentionMask, BlockDiffusion
from megatron.objectives.base import BOUND, EXACT
from megatron.objectives.mdm import MaskedDiffusion
from megatron.objectives.schedules import Linear


@dataclass(frozen=True)
class BlockMaskedDiffusion(MaskedDiffusion):
    """Reconstruct the masked tokens of every block from its visible tokens and the clean blocks before it.

    ``loss = Σ_blocks Σ_masked in block (s'(t_b) / p(t_b)) · ce / (batch · seq)`` (equation 8). Each block has its own
    time; the times of a sample are spread evenly, ``t_b = (t + b / blocks) mod 1``, as the paper's code does.

    One pass makes all blocks: the input is [noised; clean], 2 · seq tokens with positions 0 … seq − 1 twice, under the
    mask :class:`megatron.model.mask.BlockDiffusion`; only noised tokens are in the loss, which is still per token of data.

    A block of the whole sequence is :class:`MaskedDiffusion`, draw for draw. With blocks of one token the bound is the
    exact left-to-right likelihood: a token is masked or not in the loss, and its expected weight is 1. Evaluation then
    masks every token, which is exact and has no variance (§4.1 there).

    Attributes:
        block_size: tokens per block; divides the sequence length.
    """

    block_size: int = 1

    @classmethod
    def from_config(cls, config: Config) -> BlockMaskedDiffusion:
        """Build from a resolved configuration."""
        assert config.objective.block_size is not None
        return cls(**cls.noise_options(config), block_size=config.objective.block_size)

    @property
    def attention_mask(self) -> AttentionMask:
        """Over [noised; clean]."""
        return BlockDiffusion(self.block_size)

    @property
    def label(self) -> str:
        """What the loss may be called."""
        return EXACT if self._masks_all else BOUND

    @property
    def loss_fraction(self) -> float:
        """Expected share of masked tokens."""
        return 1.0 if self._masks_all else super().loss_fraction

    @property
    def _masks_all(self) -> bool:
        return self.is_evaluation and self.block_size == 1

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """Noised and clean copy of the first seq tokens, 2 · seq inputs; see :class:`Objective`."""
        clean = tokens[:, :-1].contiguous()
        batch, seq = clean.shape
        is_masked, weights = self.masks_and_weights(sample_ids.numpy(), seq)
        return ModelBatch.build(
            input_ids=torch.cat((clean.masked_fill(is_masked, self.mask_token_id), clean), dim=1),
            labels=torch.cat((clean, clean), dim=1),
            loss_weights=torch.cat((weights, torch.zeros_like(weights)), dim=1),
            sample_ids=sample_ids,
            position_ids=torch.arange(seq).repeat(2).expand(batch, 2 * seq).contiguous(),
            num_tokens=clean.numel(),
        )

    def masks_and_weights(self, sample_ids: np.ndarray, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`MaskedDiffusion.masks_and_weights`."""
        if self._masks_all:
            shape = (len(sample_ids), seq_length)
            return torch.ones(shape, dtype=torch.bool), torch.ones(shape)
        return super().masks_and_weights(sample_ids, seq_length)

    def token_times(self, sample_ids: np.ndarray, seq_length: int) -> np.ndarray:
        """One time per block, fp64 [batch, seq]."""
        num_blocks = seq_length // self.block_size
        per_block = (self.times(sample_ids)[:, None] + np.arange(num_blocks) / num_blocks) % 1.0
        return per_block.repeat(self.block_size, axis=1)

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> BlockMaskedDiffusion:
        """The same blocks under the linear schedule, with the seed of evaluation."""
        return replace(
            self, seed=noise.EVAL_SEED, schedule=Linear(), is_evaluation=True, draw=draw, num_draws=num_draws
        )
