"""Feed-forward layer: SwiGLU (Shazeer, arXiv 2002.05202) or GELU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config.shape import Shape
from megatron.model.kernels import silu_mul
from megatron.parallel.tensor import ColumnParallelLinear, ParameterFactory, RowParallelLinear


class MLP(nn.Module):
    """``W₂ (silu(gate) · up)`` with the rows of the first matrix [gate; up], or ``W₂ gelu(W₁ x)``."""

    def __init__(self, shape: Shape, factory: ParameterFactory) -> None:
        super().__init__()
        bias, std = not shape.disable_bias_linear, shape.init_method_std
        self.swiglu, self.swiglu_backend = shape.swiglu, shape.swiglu_backend
        self.dense_h_to_4h = ColumnParallelLinear(
            factory.child("dense_h_to_4h"),
            in_size=shape.hidden_size,
            blocks=(shape.ffn_hidden_size,) * (2 if shape.swiglu else 1),
            std=std,
            bias=bias,
        )
        self.dense_4h_to_h = RowParallelLinear(
            factory.child("dense_4h_to_h"),
            in_size=shape.ffn_hidden_size,
            out_size=shape.hidden_size,
            std=std / math.sqrt(2 * shape.num_layers),
            bias=bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] → [batch, seq, hidden]."""
        x = self.dense_h_to_4h(x)
        if self.swiglu:
            gate, up = x.chunk(2, dim=-1)
            x = silu_mul(gate, up, self.swiglu_backend)
        else:
            x = F.gelu(x)
        return self.dense_4h_to_h(x)
