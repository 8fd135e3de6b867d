"""One pre-norm transformer block, the unit of pipeline partition, recomputation and compilation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron.config.schema import ModelConfig
from megatron.model.attention import SelfAttention
from megatron.model.cache import LayerCache
from megatron.model.mask import AttentionMask
from megatron.model.mlp import MLP
from megatron.model.norm import build_norm
from megatron.model.visibility import Visible
from megatron.parallel.tensor import ParameterFactory

# What travels from layer to layer and from stage to stage: the hidden states [batch, seq, hidden]; with them, only for
# objectives that need it, the positions [batch, seq] and the sample ids [batch].
State = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def unpack(state: State) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Hidden states, positions or None, sample ids or None."""
    return state if isinstance(state, tuple) else (state, None, None)


def repack(hidden: torch.Tensor, state: State) -> State:
    """New hidden states in the same form."""
    return (hidden, *state[1:]) if isinstance(state, tuple) else hidden


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, each with dropout on what is added."""

    def __init__(
        self, config: ModelConfig, factory: ParameterFactory, *, mask: AttentionMask, recompute: bool = False
    ) -> None:
        super().__init__()
        self.mask = mask
        self.recompute = recompute
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = build_norm(config, factory.child("input_layernorm"))
        self.self_attention = SelfAttention(config, factory.child("self_attention"))
        self.post_attention_layernorm = build_norm(config, factory.child("post_attention_layernorm"))
        self.mlp = MLP(config, factory.child("mlp"))

    def forward(self, state: State, cache: LayerCache | None = None) -> State:
        hidden, position_ids, sample_ids = unpack(state)
        if self.recompute and torch.is_grad_enabled():
            hidden = checkpoint(self._masked_transform, hidden, position_ids, sample_ids, use_reentrant=False)
        else:
            hidden = self._masked_transform(hidden, position_ids, sample_ids, cache)
        return repack(hidden, state)

    def _masked_transform(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor | None,
        sample_ids: torch.Tensor | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        visible = self.self_attention.visible(hidden, self.mask, position_ids, sample_ids)
        return self.transform(hidden, visible, position_ids, cache)

    def transform(
        self,
        hidden: torch.Tensor,
        visible: Visible,
        position_ids: torch.Tensor | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """[batch, seq, hidden] → [batch, seq, hidden]; compiled as one graph when asked."""
        attended = self.self_attention(self.input_layernorm(hidden), visible, position_ids, cache)
        hidden = hidden + F.dropout(attended, self.hidden_dropout, self.training)
        fed_forward = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + F.dropout(fed_forward, self.hidden_dropout, self.training)
