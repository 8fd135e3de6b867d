"""The only definition of the model, and its two ends: a list of layers that makes the pipeline module and the plain module
alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config.shape import Shape
from megatron.model.attention import LayerCache, RotaryEmbedding
from megatron.model.batch import Inputs, ModelBatch, Stream
from megatron.model.block import FinalNorm, TransformerBlock
from megatron.model.loss import HeadOutput, LossKind
from megatron.model.mask import AttentionMask
from megatron.parallel.sharding import ShardSpec, shard_of
from megatron.parallel.tensor import ParameterFactory, TensorParallelModule, VocabParallelEmbedding, gather_last_dim


class Embedding(nn.Module):
    """Token embedding, plus a learned position table where there is no RoPE, plus dropout."""

    def __init__(self, shape: Shape, factory: ParameterFactory) -> None:
        super().__init__()
        self.hidden_dropout = shape.hidden_dropout
        self.word_embeddings = VocabParallelEmbedding(
            factory.child("word_embeddings"),
            vocab_size=shape.padded_vocab_size,
            hidden_size=shape.hidden_size,
            std=shape.init_method_std,
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

    def __init__(self, shape: Shape, factory: ParameterFactory) -> None:
        super().__init__()
        spec = ShardSpec((shape.padded_vocab_size, shape.hidden_size), 0, (shape.padded_vocab_size,))
        self.weight = factory.normal("weight", spec, shape.init_method_std)

    def forward(self, hidden: torch.Tensor) -> HeadOutput:
        """``hidden`` [batch, seq, hidden] beside this rank's rows of the output matrix."""
        return HeadOutput(hidden, self.weight)


def tied_head(embedding: Embedding, hidden: torch.Tensor) -> HeadOutput:
    """The same pair with the embedding matrix as output matrix."""
    return HeadOutput(hidden, embedding.word_embeddings.weight)


@dataclass(frozen=True)
class Layer:
    """One element of the model: how to build it, and whether it shares its parameters.

    Attributes:
        module: class of the layer.
        arguments: its keyword arguments.
        tied_to: key of the layers that share one set of parameters, or None.
        forward: function (module, input) that stands in for ``module.forward`` where a tied module plays another part.
    """

    module: type[nn.Module]
    arguments: dict[str, object] = field(default_factory=dict)
    tied_to: str | None = None
    forward: Callable[..., HeadOutput] | None = None

    def build(self) -> nn.Module:
        """Construct the module with its initial weights."""
        return self.module(**self.arguments)


def build_layers(shape: Shape, root: ParameterFactory, *, recompute: bool = False) -> list[Layer]:
    """Describe the model: embedding, blocks, final norm, head.

    Args:
        shape: resolved model configuration.
        root: makes the parameters: which slice of every tensor, from which seed.
        recompute: recompute each block in the backward pass.

    Returns:
        ``num_layers + 3`` layers. The last one returns hidden states and this rank's rows of the output matrix.
    """
    embedding = {"shape": shape, "factory": root}
    layers = [Layer(Embedding, embedding, tied_to="embedding")]
    common = {"shape": shape, "rotary": RotaryEmbedding.of(shape, root.device), "recompute": recompute}  # one for all
    for index in range(shape.num_layers):
        layers.append(Layer(TransformerBlock, {**common, "factory": root.child(f"layers.{index}")}))
    layers.append(Layer(FinalNorm, {"shape": shape, "factory": root.child("final_layernorm")}))
    if shape.untie_embeddings_and_output_weights:
        layers.append(Layer(LMHead, {"shape": shape, "factory": root.child("lm_head")}))
    else:
        layers.append(Layer(Embedding, embedding, tied_to="embedding", forward=tied_head))
    return layers


def through(
    blocks: nn.ModuleList, stream: Stream, mask: AttentionMask, caches: Sequence[LayerCache] | None = None
) -> Stream:
    """The stream behind the last of some blocks, whose mask is made once; see :meth:`GPTModel.hidden_states`."""
    first, own = blocks[0], [None] * len(blocks) if caches is None else caches
    assert isinstance(first, TransformerBlock)
    visible = first.self_attention.visible(stream, mask, own[0])
    for block, cache in zip(blocks, own):
        stream = block(stream, visible, cache)
    return stream


class GPTModel(nn.Module):
    """All layers in one module: training without pipeline stages, inference and export."""

    def __init__(self, shape: Shape, root: ParameterFactory | None = None, *, recompute: bool = False) -> None:
        """Args:
        shape: resolved model configuration.
        root: makes the parameters; default: of a process alone.
        recompute: recompute each block in the backward pass.
        """
        super().__init__()
        root = root or ParameterFactory()
        self.shape, self.context = shape, root.context
        described = build_layers(shape, root, recompute=recompute)
        embedding = described[0].build()
        assert isinstance(embedding, Embedding)
        self.embedding = embedding
        self.layers = nn.ModuleList(layer.build() for layer in described[1:-2])
        self.final_layernorm = described[-2].build()
        self.lm_head = None if described[-1].tied_to else described[-1].build()

    def forward(
        self, batch: ModelBatch[torch.Tensor], mask: AttentionMask, loss: LossKind, *, per_token: bool = False
    ) -> torch.Tensor:
        """Loss of a micro-batch.

        Args:
            batch: prepared by an objective, on the model's device.
            mask: which keys a query sees.
            loss: kind of loss.
            per_token: instead of the scalar training loss, the loss of each position [batch, width].
        """
        output = self.head(self.hidden_states(batch.inputs, mask))
        return (loss.per_token if per_token else loss.reduce)(output, batch.targets, self.context)

    def hidden_states(
        self, inputs: Inputs[torch.Tensor], mask: AttentionMask, caches: Sequence[LayerCache] | None = None
    ) -> torch.Tensor:
        """Normalised output of the last block [batch, seq, hidden].

        With ``caches``, one for each block, the inputs continue the tokens that these hold.
        """
        if caches is not None and caches[0].length:
            ids = inputs.input_ids
            places = caches[0].length + torch.arange(ids.shape[1], device=ids.device)
            inputs = inputs._replace(position_ids=places.expand(ids.shape))
        return self.final_layernorm(through(self.layers, self.embedding(inputs), mask, caches).hidden)

    def head(self, hidden: torch.Tensor) -> HeadOutput:
        """Hidden states and this rank's rows of the output matrix."""
        return tied_head(self.embedding, hidden) if self.lm_head is None else self.lm_head(hidden)

    def logits(
        self,
        inputs: Inputs[torch.Tensor],
        mask: AttentionMask,
        *,
        positions: torch.Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Logits over the padded vocabulary [batch, seq, vocab] for inference, in the model's dtype.

        Args:
            inputs: see :class:`Inputs`.
            mask: which keys a query sees.
            positions: [batch, seq] bool: only these, as [selected, vocab] in row-major order.
            caches: see :meth:`hidden_states`.
        """
        hidden = self.hidden_states(inputs, mask, caches)
        hidden, weight = self.head(hidden if positions is None else hidden[positions])
        return gather_last_dim(hidden @ weight.t(), self.context)

    def tensors(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by the name of the whole tensor, which is the same in every layout and in checkpoints
        (``layers.0.mlp.dense_h_to_4h.weight``, …; see ``docs/checkpoints.md``)."""
        return {shard_of(parameter).name: parameter for parameter in self.parameters()}
