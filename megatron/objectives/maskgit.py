"""Masked diffusion with the weighting and the schedule of MaskGIT (Chang et al., arXiv 2202.04200)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.objectives.mdm import MaskedDiffusion, ScheduleOptions


@dataclass(frozen=True)
class MaskGIT(MaskedDiffusion):
    """``mdm --loss-weighting flat --noise-schedule cosine`` by another name: ``loss = Σ_masked ce / (E[p] · batch · seq)``.

    Heavily masked sequences count more than in the bound, so the value is not a likelihood bound. Evaluation is that of
    :class:`MaskedDiffusion`: the network is the same, so its bound is defined and comparable.
    """

    weighting: str = "flat"
    default_schedule: ClassVar[str] = "cosine"

    Options: ClassVar[type] = ScheduleOptions
