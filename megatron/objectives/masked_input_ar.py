"""Autoregressive modelling with masked input tokens (an ablation of arXiv 2507.15857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron import randomness as noise
from megatron.config.option import PROBABILITY, option
from megatron.errors import require
from megatron.model.batch import ModelBatch, Samples
from megatron.objectives.ar import Autoregressive, next_token_batch
from megatron.objectives.base import BOUND, Setting


@dataclass(frozen=True)
class MaskedInputOptions:
    """Flags of AR with masked inputs."""

    input_mask_ratio: float = option(
        0.0,
        "each sequence masks a share of its inputs drawn from U(0, this)",
        unit="RATIO",
        range=PROBABILITY,
        chooses=True,
    )


@dataclass(frozen=True, kw_only=True)
class MaskedInputAR(Autoregressive):
    """Next-token prediction from a corrupted past: each input token is replaced by the mask token with the probability
    of its sequence, r ~ U(0, ``max_ratio``). Labels are the true tokens and all are in the loss.

    Under given noise the loss is a likelihood; averaged over the noise it bounds that of the mixture.

    Attributes:
        mask_token_id: id that replaces an input token.
        max_ratio: largest share of masked inputs.
        seed: seed of the noise.
    """

    mask_token_id: int
    max_ratio: float
    seed: int
    label: str = BOUND
    needs_mask_token: ClassVar[bool] = True

    Options: ClassVar[type] = MaskedInputOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> MaskedInputAR:
        """See :class:`Objective`."""
        assert isinstance(options, MaskedInputOptions) and setting.mask_token_id is not None
        require(
            options.input_mask_ratio > 0,
            "--objective masked_input_ar without --input-mask-ratio",
            "it would be plain AR",
            "pass --input-mask-ratio above 0, or --objective ar",
        )
        return cls(mask_token_id=setting.mask_token_id, max_ratio=options.input_mask_ratio, seed=setting.seed)

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Inputs are the first seq tokens with some masked, labels the last seq; see :class:`Objective`."""
        true_ids = samples.tokens[:, :-1]
        is_masked = np.stack([self._mask(sample, true_ids.shape[1]) for sample in samples.ids.tolist()])
        return next_token_batch(samples, np.where(is_masked, self.mask_token_id, true_ids))

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """Plain AR: nothing is masked."""
        return Autoregressive()

    def _mask(self, sample_id: int, seq_length: int) -> np.ndarray:
        """Which inputs of one sample are masked, bool [seq]."""
        random = noise.generator(self.seed, noise.Purpose.NOISE, sample_id)
        ratio = self.max_ratio * random.random()
        return random.random(seq_length, dtype=np.float32) < ratio
