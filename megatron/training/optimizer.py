"""AdamW over two groups of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron.config.schema import OptimizerConfig


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

    Matrices are decayed, the embedding among them; one-dimensional tensors (norms, biases) are not.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if config.optimizer == "fusedadam":
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

        return FusedAdam(groups, adam_w_mode=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)
