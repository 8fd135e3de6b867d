"""The optimizer over groups of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron.config.schema import OptimizerConfig
from megatron.training.muon import MuonAdamW, is_hidden_matrix

# What an optimizer keeps for every weight: kinds of a checkpoint, and of its own state.
ADAM, MUON = ("exp_avg", "exp_avg_sq"), ("momentum",)
MOMENTS = (*ADAM, *MUON)


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), or Muon for the matrices of the blocks and
    AdamW for the rest.

    Matrices are decayed, the embedding among them; one-dimensional tensors (norms, biases) are not. Each group says under
    ``moments`` what is kept for every weight of it.
    """
    parameters, is_muon = list(parameters), config.optimizer == "muon"
    hidden = {p for p in parameters if is_muon and is_hidden_matrix(p)}
    decayed = [p for p in parameters if p.dim() > 1 and p not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p in hidden], "weight_decay": config.weight_decay, "moments": MUON},
        {"params": decayed, "weight_decay": config.weight_decay, "moments": ADAM},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "moments": ADAM},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if config.optimizer == "fusedadam":
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

        return FusedAdam(groups, adam_w_mode=True, **options)
    if is_muon:
        return MuonAdamW(groups, config, fused=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)
