"""The two ends of the model: ids to hidden states, hidden states to the output matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config.shape import Shape
from megatron.model.batch import Inputs, Stream
from megatron.model.loss import HeadOutput
from megatron.parallel.sharding import ShardSpec
from megatron.parallel.tensor import ParameterFactory, TensorParallelModule, VocabParallelEmbedding


class Embedding(nn.Module):
    """Token embedding, plus a learned position table where there is no RoPE, plus dropout."""

    def __init__(self, shape: Shape, factory: ParameterFactory, *, vocab_size: int) -> None:
        super().__init__()
        self.hidden_dropout = shape.hidden_dropout
        std = shape.init_method_std
        self.word_embeddings = VocabParallelEmbedding(
            factory.child("word_embeddings"), vocab_size=vocab_size, hidden_size=shape.hidden_size, std=std
        )
        self.position_embeddings = None
        if not shape.use_rotary_position_embeddings:
            # One row more than the context, as in the rotary table.
            rows = shape.max_position_embeddings + 1
            self.position_embeddings = PositionTable(factory.child("position_embeddings"), rows, shape)

    def forward(self, inputs: Inputs[torch.Tensor]) -> Stream:
        """Ids become hidden states; what else a batch brings travels with them."""
        hidden = self.word_embeddings(inputs.input_ids)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(inputs.position_ids, inputs.input_ids.shape[1])
        hidden = F.dropout(hidden, self.hidden_dropout, self.training)
        return Stream(hidden, *inputs[1:])


class PositionTable(TensorParallelModule):
    """Learned absolute positions."""

    def __init__(self, factory: ParameterFactory, rows: int, shape: Shape) -> None:
        super().__init__(factory.context)
        self.weight = factory.normal("weight", ShardSpec((rows, shape.hidden_size)), shape.init_method_std)

    def forward(self, position_ids: torch.Tensor | None, width: int) -> torch.Tensor:
        """Rows of the table for a sequence of ``width`` tokens, broadcastable to its hidden states."""
        return self.scattered(self.weight[None, :width] if position_ids is None else self.weight[position_ids])


class LMHead(nn.Module):
    """An output matrix of its own (``--untie-embeddings-and-output-weights``), split over the vocabulary.

    It hands the hidden states and the matrix on: the loss decides which logits are needed.
    """

    def __init__(self, shape: Shape, factory: ParameterFactory, *, vocab_size: int) -> None:
        super().__init__()
        spec = ShardSpec((vocab_size, shape.hidden_size), 0, (vocab_size,))
        self.weight = factory.normal("weight", spec, shape.init_method_std)

    def forward(self, hidden: torch.Tensor) -> HeadOutput:
        return HeadOutput(hidden, self.weight)


def tied_head(embedding: Embedding, hidden: torch.Tensor) -> HeadOutput:
    """The same pair with the embedding matrix as output matrix."""
    return HeadOutput(hidden, embedding.word_embeddings.weight)
