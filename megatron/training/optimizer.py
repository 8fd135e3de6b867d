"""The optimizer over groups of parameters, and the learning rate as a function of samples."""

from __future__ import annotations

import math
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


def learning_rate(samples: int, config: OptimizerConfig) -> float:
    """Rate after ``samples`` samples: linear warm-up, then decay to ``min_lr``.

    ``s ≤ warmup: lr · s / warmup``; then ``min + (lr − min) · ½(1 + cos(π (s − w) / (n − w)))`` for cosine. Step k uses
    ``s = (k − 1) · global_batch``, so with a warm-up the first step has rate 0, as in Megatron.

    Args:
        samples: training samples consumed before the step.
        config: resolved: ``lr_decay_samples`` and ``lr_warmup_samples`` are set.
    """
    warmup, decay = config.lr_warmup_samples, config.lr_decay_samples
    assert decay is not None
    if warmup > 0 and samples <= warmup:
        return config.lr * samples / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if samples > decay:
        return config.min_lr
    progress = (samples - warmup) / (decay - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_decay_style == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * shape
