"""Masked diffusion with the uniform weighting of MaskGIT (Chang et al., arXiv 2202.04200)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron.objectives.base import NO_BOUND
from megatron.objectives.mdm import MaskedDiffusion, ScheduleOptions
from megatron.objectives.schedules import mean_mask_probability


@dataclass(frozen=True)
class MaskGIT(MaskedDiffusion):
    """Every masked token weighs the same, whatever the mask ratio: ``loss = Σ_masked ce / (E[p] · batch · seq)``.

    Heavily masked sequences count more than in the bound, so the value is not a likelihood bound. The divisor is the
    expected number of masked tokens, not the drawn one: the loss must not depend on how a step is split into
    micro-batches. The default schedule is the cosine, as in the paper. Evaluation is that of :class:`MaskedDiffusion`:
    the network is the same, so its bound is defined and comparable.
    """

    default_schedule: ClassVar[str] = "cosine"

    Options: ClassVar[type] = ScheduleOptions

    @property
    def label(self) -> str:
        """What the loss may be called."""
        return NO_BOUND

    def masked_weight(self, t: np.ndarray) -> np.ndarray:
        """The same at all times."""
        return np.full_like(t, 1 / mean_mask_probability(self.schedule))
