"""Which layouts a run could have on given machines: those that fit, the fastest on paper first; and what one flag changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron.training.preflight import Case, changed, fits, footprints
from megatron.training.roofline import Cluster, step_seconds

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Suggestion:
    """A layout of the same run.

    Attributes:
        case: the run with it.
        bytes: of the fullest GPU.
        seconds: of a step, on paper.
        mfu: share of the peak, on paper.
    """

    case: Case
    bytes: int
    seconds: float
    mfu: float


def suggestion(case: Case, cluster: Cluster) -> Suggestion:
    """How full and how fast a layout is."""
    seconds = sum(step_seconds(case, cluster).values())
    layout = case.layout
    work = case.flops_per_token * layout.global_batch_size * case.shape.seq_length / layout.world_size
    return Suggestion(case, footprints(case)[0].total, seconds, work / seconds / cluster.device.peak)


def suggestions(case: Case, cluster: Cluster) -> list[Suggestion]:
    """All layouts that fit, the fastest on paper first; of equally fast ones the emptier first.

    Tensor-parallel ranks stay within a node; the global batch, and all else that changes results, stays. Micro-batches are powers
    of two, or that of the run.
    """
    world = case.layout.world_size
    node = min(world, cluster.gpus_per_node)
    shards = [size for size in range(1, node + 1) if node % size == 0]
    depths = [size for size in range(1, case.shape.num_layers + 1) if world % size == 0]
    micro_batches = sorted({*MICRO_BATCHES, case.layout.micro_batch_size})
    choices = product(shards, depths, (1, 2, 3), micro_batches, (False, True))
    found = []
    for tp, pp, zero, micro, is_recomputed in choices:
        if (pp > 1 and zero > 1) or replace(case.layout, zero_stage=zero).runs_as != zero:
            continue
        other = changed(
            case,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            zero_stage=zero,
            micro_batch_size=micro,
            recompute_activations=is_recomputed,
        )
        if other is not None and fits(other, cluster.device):
            found.append(suggestion(other, cluster))
    return sorted(found, key=lambda each: (round(each.seconds, 4), each.bytes))


def remedies(case: Case) -> Iterator[tuple[str, Case]]:
    """Single flags that make a run smaller, with the run that has it, as far as the run allows them."""
    layout, parallel = case.layout, case.config.parallel
    if not parallel.recompute_activations:
        yield from _named(case, "--recompute-activations", recompute_activations=True)
    if layout.micro_batch_size > 1:
        half = layout.micro_batch_size // 2
        yield from _named(case, f"--micro-batch-size {half}", micro_batch_size=half)
    for stage in range(layout.runs_as + 1, 4):
        yield from _named(case, f"--zero-stage {stage}", zero_stage=stage)
    double = 2 * layout.tp_size
    yield from _named(case, f"--tensor-model-parallel-size {double}", tensor_model_parallel_size=double)
    if not case.config.run.bf16:
        yield from _named(case, "--bf16", bf16=True)


def _named(case: Case, name: str, **changes: int | bool) -> Iterator[tuple[str, Case]]:
    other = changed(case, **changes)
    if other is not None:
        yield name, other


def flags_of(case: Case) -> str:
    """The flags of a layout, as one would type them."""
    layout = case.layout
    words = [f"--micro-batch-size {layout.micro_batch_size}", f"--zero-stage {layout.zero_stage}"]
    words += [f"--tensor-model-parallel-size {layout.tp_size}"] * (layout.tp_size > 1)
    words += [f"--pipeline-model-parallel-size {layout.pp_size}"] * (layout.pp_size > 1)
    words += ["--recompute-activations"] * case.config.parallel.recompute_activations
    return " ".join(words)
