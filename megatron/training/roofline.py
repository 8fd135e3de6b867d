"""Seconds of one training step on paper, to rank layouts: what each part needs of arithmetic, memory and links, at rates that
kernels reach. Measured on one H100 alone; links, and so all layouts of several GPUs, are on paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.model.arithmetic import Device, keys_per_token
from megatron.objectives.base import computed_positions
from megatron.training.deepspeed.pipeline import stages
from megatron.training.preflight import Case, num_parameters

# Shares of the peak that matrix products and fused attention reach at most, the width at which half of it is reached, and the
# share of a link that collectives reach. For one H100 they give the measured seconds of a step within 3 % (docs/benchmarks.md).
MATRIX, HALF_WIDTH, ATTENTION, HALF_HEAD, LINK = 0.75, 400, 0.65, 64, 0.75
PLAIN = 0.07  # of the bf16 peak, where fp32 does not use the matrix units (TF32 stays off)
# Bytes that elementwise kernels move for each byte that a block keeps, there and back; for each logit; for each parameter
# and micro-batch (a gradient is added), and each parameter and step (moments, masters, weights, norm).
BLOCK_TRAFFIC, LOGIT_TRAFFIC, GRADIENT_TRAFFIC, UPDATE_TRAFFIC = 4.0, 6.0, 10.0, 34.0


@dataclass(frozen=True)
class Cluster:
    """GPUs, and what joins them.

    Attributes:
        device: each of them.
        gpus_per_node: joined by ``device.link``.
        network: bytes/s of one GPU to other nodes, in one direction.
    """

    device: Device
    gpus_per_node: int = 8
    network: float = 50e9


def step_seconds(case: Case, cluster: Cluster) -> dict[str, float]:
    """Seconds of a step by what they go into: blocks, attention, head, elementwise, tensor (parallel messages), gradients
    (their sums, copies and the update), bubble.

    Args:
        case: the run.
        cluster: where.
    """
    shape, layout, device = case.shape, case.layout, cluster.device
    tp, pp, dp = layout.tp_size, layout.pp_size, layout.dp_size
    micro_batches, mask = layout.num_micro_batches, case.objective.attention_mask
    tokens = layout.micro_batch_size * shape.seq_length  # of one micro-batch
    positions = tokens * computed_positions(case.objective)
    is_recomputed = case.config.parallel.recompute_activations
    passes = 4 / 3 if is_recomputed else 1.0  # a third of the work is forward, and done twice
    embedding = shape.padded_vocab_size * shape.hidden_size
    blocks = num_parameters(case) - embedding * (1 + shape.untie_embeddings_and_output_weights)
    heads = shape.num_attention_heads * shape.kv_channels
    keys = case.objective.num_views * keys_per_token(mask, shape.seq_length)
    rows = tokens * case.objective.loss_fraction
    width = shape.hidden_size / tp
    peak, bandwidth = device.peak * (1 if case.width == 2 else PLAIN), device.bandwidth
    matrix = peak * MATRIX * width / (width + HALF_WIDTH)
    fused = peak * ATTENTION * shape.kv_channels / (shape.kv_channels + HALF_HEAD)
    block = {
        "blocks": 6 * blocks * positions * passes / tp / matrix,
        "attention": 12 * shape.num_layers * heads * keys * tokens * passes / tp / fused,
        "elementwise": BLOCK_TRAFFIC * case.kept * positions * shape.num_layers * passes / bandwidth,
        "tensor": _tensor_seconds(case, cluster, positions, passes),
    }
    head = rows * (6 * embedding / matrix + LOGIT_TRAFFIC * shape.padded_vocab_size / bandwidth) / tp
    shares = [count / shape.num_layers for count in stages(shape, case.objective, case.config.parallel)]
    ends = [0.0] * (pp - 1) + [head]
    slowest = max(zip(shares, ends), key=lambda stage: stage[0] * sum(block.values()) + stage[1])
    share, end = slowest
    micro = {name: share * seconds for name, seconds in block.items()} | {"head": end}
    busy = {name: seconds * micro_batches for name, seconds in micro.items()}
    parameters = num_parameters(case) / (tp * pp)
    traffic = parameters * (GRADIENT_TRAFFIC * micro_batches + UPDATE_TRAFFIC / dp) / bandwidth
    reduced = _reduction_seconds(case, cluster, parameters, sum(micro.values()))
    return {**busy, "gradients": traffic + reduced, "bubble": sum(micro.values()) * (pp - 1)}


def _tensor_seconds(case: Case, cluster: Cluster, positions: int, passes: float) -> float:
    """Four all-reduces of the activations of each block, and two more where it is recomputed; with sequence
    parallelism as much as one more, because the inputs of its products are gathered again."""
    tp = case.layout.tp_size
    if tp == 1:
        return 0.0
    link = cluster.device.link if tp <= cluster.gpus_per_node else cluster.network
    bytes_moved = 2 * (tp - 1) / tp * positions * case.shape.hidden_size * case.width
    count = (4 * (1.5 if passes > 1 else 1) + case.is_split) * case.shape.num_layers
    return count * bytes_moved / (link * LINK)


def _reduction_seconds(case: Case, cluster: Cluster, parameters: float, micro_seconds: float) -> float:
    """Sums of gradients and gathers of weights that computing does not hide."""
    layout, width = case.layout, case.width
    if layout.dp_size == 1:
        return 0.0
    is_inside = layout.world_size <= cluster.gpus_per_node
    link = (cluster.device.link if is_inside else cluster.network) * LINK
    one = parameters * (layout.dp_size - 1) / layout.dp_size / link  # seconds for a byte of each parameter, one way
    if layout.engine == "fsdp2":  # weights once, or in both passes, and one sum of gradients in fp32, most of it hidden
        gathers = 2 * layout.num_micro_batches if layout.zero_stage == 3 else 1
        seconds = (gathers * width + 4) * one
        return max(0.25 * seconds, seconds - layout.num_micro_batches * micro_seconds)
    if layout.zero_stage == 3:  # weights in both passes, gradients after: of every micro-batch, most of it hidden
        return layout.num_micro_batches * max(0.25 * 3 * width * one, 3 * width * one - micro_seconds)
    if layout.zero_stage == 2:
        hidden = layout.num_micro_batches * max(0.25 * width * one, width * one - micro_seconds)
        return hidden + width * one
    return 2 * 4 * one + width * one  # an all-reduce in fp32 after the last micro-batch, then the new weights
