"""The only definition of the model: a list of layers that makes the pipeline module and the plain module alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron.config.schema import ModelConfig
from megatron.model.block import TransformerBlock
from megatron.model.cache import LayerCache
from megatron.model.embedding import Embedding, FinalNorm, LMHead, tied_head
from megatron.model.loss import sample_losses, weighted_loss
from megatron.model.mask import AttentionMask
from megatron.parallel.context import ParallelContext
from megatron.parallel.tensor import ParameterFactory, gather_last_dim

if TYPE_CHECKING:
    from megatron.model.batch import ModelBatch


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
    arguments: dict[str, Any] = field(default_factory=dict)
    tied_to: str | None = None
    forward: Callable | None = None

    def build(self) -> nn.Module:
        """Construct the module with its initial weights."""
        return self.module(**self.arguments)


def build_layers(
    config: ModelConfig, context: ParallelContext, *, mask: AttentionMask, seed: int, recompute: bool = False
) -> list[Layer]:
    """Describe the model: embedding, blocks, final norm, head.

    Args:
        config: resolved model configuration.
        context: this process; decides which slice of every tensor is made.
        mask: which keys a query sees.
        seed: seed of the initial weights.
        recompute: recompute each block in the backward pass.

    Returns:
        ``num_layers + 3`` layers. The last one returns hidden states and this rank's rows of the output matrix.
    """
    assert config.num_layers and config.padded_vocab_size
    root = ParameterFactory(context, seed)
    vocab = {"vocab_size": config.padded_vocab_size}
    embedding = {"config": config, "factory": root, **vocab}
    layers = [Layer(Embedding, embedding, tied_to="embedding")]
    for index in range(config.num_layers):
        arguments = {"config": config, "factory": root.child(f"layers.{index}"), "mask": mask, "recompute": recompute}
        layers.append(Layer(TransformerBlock, arguments))
    layers.append(Layer(FinalNorm, {"config": config, "factory": root.child("final_layernorm")}))
    if config.untie_embeddings_and_output_weights:
        layers.append(Layer(LMHead, {"config": config, "factory": root.child("lm_head"), **vocab}))
    else:
        layers.append(Layer(Embedding, embedding, tied_to="embedding", forward=tied_head))
    return layers


class GPTModel(nn.Module):
    """All layers in one module: training without pipeline stages, inference and export.

    The names in ``state_dict()`` are the canonical ones (``layers.0.mlp.dense_h_to_4h.weight``, …); see
    ``docs/checkpoints.md``.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext | None = None,
        *,
        mask: AttentionMask,
        seed: int = 1234,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context or ParallelContext()
        described = build_layers(config, self.context, mask=mask, seed=seed, recompute=recompute)
        self.embedding: Any = described[0].build()
        self.layers = nn.ModuleList(layer.build() for layer in described[1:-2])
        self.final_layernorm = described[-2].build()
        self.lm_head = None if described[-1].tied_to else described[-1].build()
        for name, parameter in self.named_parameters():
            assert canonical_name(name) == getattr(parameter, "canonical_name"), name  # noqa: B009

    def forward(self, batch: ModelBatch, *, reduction: str = "mean") -> torch.Tensor:
        """Loss of a micro-batch.

        Args:
            batch: prepared by an objective, on the model's device.
            reduction: "mean" for the scalar training loss, "sample" for the loss of each sample [batch].
        """
        output = self.head(self.hidden_states(batch.input_ids, batch.position_ids, batch.sample_ids))
        reduce = weighted_loss if reduction == "mean" else sample_losses
        return reduce(output, batch.targets, self.context)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Normalised output of the last block [batch, seq, hidden].

        With ``caches``, one for each block, ``input_ids`` continue the tokens that these hold.
        """
        if caches is not None and caches[0].length:
            start = caches[0].length
            assert input_ids.shape[1] == 1, "tokens that follow a cache are fed one at a time"
            position_ids = torch.full_like(input_ids, start)
        state: Any = input_ids
        if position_ids is not None:
            state = (input_ids, position_ids, sample_ids)
        state = self.embedding(state)
        for index, layer in enumerate(self.layers):
            state = layer(state) if caches is None else layer(state, caches[index])
        return self.final_layernorm(state)

    def head(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and this rank's rows of the output matrix."""
        return tied_head(self.embedding, hidden) if self.lm_head is None else self.lm_head(hidden)

    def logits(
        self,
        input_ids: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Logits over the padded vocabulary [batch, seq, vocab] for inference, in the model's dtype.

        Args:
            input_ids: [batch, seq] int64.
            position_ids: [batch, seq] int64 where tokens are out of order.
            sample_ids: [batch] int64, for masks that differ between samples.
            positions: [batch, seq] bool: only these, as [selected, vocab] in row-major order.
            caches: see :meth:`hidden_states`.
        """
        hidden = self.hidden_states(input_ids, position_ids, sample_ids, caches)
        hidden, weight = self.head(hidden if positions is None else hidden[positions])
        return gather_last_dim(hidden @ weight.t(), self.context)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """This rank's tensors under their canonical names."""
        state = super().state_dict(*args, **kwargs)
        return {canonical_name(name): tensor for name, tensor in state.items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load this rank's tensors by canonical name."""
        own = {canonical_name(name): name for name, _ in self.named_parameters()}
        renamed = {own.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)


def canonical_name(module_name: str) -> str:
    """Name of a tensor in checkpoints from its name in :class:`GPTModel`."""
    return module_name.removeprefix("embedding.").replace("final_layernorm.norm.", "final_layernorm.")
