"""Dual modelling: autoregressive and masked diffusion in one model, by sample, on shifted labels (arXiv 2512.14549)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from megatron.config.option import PROBABILITY, option
from megatron.errors import require
from megatron.model.batch import ModelBatch, Samples, build_batch
from megatron.model.mask import AttentionMask, Causal, Full, PerSample
from megatron.objectives.ar import Autoregressive
from megatron.objectives.base import EXACT, Decoding, Objective, Setting, first_tokens
from megatron.objectives.mdm import MaskedDiffusion, ScheduleOptions


@dataclass(frozen=True)
class DualOptions(ScheduleOptions):
    """Flags of dual language modelling."""

    # fmt: off
    dual_ar_share: float = option(0.5, "share of the samples that are trained as AR, the others as masked diffusion",
        unit="SHARE", range=PROBABILITY)
    dual_decoding: str | None = option(None, "as what validation judges the run, and programs take it; it is validated as the "
        "other, too; default: ar (mdm at --dual-ar-share 0)", choices=("ar", "mdm"), needs=("dual_ar_share!=0.0",))
    # fmt: on


@dataclass(frozen=True)
class Dual(MaskedDiffusion):
    """``α · AR + (1 − α) · MDM``, both predicting token i + 1 at position i: a sample is either seen whole, under causal
    attention, or masked, under full attention.

    One stratified number u of every sample decides both: below α the sample is AR, and above it t = (u − α) / (1 − α) is
    uniform again. So the samples of a step are α·B of AR, up to one, and times that are stratified as if they were all; at
    α = 0 this is shifted masked diffusion and at α = 1 AR, batch for batch. Both losses are of the last seq tokens of a
    sample given its first one, and their mean bounds −log of the mixture of the two models (Jensen).

    Attributes:
        ar_share: α.
        judged_as: "ar" or "mdm": the form of evaluation and decoding, where both are trained.
    """

    shifted: bool = True
    ar_share: float = 0.5
    judged_as: str = "ar"

    Options: ClassVar[type] = DualOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> Dual:
        """See :class:`Objective`."""
        assert isinstance(options, DualOptions)
        require(options.dual_ar_share < 1 or options.dual_decoding != "mdm", "--dual-ar-share 1 with --dual-decoding mdm",
                "no sample is masked, so there is no masked diffusion to judge", "drop one of the flags")  # fmt: skip
        judged_as = options.dual_decoding or "ar"
        return replace(cls.plain(options, setting), ar_share=options.dual_ar_share, judged_as=judged_as)

    @property
    def attention_mask(self) -> AttentionMask:
        """Causal or full, by sample."""
        if self.is_mixed:
            return PerSample(self.ar_share)
        return Causal() if self.ar_share == 1 else Full()

    @property
    def is_mixed(self) -> bool:
        """Whether samples of both kinds are trained."""
        return 0 < self.ar_share < 1

    @property
    def label(self) -> str:
        """What the loss may be called."""
        return EXACT if self.ar_share == 1 else super().label

    @property
    def loss_fraction(self) -> float:
        """All tokens of AR, those that are masked of the others."""
        return self.ar_share + (1 - self.ar_share) * super().loss_fraction

    @property
    def decoding(self) -> Decoding:
        """That of the form in which it is judged."""
        return self.for_eval().decoding

    @property
    def beside(self) -> Objective | None:
        """The other form, where both are trained."""
        return self._form(is_causal=not self._is_causal, draw=0, num_draws=1) if self.is_mixed else None

    @property
    def _is_causal(self) -> bool:
        return self.judged_as == "ar" if self.is_mixed else self.ar_share == 1

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Objective:  # type: ignore[override]
        """AR, or shifted masked diffusion."""
        return self._form(is_causal=self._is_causal, draw=draw, num_draws=num_draws)

    def _form(self, *, is_causal: bool, draw: int, num_draws: int) -> Objective:
        return Autoregressive() if is_causal else super().for_eval(draw, num_draws)

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Samples of AR as they are, the others masked; see :class:`Objective`."""
        masked = super().prepare(samples)
        if self.ar_share == 0:
            return masked
        is_causal = super().times(samples.ids) < self.ar_share
        inputs = masked.inputs._replace(
            input_ids=np.where(is_causal[:, None], samples.tokens[:, :-1], masked.inputs.input_ids),
            is_causal=is_causal.astype(np.int64) if self.is_mixed else None,
        )
        return build_batch(
            inputs,
            labels=masked.targets.labels,
            loss_weights=np.where(is_causal[:, None], np.float32(1), masked.targets.loss_weights),
            has_loss=first_tokens(samples.loss_mask),
        )

    def times(self, sample_ids: np.ndarray) -> np.ndarray:
        """Times of masked samples, fp64 [batch]; of those of AR, which have none, 0."""
        rest = super().times(sample_ids) - self.ar_share
        return np.maximum(rest, 0) / max(1 - self.ar_share, np.finfo(np.float64).tiny)
