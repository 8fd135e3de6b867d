"""The two ends of the model: ids to hidden states, hidden states to the output matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config.schema import ModelConfig
from megatron.model.block import State
from megatron.model.norm import build_norm
from megatron.parallel.sharding import ShardSpec
from megatron.parallel.tensor import ParameterFactory, VocabParallelEmbedding


class Embedding(nn.Module):
    """Token embedding, plus a learned position table where there is no RoPE, plus dropout."""

    def __init__(self, config: ModelConfig, factory: ParameterFactory, *, vocab_size: int) -> None:
        super().__init__()
        assert config.hidden_size and config.max_position_embeddings
        self.hidden_dropout = config.hidden_dropout
        std = config.init_method_std
        self.word_embeddings = VocabParallelEmbedding(
            factory.child("word_embeddings"), vocab_size=vocab_size, hidden_size=config.hidden_size, std=std
        )
        self.position_embeddings = None
        if not config.use_rotary_position_embeddings:
            # One row more than the context, as in the rotary table.
            rows = config.max_position_embeddings + 1
            self.position_embeddings = PositionTable(factory.child("position_embeddings"), rows, config)

    def forward(self, inputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> State:
        """ids [batch, seq], alone or with positions [batch, seq] and sample ids [batch] → the state."""
        input_ids = inputs[0] if isinstance(inputs, tuple) else inputs
        hidden = self.word_embeddings(input_ids)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(inputs[1] if isinstance(inputs, tuple) else None, hidden)
        hidden = F.dropout(hidden, self.hidden_dropout, self.training)
        return (hidden, *inputs[1:]) if isinstance(inputs, tuple) else hidden


class PositionTable(nn.Module):
    """Learned absolute positions."""

    def __init__(self, factory: ParameterFactory, rows: int, config: ModelConfig) -> None:
        super().__init__()
        assert config.hidden_size
        self.weight = factory.normal("weight", ShardSpec((rows, config.hidden_size)), config.init_method_std)

    def forward(self, position_ids: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of the table, broadcastable to ``hidden`` [batch, seq, hidden]."""
        return self.weight[: hidden.shape[1]] if position_ids is None else self.weight[position_ids]


class FinalNorm(nn.Module):
    """The last normalisation. Positions and sample ids end here."""

    def __init__(self, config: ModelConfig, factory: ParameterFactory) -> None:
        super().__init__()
        # Registered under this module's own name in checkpoints: ``final_layernorm.weight``.
        self.norm = build_norm(config, factory)

    def forward(self, state: State) -> torch.Tensor:
        return self.norm(state[0] if isinstance(state, tuple) else state)


class LMHead(nn.Module):
    """An output matrix of its own (``--untie-embeddings-and-output-weights``), split over the vocabulary.

    It hands the hidden states and the matrix on: the loss decides which logits are needed.
    """

    def __init__(self, config: ModelConfig, factory: ParameterFactory, *, vocab_size: int) -> None:
        super().__init__()
        assert config.hidden_size
        spec = ShardSpec((vocab_size, config.hidden_size), 0, (vocab_size,))
        self.weight = factory.normal("weight", spec, config.init_method_std)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, self.weight


def tied_head(embedding: Embedding, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pair with the embedding matrix as output matrix."""
    return hidden, embedding.word_embeddings.weight
