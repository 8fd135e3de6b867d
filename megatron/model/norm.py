"""Normalisation layers. Their weights are whole on every tensor-parallel rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config.shape import Shape
from megatron.parallel.sharding import ShardSpec
from megatron.parallel.tensor import ParameterFactory


class RMSNorm(nn.Module):
    """``x / √(mean(x²) + ε) · weight`` over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, factory: ParameterFactory, *, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = factory.constant("weight", ShardSpec((size,)), 1.0)
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """``(x − mean) / √(var + ε) · weight + bias`` over the last axis."""

    def __init__(self, factory: ParameterFactory, *, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = factory.constant("weight", ShardSpec((size,)), 1.0)
        self.bias = factory.constant("bias", ShardSpec((size,)), 0.0)
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


def norm_kind(shape: Shape) -> type[RMSNorm] | type[LayerNorm]:
    """The configured kind of normalisation."""
    return RMSNorm if shape.normalization == "rmsnorm" else LayerNorm


def build_norm(shape: Shape, factory: ParameterFactory) -> nn.Module:
    """The configured normalisation layer."""
    return norm_kind(shape)(factory, size=shape.hidden_size, epsilon=shape.layernorm_epsilon)
