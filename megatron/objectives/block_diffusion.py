"""Block diffusion: autoregressive over blocks, masked diffusion within a block (Arriola et al., arXiv 2503.09573)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from megatron import randomness as noise
from megatron.config.option import TOKENS, Range, option
from megatron.errors import require
from megatron.model.batch import Inputs, ModelBatch, Samples, build_batch
from megatron.model.mask import AttentionMask, BlockDiffusion
from megatron.objectives.base import BOUND, EXACT, NO_BOUND, BlockDecoding, Decoding, Setting, first_tokens
from megatron.objectives.mdm import MaskedDiffusion, ScheduleOptions
from megatron.objectives.schedules import Linear


@dataclass(frozen=True)
class BlockOptions(ScheduleOptions):
    """Flags of block diffusion."""

    # fmt: off
    block_size: int | None = option(None, "tokens per block", unit="TOKENS", range=TOKENS)
    block_ar_weight: float = option(0.0, "weight of an added loss: the next token of every clean token, which then sees "
        "nothing behind itself; 0: none", unit="WEIGHT", range=Range(at_least=0, at_most=1000))
    # fmt: on


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

    With ``ar_weight`` W > 0 the clean copy is an autoregressive model beside it: causal, and ``W · Σ ce(x_{i+1} | x_≤i) /
    (batch · seq)`` is added. Evaluation keeps that attention, and its loss is the bound alone; what the added one is
    worth stands behind the sequence with weight 1, where validation reads it.

    Attributes:
        block_size: tokens per block; divides the sequence length.
        ar_weight: W.
    """

    block_size: int = 1
    ar_weight: float = 0.0

    Options: ClassVar[type] = BlockOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> BlockMaskedDiffusion:
        """See :class:`Objective`."""
        assert isinstance(options, BlockOptions)
        size, length = options.block_size, setting.seq_length
        require(
            size is not None and length % size == 0,
            f"--block-size {size} with --seq-length {length}",
            "a block has a size, and a sequence is whole blocks",
            f"pass --block-size N, a divisor of {length}",
        )
        assert size is not None
        return replace(cls.plain(options, setting), block_size=size, ar_weight=options.block_ar_weight)

    @property
    def attention_mask(self) -> AttentionMask:
        """Over [noised; clean]."""
        return BlockDiffusion(self.block_size, causal=self.ar_weight > 0)

    @property
    def decoding(self) -> Decoding:
        """Masked tokens of one block after the other."""
        return BlockDecoding(self.mask_token_id, self.block_size)

    @property
    def label(self) -> str:
        """What the loss may be called; a sum of two is neither."""
        if self.ar_weight > 0 and not self.is_evaluation:
            return NO_BOUND
        return EXACT if self._masks_all else BOUND

    @property
    def loss_fraction(self) -> float:
        """Expected share of masked tokens, and of clean ones that predict the next."""
        return (1.0 if self._masks_all else super().loss_fraction) + (self.ar_weight > 0)

    @property
    def _masks_all(self) -> bool:
        return self.is_evaluation and self.block_size == 1

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Noised and clean copy of the first seq tokens, 2 · seq inputs; see :class:`Objective`.

        Documents of a packed sample do not move its blocks.
        """
        clean = samples.tokens[:, :-1]
        is_masked, weights = self.masks_and_weights(samples.ids, clean.shape[1])
        positions, segments = first_tokens(samples.position_ids), first_tokens(samples.segment_ids)
        if positions is None:
            positions = np.broadcast_to(np.arange(clean.shape[1]), clean.shape)
        inputs = Inputs(
            np.concatenate((np.where(is_masked, self.mask_token_id, clean), clean), axis=1),
            np.tile(positions, 2),
            samples.ids,
            None if segments is None else np.tile(segments, 2),
        )
        has_loss = first_tokens(samples.loss_mask)
        if self.ar_weight == 0:
            return build_batch(inputs, labels=clean, loss_weights=weights, has_loss=has_loss)
        added = np.full_like(weights, 1.0 if self.is_evaluation else self.ar_weight)
        batch = build_batch(
            inputs,
            labels=np.concatenate((clean, samples.tokens[:, 1:]), axis=1),
            loss_weights=np.concatenate((weights, added), axis=1),
            has_loss=None if has_loss is None else np.tile(has_loss, 2),
        )
        return batch._replace(targets=batch.targets._replace(num_tokens=batch.targets.num_tokens / 2))

    def masks_and_weights(self, sample_ids: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`MaskedDiffusion.masks_and_weights`."""
        if self._masks_all:
            shape = (len(sample_ids), seq_length)
            return np.ones(shape, dtype=bool), np.ones(shape, dtype=np.float32)
        return super().masks_and_weights(sample_ids, seq_length)

    def token_times(self, sample_ids: np.ndarray, seq_length: int) -> np.ndarray:
        """One time per block, fp64 [batch, seq]."""
        num_blocks = seq_length // self.block_size
        per_block = (self.times(sample_ids)[:, None] + np.arange(num_blocks) / num_blocks) % 1.0
        return per_block.repeat(self.block_size, axis=1)

    def span(self, seq_length: int) -> int:
        """A block."""
        return self.block_size

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> BlockMaskedDiffusion:
        """The same blocks under the linear schedule, with the seed of evaluation."""
        return replace(
            self, seed=noise.EVAL_SEED, schedule=Linear(), is_evaluation=True, draw=draw, num_draws=num_draws
        )
