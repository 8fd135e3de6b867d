"""What DeepSpeed holds for one rank, in bytes, by its settings alone: plans ask before there is an engine.

A test counts every tensor of real engines and finds the same number (DeepSpeed 0.19.8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from megatron.training.held import COUNT, FLOAT, Held, Shapes

# Flat partitions begin at multiples of four bytes in 16 bits.
ALIGNMENT = 2
# DeepSpeed's own defaults, for settings that we leave to it.
PERSISTENCE_THRESHOLD, MAX_LIVE_PARAMETERS, PREFETCH = 100_000, 1_000_000_000, 50_000_000
# The all-reduce of ZeRO 1 in bf16 copies tensors that together have no more elements than this.
ALLREDUCE_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Partition:
    """How the parameters of one rank lie in the optimizer.

    Attributes:
        groups: elements of every parameter, by optimizer group, in order; no group is empty.
        dp_size: data-parallel ranks.
    """

    groups: tuple[tuple[int, ...], ...]
    dp_size: int

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(map(sum, self.groups))

    @property
    def padded(self) -> int:
        """Of the flat buffers, one a group, which all ranks cut into equal parts."""
        unit = ALIGNMENT * self.dp_size
        return sum(ceil(sum(group) / unit) * unit for group in self.groups)

    @property
    def own(self) -> int:
        """Of this rank's part of them."""
        return self.padded // self.dp_size

    @property
    def own_by_tensor(self) -> int:
        """Of a rank's part where each parameter is cut on its own (ZeRO 3)."""
        return sum(ceil(count / self.dp_size) for group in self.groups for count in group)

    def touched(self) -> list[int]:
        """Of the whole parameters of which a rank owns any part, for each rank."""
        totals, unit = [0] * self.dp_size, ALIGNMENT * self.dp_size
        for group in self.groups:
            size, start = ceil(sum(group) / unit) * ALIGNMENT, 0
            for count in group:
                for rank in range(start // size, (start + count - 1) // size + 1):
                    totals[rank] += count
                start += count
        return totals


def optimizer_groups(shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    """Elements by group of :func:`megatron.training.optimizer.build_optimizer`: matrices, then one-dimensional tensors.

    Args:
        shapes: of each parameter, in the order of the module.
    """
    groups = (
        tuple(prod(shape) for shape in shapes if len(shape) > 1),
        tuple(prod(shape) for shape in shapes if len(shape) <= 1),
    )
    return tuple(group for group in groups if group)


def held(
    settings: Mapping[str, Any],
    partition: Partition,
    *,
    is_pipeline: bool = False,
    has_average: bool = False,
    rank: int | None = None,
) -> Held:
    """What the engine of one rank holds besides activations, with AdamW.

    Args:
        settings: of :func:`megatron.training.deepspeed.settings.deepspeed_settings`.
        partition: the parameters of this rank.
        is_pipeline: whether the engine is that of a pipeline.
        has_average: whether an average of the weights is kept (``--ema-decay``): fp32, beside the masters.
        rank: of the data-parallel ranks, which differ by what they own of gradients in fp32 under ZeRO 2; default: one that has
            most.
    """
    zero, is_bf16 = settings["zero_optimization"], settings.get("bf16", {}).get("enabled", False)
    is_offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    width = 2 if is_bf16 else FLOAT

    def average(own: int) -> int:
        return (FLOAT * own + COUNT) * has_average

    if zero["stage"] == 3:
        more = average(partition.own_by_tensor)
        return _zero3(settings, partition, width).with_state(more, on_host=is_offloaded)
    if is_bf16 and zero["stage"] == 1 and not is_offloaded:
        found = _zero1_bf16(settings, partition)
    else:
        found = _zero2(settings, partition, width, rank=rank, is_pipeline=is_pipeline)
    return found.with_state(average(partition.own), on_host=is_offloaded)


def _zero1_bf16(settings: Mapping[str, Any], partition: Partition) -> Held:
    """``BF16_Optimizer``: whole fp32 gradients, to which each bf16 one is added as it is made; without
    ``immediate_grad_update`` those of the last micro-batch last until the update."""
    is_immediate = settings["bf16"].get("immediate_grad_update", False)
    between = {
        "weights": 2 * partition.padded,
        "gradients": FLOAT * partition.padded,
        "optimizer": 3 * FLOAT * partition.own + _counters(partition),
        "buckets": 0,
    }
    low = 0 if is_immediate else 2 * partition.elements
    passes = {**between, "gradients": between["gradients"] + low}
    forward = passes if settings["gradient_accumulation_steps"] > 1 else between
    is_copied = partition.dp_size > 1 and len(partition.groups) > 1 and partition.padded <= ALLREDUCE_ELEMENTS
    return Held(between, forward, passes, {**passes, "buckets": is_copied * FLOAT * partition.padded})


def _zero2(
    settings: Mapping[str, Any], partition: Partition, width: int, *, rank: int | None, is_pipeline: bool
) -> Held:
    """``DeepSpeedZeroOptimizer``: ZeRO 2, ZeRO 1 in fp32, and either with the optimizer in host memory."""
    zero = settings["zero_optimization"]
    is_cut = zero["stage"] == 2
    is_offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    largest = max(map(max, partition.groups))
    state = 3 * FLOAT * partition.own
    between = {
        "weights": width * partition.padded,
        "gradients": 0,
        "optimizer": width * largest if is_offloaded else state + _counters(partition),
        "buckets": 0,
    }
    # What earlier micro-batches of a step left: this rank's part in fp32, whole tensors where all is fp32; of ZeRO 1 all.
    touched = partition.touched()
    own = FLOAT * partition.own if width < FLOAT else FLOAT * (max(touched) if rank is None else touched[rank])
    kept = (own if is_cut else FLOAT * partition.elements) * (settings["gradient_accumulation_steps"] > 1)
    host = state + _counters(partition) + FLOAT * partition.own + width * (partition.own + largest)
    if is_offloaded and is_cut and width == FLOAT:  # whole tensors are kept there, from step to step
        kept, host = 0, host + kept
    is_overlapped = zero.get("overlap_comm") and not is_pipeline
    buckets = (width if is_cut else FLOAT) * int(zero["reduce_bucket_size"])
    count = 2 if is_overlapped else 1
    forward = {**between, "gradients": kept, "buckets": count * buckets}
    # Of ZeRO 1 the gradients move, one by one, into the bucket that reduces them; or all wait for the end of the pass.
    whole = FLOAT * partition.elements
    rest = kept if is_cut else max(0, whole - buckets) if is_overlapped else whole
    backward = {**between, "gradients": rest, "buckets": count * buckets}
    update = {**between, "gradients": 0 if is_offloaded else max(own, FLOAT * partition.own)}
    return Held(between, forward, backward, update, host * is_offloaded)


def _zero3(settings: Mapping[str, Any], partition: Partition, width: int) -> Held:
    """``DeepSpeedZeroOptimizer_Stage3``: everything cut tensor by tensor; small tensors, and as many others as are in use,
    are there whole."""
    zero, own = settings["zero_optimization"], partition.own_by_tensor
    is_offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    threshold = int(zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD))
    live = int(zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
    live += int(zero.get("stage3_prefetch_bucket_size", PREFETCH))
    counts = [count for group in partition.groups for count in group]
    # Alone, a rank computes with its partitions.
    whole = [0 if partition.dp_size == 1 else sum(kept) for kept in ([n for n in counts if n <= threshold], counts)]
    state = (5 if is_offloaded else 3) * FLOAT * own  # there: gradients as they come, and as the optimizer takes them
    between = {
        "weights": width * (own + whole[0]),
        "gradients": 0 if is_offloaded else FLOAT * own,
        "optimizer": (0 if is_offloaded else state + FLOAT) + _counters(partition) + 1,
        "buckets": width * int(zero["reduce_bucket_size"]),
    }
    passes = {**between, "weights": width * (own + max(whole[0], min(whole[1], live)))}
    return Held(between, passes, passes, passes, state if is_offloaded else 0)


def _counters(partition: Partition) -> int:
    """The steps of each group, and the gradient norm."""
    return FLOAT * len(partition.groups) + FLOAT
