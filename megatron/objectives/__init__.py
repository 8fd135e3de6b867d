"""Training objectives. A new one is one file here, one line in :data:`OBJECTIVES` and one test file."""

from __future__ import annotations

from collections.abc import Callable

from megatron.config.schema import Config
from megatron.objectives.ar import Autoregressive
from megatron.objectives.base import ModelBatch, Objective
from megatron.objectives.masked_attention_ar import MaskedAttentionAR
from megatron.objectives.mdm import MaskedDiffusion
from megatron.objectives.permuted_ar import PermutedAR

__all__ = ["OBJECTIVES", "ModelBatch", "Objective", "build_objective", "objective_name"]

OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "ar": Autoregressive.from_config,
    "mdm": MaskedDiffusion.from_config,
    "permuted_ar": PermutedAR.from_config,
    "masked_attention_ar": MaskedAttentionAR.from_config,
}


def objective_name(config: Config, default: str) -> str:
    """The objective that the flags ask for.

    The launch scripts of arXiv 2507.15857 choose the AR variants by their own flags: ``--num-order-list`` or
    ``--use-order-list`` mean permuted orders, ``--randmask-ratio`` means random attention masking.
    """
    objective = config.objective
    if objective.objective is not None:
        return objective.objective
    if default == "ar" and (objective.num_order_list is not None or objective.use_order_list):
        return "permuted_ar"
    if default == "ar" and objective.randmask_ratio > 0:
        return "masked_attention_ar"
    return default


def build_objective(config: Config) -> Objective:
    """The objective of a resolved configuration."""
    name = config.objective.objective
    if name not in OBJECTIVES:
        raise ValueError(
            f"--objective {name!r} is not known; an objective is one of {', '.join(sorted(OBJECTIVES))}; "
            "correct the name or add it to megatron/objectives"
        )
    return OBJECTIVES[name](config)
