"""Autoregressive modelling with random attention masking (an ablation of arXiv 2507.15857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.option import PROBABILITY, option
from megatron.errors import require
from megatron.model.mask import AttentionMask, RandomKeyDrop
from megatron.objectives.ar import Autoregressive
from megatron.objectives.base import BOUND, Setting


@dataclass(frozen=True)
class MaskedAttentionOptions:
    """Flags of AR with random attention masking."""

    randmask_ratio: float = option(
        0.0, "probability that a query drops earlier keys", unit="P", range=PROBABILITY, chooses=True
    )


@dataclass(frozen=True)
class MaskedAttentionAR(Autoregressive):
    """Next-token prediction under :class:`megatron.model.mask.RandomKeyDrop`.

    Under given drops the loss is a likelihood; averaged over them it bounds that of the mixture.

    Attributes:
        attention_mask: the random mask; a function of the sample ids that travel with the batch.
    """

    attention_mask: AttentionMask
    label: str = BOUND

    Options: ClassVar[type] = MaskedAttentionOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> MaskedAttentionAR:
        """See :class:`Objective`."""
        assert isinstance(options, MaskedAttentionOptions)
        require(
            options.randmask_ratio > 0,
            "--objective masked_attention_ar without --randmask-ratio",
            "it would be plain AR",
            "pass --randmask-ratio above 0, or --objective ar",
        )
        return cls(attention_mask=RandomKeyDrop(ratio=options.randmask_ratio, seed=setting.seed))

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """Plain causal attention."""
        return Autoregressive()
