"""Training objectives. A new one is one file here, one line in :data:`OBJECTIVES` and one test file."""

from __future__ import annotations

from dataclasses import replace

from megatron.config.schema import Config
from megatron.errors import UserError
from megatron.model.batch import ModelBatch
from megatron.objectives.ar import Autoregressive
from megatron.objectives.base import Objective
from megatron.objectives.block_diffusion import BlockMaskedDiffusion
from megatron.objectives.exact_count import ExactCountMDM
from megatron.objectives.masked_attention_ar import MaskedAttentionAR
from megatron.objectives.masked_input_ar import MaskedInputAR
from megatron.objectives.maskgit import MaskGIT
from megatron.objectives.mdm import MaskedDiffusion
from megatron.objectives.permuted_ar import PermutedAR

__all__ = [
    "OBJECTIVES",
    "ModelBatch",
    "Objective",
    "build_objective",
    "evaluation_objective",
    "needs_mask_token",
    "objective_name",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "ar": Autoregressive,
    "mdm": MaskedDiffusion,
    "permuted_ar": PermutedAR,
    "masked_attention_ar": MaskedAttentionAR,
    "masked_input_ar": MaskedInputAR,
    "maskgit": MaskGIT,
    "exact_count_mdm": ExactCountMDM,
    "block_diffusion": BlockMaskedDiffusion,
}


def objective_name(config: Config, default: str) -> str:
    """The objective that the flags ask for.

    The launch scripts of arXiv 2507.15857 choose the AR variants by their own flags: ``--num-order-list`` or
    ``--use-order-list`` mean permuted orders, ``--randmask-ratio`` means random attention masking. In the same way
    ``--input-mask-ratio`` means masked inputs.
    """
    objective = config.objective
    if objective.objective is not None:
        return objective.objective
    if default == "ar" and (objective.num_order_list is not None or objective.use_order_list):
        return "permuted_ar"
    if default == "ar" and objective.randmask_ratio > 0:
        return "masked_attention_ar"
    if default == "ar" and objective.input_mask_ratio > 0:
        return "masked_input_ar"
    return default


def build_objective(config: Config) -> Objective:
    """The objective of a resolved configuration."""
    name = config.objective.objective
    if name not in OBJECTIVES:
        raise UserError(
            f"--objective {name!r} is not known",
            f"an objective is one of {', '.join(sorted(OBJECTIVES))}",
            "correct the name or add it to megatron/objectives",
        )
    return OBJECTIVES[name].from_config(config)


def evaluation_objective(config: Config) -> Objective:
    """The objective of a run with evaluation settings; the batch size, which plays no part, may be unknown."""
    run = replace(config.run, global_batch_size=config.run.global_batch_size or 1)
    return build_objective(replace(config, run=run)).for_eval()


def needs_mask_token(name: str | None) -> bool:
    """Whether the vocabulary must have room for a mask token."""
    return name in OBJECTIVES and OBJECTIVES[name].needs_mask_token
