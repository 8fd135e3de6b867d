"""Between the model's streams and DeepSpeed's pipeline, which passes bare tensors of one form from stage to stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import torch

from megatron.config.schema import ParallelConfig
from megatron.config.shape import Shape
from megatron.data.loader import to_device
from megatron.model.batch import Inputs, ModelBatch, Stream, Targets
from megatron.model.gpt import Embedding, Layer, through
from megatron.model.loss import HeadOutput
from megatron.model.mask import AttentionMask, WithinSegments, made_of
from megatron.objectives.base import Objective, head_in_blocks
from megatron.parallel.context import ParallelContext
from megatron.training.engine import Mode

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def packed(parts: Inputs[torch.Tensor] | Stream, mask: AttentionMask) -> Tensors:
    """What is handed on as bare tensors: ids or hidden states, positions where a batch has them, and what the mask needs."""
    first = parts[0]
    positions = () if parts.position_ids is None else (parts.position_ids,)
    tensors = (first, *positions, *(getattr(parts, name) for name in made_of(mask)))
    return tensors if len(tensors) > 1 else first


def fields(tensors: tuple[torch.Tensor, ...], mask: AttentionMask) -> dict[str, torch.Tensor]:
    """By name again, but for the first."""
    names = made_of(mask)
    has_positions = len(tensors) > 1 + len(names)
    return dict(zip(("position_ids",) * has_positions + names, tensors[1:]))


def stream_of(tensors: Tensors, mask: AttentionMask) -> Stream:
    """The stream that :func:`packed` was given."""
    return Stream(tensors[0], **fields(tensors, mask)) if isinstance(tensors, tuple) else Stream(tensors)


class Blocks(torch.nn.ModuleList):
    """The blocks of a stage: one layer for DeepSpeed, so that a mask is made once for all of them."""

    def __init__(self, layers: Sequence[Layer], mode: Mode) -> None:
        super().__init__(layer.build() for layer in layers)
        self.mode = mode

    def forward(self, tensors: Tensors) -> Tensors:
        """The tensors of the stream behind the last one."""
        mask = self.mode.mask
        return packed(through(self, stream_of(tensors, mask), mask), mask)


def pipeline_loss(
    mode: Mode, context: ParallelContext, asked: Callable[[Targets[torch.Tensor]], None]
) -> Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], torch.Tensor]:
    """``loss_fn(outputs, labels)`` of DeepSpeed's last stage.

    Args:
        mode: gives the kind of loss.
        context: this process.
        asked: told of the targets before every loss.
    """

    def loss(output: tuple[torch.Tensor, ...], labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        kind, targets = mode.objective.loss, Targets(*labels)
        compute = kind.per_token if mode.per_token else kind.reduce
        asked(targets)
        return compute(HeadOutput(*output), targets, context)

    return loss


def blocks_of_stages(num_layers: int, pp_size: int, *, head: float) -> list[int]:
    """Blocks of each pipeline stage, at least one: the last stage has the head, too, and so few blocks that the slowest stage is
    fastest; the others share the rest equally, those that hold fewer micro-batches at a time get what is over.

    Args:
        num_layers: blocks of the model.
        pp_size: stages.
        head: work of the head, in blocks.
    """
    if pp_size == 1:
        return [num_layers]
    others = pp_size - 1
    most = num_layers - others  # each of them has one
    last = min(range(most, 0, -1), key=lambda count: max(ceil((num_layers - count) / others), count + head))
    rest = num_layers - last
    return [rest // others + (others - stage <= rest % others) for stage in range(others)] + [last]


def stages(shape: Shape, objective: Objective, parallel: ParallelConfig) -> list[int]:
    """Blocks of each stage of a run; a block that is recomputed works a third more."""
    head = head_in_blocks(shape, objective) / (4 / 3 if parallel.recompute_activations else 1)
    return blocks_of_stages(shape.num_layers, parallel.pipeline_model_parallel_size, head=head)


def build_stage(
    layers: Sequence[Layer],
    mode: Mode,
    context: ParallelContext,
    asked: Callable[[Targets[torch.Tensor]], None],
    *,
    blocks: Sequence[int],
) -> torch.nn.Module:
    """This rank's stage: its blocks, the embedding on the first and the head on the last.

    Args:
        layers: of the model, see :func:`megatron.model.gpt.build_layers`.
        mode: what the model computes.
        context: this process.
        asked: told of the targets before every loss.
        blocks: of each stage.
    """
    from deepspeed.pipe import PipelineModule

    specs = stage_layers(layers, mode, blocks)
    # The embedding and the first blocks, blocks, and the last blocks with all that is behind.
    ends = [0, *range(2, 1 + len(blocks)), len(specs)]

    class Stage(PipelineModule):
        """Partitioned as we say."""

        def _partition_layers(self, method: str = "") -> None:
            self.parts = ends
            self._set_bounds(start=ends[context.pp.rank], stop=ends[context.pp.rank + 1])

    with redirect_stdout(StringIO()):  # it prints what it builds
        return Stage(
            layers=specs,
            topology=topology(context),
            loss_fn=pipeline_loss(mode, context, asked),
            activation_checkpoint_interval=0,  # blocks recompute themselves
        )


def topology(context: ParallelContext) -> Any:
    """The grid as DeepSpeed lays it out; the same order as ours (a test compares them)."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(num_pp=context.pp.size, num_mp=context.tp.size, num_dp=context.dp.size)


def stage_layers(layers: Sequence[Layer], mode: Mode, blocks: Sequence[int]) -> list[Any]:
    """DeepSpeed's description of the model: the same layers, taking and giving tensors, the blocks of each stage as one."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    embedding, norm, head = layers[0], *layers[-2:]
    ends = [1, *(1 + end for end in accumulate(blocks))]
    tied = {"tied_weight_attr": ["word_embeddings.weight"], **embedding.arguments}

    def embed(module: Embedding, inputs: tuple[torch.Tensor, ...]) -> Tensors:
        return packed(module(Inputs(inputs[0], **fields(inputs, mode.mask))), mode.mask)

    specs = [TiedLayerSpec(embedding.tied_to, Embedding, forward_fn=embed, **tied)]
    specs += [LayerSpec(Blocks, layers[first:last], mode) for first, last in pairwise(ends)]
    specs += [_hidden, LayerSpec(norm.module, **norm.arguments)]
    if head.tied_to is None:
        specs.append(LayerSpec(head.module, **head.arguments))
    else:
        specs.append(TiedLayerSpec(head.tied_to, head.module, forward_fn=head.forward, **tied))
    return [*specs, _matrix_in_graph]


def pipeline_batches(
    data: Iterator[ModelBatch[torch.Tensor]], mode: Mode, device: torch.device
) -> Iterator[tuple[Any, tuple[torch.Tensor, ...]]]:
    """Micro-batches as DeepSpeed reads them: inputs of the first stage, labels of the last one.

    They are moved here, because DeepSpeed's own copies wait for the device.

    The receiving stages expect the form of the first micro-batch for ever. So segments and positions are filled in where a batch
    lacks them though others have them, which is only where sequences may be cut: where masks end with segments.
    """
    for batch in data:
        inputs, targets = to_device(batch, device)
        labels = tuple(part for part in targets if part is not None)
        if isinstance(mode.mask, WithinSegments):
            ids, positions, _, segments, _ = inputs
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).contiguous()
            segments = torch.zeros_like(ids) if segments is None else segments
            inputs = inputs._replace(position_ids=positions, segment_ids=segments)
        tensors = packed(inputs, mode.mask)
        yield (tensors if isinstance(tensors, tuple) else (tensors,)), labels


def _hidden(tensors: Tensors) -> torch.Tensor:
    return tensors[0] if isinstance(tensors, tuple) else tensors


def _matrix_in_graph(output: HeadOutput) -> HeadOutput:
    """The last layer of a pipeline: the output matrix as a node of the graph instead of a bare parameter.

    When the first gradient reaches an output of the module, DeepSpeed 0.19.8 zeroes the bf16 gradients of the last
    micro-batch. A bare parameter is no node that it could watch: it has its gradient by then, and would lose it.
    """
    return HeadOutput(output.hidden, output.matrix.view_as(output.matrix))
