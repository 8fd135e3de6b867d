"""The transformer of FACTS §2 written a second time, in explicit torch, to compare the real one with.

Nothing here is shared with megatron/model: rotary embeddings are products of complex numbers, attention is a softmax over
all scores, norms are their formulas.
"""

from __future__ import annotations

import math

import torch

from megatron.config.schema import ModelConfig


def rotate_complex(x: torch.Tensor, position_ids: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """Multiply channel pairs (i, i + d/2) of x [batch, heads, seq, d], read as complex numbers, by e^{j·position·θ_i}."""
    half = x.shape[-1] // 2
    theta = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(()).double(), position_ids.double()[..., None] * theta).unsqueeze(1)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-5) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(QKᵀ/√d)V with fewer key heads repeated; ``allowed`` is broadcastable to [batch, heads, query, key]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value


def plain_logits(
    weights: dict[str, torch.Tensor],
    ids: torch.Tensor,
    config: ModelConfig,
    *,
    allowed: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [batch, seq, vocab] from canonical tensors; RMSNorm, RoPE, SwiGLU and a tied or an own head."""
    batch, seq = ids.shape
    heads, groups, size = (
        config.num_attention_heads,
        config.num_query_groups or config.num_attention_heads,
        config.kv_channels,
    )
    assert heads and groups and size and config.num_layers
    positions = torch.arange(seq).expand(batch, seq) if position_ids is None else position_ids
    x = weights["word_embeddings.weight"][ids]
    for i in range(config.num_layers):
        layer = {n.removeprefix(f"layers.{i}."): w for n, w in weights.items() if n.startswith(f"layers.{i}.")}
        normed = rms_norm(x, layer["input_layernorm.weight"])
        qkv = (normed @ layer["self_attention.query_key_value.weight"].T).view(batch, seq, -1, size).transpose(1, 2)
        query, key, value = qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]
        context = attention(rotate_complex(query, positions), rotate_complex(key, positions), value, allowed)
        context = context.transpose(1, 2).reshape(batch, seq, heads * size)
        x = x + context @ layer["self_attention.dense.weight"].T
        normed = rms_norm(x, layer["post_attention_layernorm.weight"])
        gate, up = (normed @ layer["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.dense_4h_to_h.weight"].T
    x = rms_norm(x, weights["final_layernorm.weight"])
    return x @ weights.get("lm_head.weight", weights["word_embeddings.weight"]).T


def causal(seq: int) -> torch.Tensor:
    return torch.ones(seq, seq, dtype=torch.bool).tril()
