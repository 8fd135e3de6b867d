"""Self-attention over tensor-parallel heads, on PyTorch's fused kernels, with rotary positions."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from megatron.config.shape import Shape
from megatron.model.batch import Stream
from megatron.model.mask import AttentionMask, Causal, Full
from megatron.model.visibility import Visible, attend_flex, visible_keys
from megatron.parallel.tensor import ColumnParallelLinear, ParameterFactory, RowParallelLinear, TensorParallelModule


class LayerCache(Protocol):
    """Keys and values of earlier tokens in one layer, ``length`` of them, kept by a decoder (``inference/decoder.py``)."""

    length: int

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new positions [batch, groups, new, channels]; returns all of them."""


class SelfAttention(TensorParallelModule):
    """Multi-head or grouped-query attention. Rows of the fused projection are [Q; K; V], heads are split over ranks.

    ``kv_channels · heads`` need not equal the hidden size. The softmax scale is 1/√kv_channels.
    """

    def __init__(self, shape: Shape, factory: ParameterFactory, rotary: RotaryEmbedding | None) -> None:
        super().__init__(factory.context)
        tp_size = factory.context.tp.size
        self.head_size = shape.kv_channels
        self.num_heads = shape.num_attention_heads // tp_size
        self.num_groups = shape.num_query_groups // tp_size
        self.dropout = shape.attention_dropout
        bias, std = not shape.disable_bias_linear, shape.init_method_std
        query_size = shape.num_attention_heads * shape.kv_channels
        key_size = shape.num_query_groups * shape.kv_channels
        self.query_key_value = ColumnParallelLinear(
            factory.child("query_key_value"),
            in_size=shape.hidden_size,
            blocks=(query_size, key_size, key_size),
            std=std,
            bias=bias,
        )
        self.dense = RowParallelLinear(
            factory.child("dense"),
            in_size=query_size,
            out_size=shape.hidden_size,
            std=std / math.sqrt(2 * shape.num_layers),
            bias=bias,
        )
        self.rotary = rotary

    def visible(self, stream: Stream, mask: AttentionMask, cache: LayerCache | None = None) -> Visible:
        """The mask in the form that :meth:`forward` takes. Apart from it, because it is not for a compiled graph."""
        has_dropout = self.training and self.dropout > 0.0
        use_flex = stream.hidden.is_cuda and not has_dropout and self.head_size >= 16
        if self.is_split:  # only sizes and device are asked
            batch, own, _ = stream.hidden.shape
            stream = stream._replace(hidden=stream.hidden.new_empty(1).expand(batch, own * self.context.tp.size, 1))
        return visible_keys(mask, stream, use_flex=use_flex, past=0 if cache is None else cache.length)

    def forward(
        self,
        hidden: torch.Tensor,
        visible: Visible,
        position_ids: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """Attend: [batch, seq, hidden] → [batch, seq, hidden]; of this rank's tokens with sequence parallelism.

        Args:
            hidden: normalised input.
            visible: which keys a query sees, from :meth:`visible`.
            position_ids: [batch, seq] when tokens are out of order, else None.
            cache: keys and values of earlier tokens, which the input continues.
        """
        heads = self.query_key_value(hidden)
        batch, seq, _ = heads.shape
        heads = heads.view(batch, seq, self.num_heads + 2 * self.num_groups, self.head_size)
        query, key, value = heads.transpose(1, 2).split((self.num_heads, self.num_groups, self.num_groups), dim=1)
        if self.rotary is not None:
            cos, sin = self.rotary(seq, position_ids)
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)
        context = self._attend(query, key, value, visible)
        return self.dense(context.transpose(1, 2).reshape(batch, seq, self.num_heads * self.head_size))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Visible) -> torch.Tensor:
        """softmax(QKᵀ/√d)V: [batch, heads, seq, channels]. Only a dense mask makes a [seq, seq] tensor."""
        if isinstance(visible, BlockMask):
            return attend_flex(query, key, value, visible)
        if self.training and self.dropout > 0.0 and self.context.tp.size > 1 and not self.is_split:
            return self._attend_with_own_dropout(query, key, value, visible)
        return self._attend_by_product(query, key, value, visible)

    def _attend_by_product(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Causal | Full | torch.Tensor
    ) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        is_causal = isinstance(visible, Causal) and query.shape[2] == key.shape[2]  # one new token sees all others
        dense = visible if isinstance(visible, torch.Tensor) else None
        grouped = self.num_groups != self.num_heads
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=dense, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped
        )

    def _attend_with_own_dropout(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Causal | Full | torch.Tensor
    ) -> torch.Tensor:
        """Heads are split over ranks, so each rank must drop other probabilities than its peers do, while the random
        stream that the ranks share (dropout of whole activations) must advance alike on all of them. With sequence
        parallelism nothing is shared: every rank has a stream of its own."""
        seed = int(torch.randint(2**62, ()))  # host-side stream: the same on all ranks, restored on recomputation
        with torch.random.fork_rng(devices=[query.device] if query.is_cuda else []):
            torch.manual_seed(seed + self.context.tp.rank)
            return self._attend_by_product(query, key, value, visible)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, rotate-half form over all channels of a head (Su et al., arXiv 2104.09864): tables of cos and
    sin, fp32, grown on demand; not part of the state dict."""

    def __init__(self, *, channels: int, length: int, base: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.channels, self.base = channels, base
        self.register_buffer("cos", torch.empty(length, channels, device=device), persistent=False)
        self.register_buffer("sin", torch.empty(length, channels, device=device), persistent=False)
        self._fill(length, self.cos.device)

    @classmethod
    def of(cls, shape: Shape, device: torch.device | None = None) -> RotaryEmbedding | None:
        """That of all blocks of a model; None where positions are learned."""
        # One more row than the context: an order over seq + 1 tokens has a position for the last label.
        sizes = {"channels": shape.kv_channels, "length": shape.seq_length + 1}
        return cls(**sizes, base=shape.rotary_base, device=device) if shape.use_rotary_position_embeddings else None

    def _fill(self, length: int, device: torch.device) -> None:
        if device.type == "meta":  # a model whose parameters are counted
            return
        # fp64 angles: at position 4096 an fp32 product is off by up to 2e-4 radians.
        exponent = torch.arange(0, self.channels, 2, dtype=torch.float64, device=device) / self.channels
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * self.base**-exponent
        angles = torch.cat((angles, angles), dim=-1)  # [length, channels]
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Follow the module to its device but stay fp32: in bf16 the angles of distant positions collapse."""
        super()._apply(fn, recurse)
        self._fill(self.cos.shape[0], self.cos.device)
        return self

    def forward(self, length: int, position_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, broadcastable to [batch, heads, seq, channels].

        Args:
            length: positions 0 … length − 1 when ``position_ids`` is None.
            position_ids: [batch, seq] int64 positions of each token, below the table's length.
        """
        if position_ids is None:
            if length > self.cos.shape[0]:
                self._fill(length, self.cos.device)
            return self.cos[:length], self.sin[:length]
        return self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` [batch, heads, seq, channels]: ``x·cos + rotate_half(x)·sin``, in fp32, back in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)
