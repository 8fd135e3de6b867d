"""Masked diffusion over spans: neighbouring tokens are masked together. The worked example of docs/objectives.md."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from megatron import randomness as noise
from megatron.config.option import TOKENS, option
from megatron.errors import require
from megatron.objectives.base import Setting
from megatron.objectives.mdm import MaskedDiffusion, TimeOptions
from megatron.objectives.schedules import bound_weight, mask_probability


@dataclass(frozen=True)
class SpanOptions(TimeOptions):
    """Flags of masked diffusion over spans."""

    span_length: int = option(3, "tokens that are masked together", unit="TOKENS", range=TOKENS)


@dataclass(frozen=True)
class SpanMaskedDiffusion(MaskedDiffusion):
    """Reconstruct masked spans: ``loss = Σ_masked (ce / p) / (batch · seq)``, one coin per span instead of per token.

    Spans begin at a random offset of each sample. For one offset this is masked diffusion whose symbols are spans, each with
    the product of its tokens' predictions as probability, so the loss bounds the negative log-likelihood of the model that
    fills whole spans in a random order; over all offsets it bounds that of their mixture (Jensen). The label is that of a
    bound. It is no bound for the model that fills one token at a time, which is what :meth:`for_eval` (plain masked
    diffusion) and decoding use. Spans of one token are :class:`MaskedDiffusion`, draw for draw.

    Attributes:
        span_length: tokens that are masked together; the first and the last span of a sample may be shorter.
    """

    span_length: int = 3

    Options: ClassVar[type] = SpanOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> SpanMaskedDiffusion:
        """See :class:`Objective`."""
        assert isinstance(options, SpanOptions)
        require(
            options.span_length <= setting.seq_length,
            f"--span-length {options.span_length} with --seq-length {setting.seq_length}",
            "a span lies within a sample",
            f"pass at most {setting.seq_length}",
        )
        return replace(cls.plain(options, setting), span_length=options.span_length)

    def masks_and_weights(self, sample_ids: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Whole spans masked with the probability of the schedule, see :meth:`MaskedDiffusion.masks_and_weights`."""
        t = self.times(sample_ids)[:, None]
        coins = np.stack([self._coins(sample, seq_length) for sample in sample_ids.tolist()])
        is_masked = coins < mask_probability(self.schedule, t)
        return is_masked, is_masked * bound_weight(self.schedule, t).astype(np.float32)

    def _coins(self, sample_id: int, seq_length: int) -> np.ndarray:
        """A number in [0, 1) for each token of a sample, the same within a span, fp32 [seq]."""
        random = noise.generator(self.seed, noise.Purpose.NOISE, sample_id)
        coins = random.random(seq_length, dtype=np.float32)
        offset = int(random.integers(self.span_length))
        return coins[(np.arange(seq_length) + offset) // self.span_length]
