"""Autoregressive modelling with masked-input regularisation (arXiv 2606.06888): plain AR, and AR on masked inputs added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron.config.option import PROBABILITY, Range, option
from megatron.errors import require
from megatron.model.batch import ModelBatch, Samples, second_view
from megatron.objectives.ar import next_token_batch
from megatron.objectives.base import NO_BOUND, Setting
from megatron.objectives.masked_input_ar import MaskedInputAR


@dataclass(frozen=True)
class MIROptions:
    """Flags of masked-input regularisation."""

    # fmt: off
    mir_weight: float = option(0.4, "weight of the loss on masked inputs, beside 1 of plain AR", unit="WEIGHT",
        range=Range(above=0, at_most=1000))
    mir_mask_ratio: float = option(0.5, "each sequence masks a share of those inputs drawn from U(0, this)", unit="RATIO",
        range=PROBABILITY)
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class MaskedInputRegularizedAR(MaskedInputAR):
    """``loss = (Σ ce(x_{i+1} | x_≤i) + λ · Σ ce(x_{i+1} | masked x_≤i)) / (batch · seq)``.

    Every sample is in its micro-batch twice, as it is and under the mask of :class:`MaskedInputAR`; all labels are in both
    losses. The sum of two is neither likelihood nor bound.

    Attributes:
        weight: λ.
    """

    weight: float
    label: str = NO_BOUND
    loss_fraction: float = 2.0
    num_views: int = 2

    Options: ClassVar[type] = MIROptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> MaskedInputRegularizedAR:
        """See :class:`Objective`."""
        assert isinstance(options, MIROptions) and setting.mask_token_id is not None
        require(
            options.mir_mask_ratio > 0,
            "--mir-mask-ratio 0",
            "without masks both losses are that of AR",
            "pass a ratio above 0, or --objective ar",
        )
        return cls(
            mask_token_id=setting.mask_token_id,
            max_ratio=options.mir_mask_ratio,
            seed=setting.seed,
            weight=options.mir_weight,
        )

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """The samples, then the same with masked inputs; see :class:`Objective`."""
        masked = super().prepare(samples)
        weighted = masked.targets._replace(loss_weights=masked.targets.loss_weights * np.float32(self.weight))
        return second_view(next_token_batch(samples, samples.tokens[:, :-1]), masked._replace(targets=weighted))
