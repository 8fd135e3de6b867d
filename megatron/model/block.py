"""One pre-norm transformer block, the unit of pipeline partition, recomputation and compilation; with its norm and its
feed-forward layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron.config.shape import Shape
from megatron.model.attention import LayerCache, RotaryEmbedding, SelfAttention
from megatron.model.batch import Stream
from megatron.model.kernels import silu_mul
from megatron.model.visibility import Visible
from megatron.parallel.sharding import ShardSpec
from megatron.parallel.tensor import ColumnParallelLinear, ParameterFactory, RowParallelLinear, TensorParallelModule


class Norm(TensorParallelModule):
    """Normalisation of the last axis, its weights whole on every tensor-parallel rank: RMSNorm,
    ``x / √(mean(x²) + ε) · weight`` (Zhang and Sennrich, arXiv 1910.07467), or LayerNorm, ``(x − mean) / √(var + ε) · weight +
    bias``.
    """

    def __init__(self, shape: Shape, factory: ParameterFactory) -> None:
        super().__init__(factory.context)
        spec, self.epsilon = ShardSpec((shape.hidden_size,)), shape.layernorm_epsilon
        self.weight = factory.constant("weight", spec, 1.0)
        self.bias = factory.constant("bias", spec, 0.0) if shape.normalization == "layernorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised hidden states, of the shape and type of ``x`` [batch, seq, hidden]."""
        weight = self.own(self.weight)
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.epsilon)
        return F.layer_norm(x, weight.shape, weight, self.own(self.bias), self.epsilon)


class FinalNorm(Norm):
    """The last norm, of which every tensor-parallel rank has all tokens: the loss picks from the whole sequence."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden], from [batch, seq / tp, hidden] with sequence parallelism."""
        return self.gathered(super().forward(x))


class MLP(nn.Module):
    """Feed-forward layer: SwiGLU (Shazeer, arXiv 2002.05202), ``W₂ (silu(gate) · up)`` with the rows of the first matrix
    [gate; up], or GELU, ``W₂ gelu(W₁ x)``."""

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


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, each with dropout on what is added. With sequence parallelism
    all but the insides of attention and feed-forward layer is [batch, seq / tp, hidden]."""

    def __init__(
        self, shape: Shape, factory: ParameterFactory, *, rotary: RotaryEmbedding | None, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.hidden_dropout = shape.hidden_dropout
        self.input_layernorm = Norm(shape, factory.child("input_layernorm"))
        self.self_attention = SelfAttention(shape, factory.child("self_attention"), rotary)
        self.post_attention_layernorm = Norm(shape, factory.child("post_attention_layernorm"))
        self.mlp = MLP(shape, factory.child("mlp"))

    def forward(self, stream: Stream, visible: Visible, cache: LayerCache | None = None) -> Stream:
        """New hidden states in the same stream.

        Args:
            stream: see :class:`Stream`.
            visible: which keys a query sees, from :meth:`SelfAttention.visible`; made once for all blocks, and not again where
                they are recomputed.
            cache: keys and values of earlier tokens.
        """
        given = stream.hidden, visible, stream.position_ids
        if self.recompute and torch.is_grad_enabled():
            hidden = checkpoint(self.transform, *given, use_reentrant=False)
        else:
            hidden = self.transform(*given, cache)
        return stream._replace(hidden=hidden)

    def transform(
        self, hidden: torch.Tensor, visible: Visible, position_ids: torch.Tensor | None, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """[batch, seq, hidden] → [batch, seq, hidden]; compiled as one graph when asked."""
        attended = self.self_attention(self.input_layernorm(hidden), visible, position_ids, cache)
        hidden = hidden + F.dropout(attended, self.hidden_dropout, self.training)
        fed_forward = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + F.dropout(fed_forward, self.hidden_dropout, self.training)
