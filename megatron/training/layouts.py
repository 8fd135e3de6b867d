"""Which layouts a run could have on given machines: those that fit, the fastest on paper first; and what one flag changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from megatron.config.option import flag_of
from megatron.config.schema import Config
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
    layout, used = case.layout, footprints(case)[0].total
    doubled = {name: range(2 * size, layout.world_size + 1, size) for name, size in (
        ("tensor_model_parallel_size", layout.tp_size), ("pipeline_model_parallel_size", layout.pp_size)
    )}  # fmt: skip
    smaller = [size for size in range(layout.micro_batch_size - 1, 0, -1) if layout.micro_batch_size % size == 0]
    choices: list[tuple[str, Sequence[int | bool]]] = [
        ("recompute_activations", [True]),
        ("micro_batch_size", smaller[:1]),
        *(("zero_stage", [stage]) for stage in range(layout.runs_as + 1, 4)),
        *doubled.items(),
        ("cpu_optimizer", [True]),
        ("bf16", [True]),
    ]
    for name, values in choices:
        found = (other for value in values if (other := changed(case, **{name: value})) is not None)
        other = next(found, None)
        if other is not None and footprints(other)[0].total < used:
            yield _typed(other, [name]), other


def flags_of(case: Case) -> str:
    """The flags of a layout, as one would type them behind those of the run."""
    optional = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "recompute_activations")
    sections = [(each.parallel, each.run) for each in (case.config, case.typed, Config())]
    own, typed, default = ({**asdict(parallel), **asdict(run)} for parallel, run in sections)
    shown = [name for name in optional if not own[name] == typed[name] == default[name]]
    return _typed(case, ["micro_batch_size", "zero_stage", *shown])


def _typed(case: Case, names: Sequence[str]) -> str:
    """Settings as flags; with the global batch, where it was not typed and would be another one."""
    values = {name: value for section in asdict(case.config).values() for name, value in section.items()}
    words = [flag_of(name) if values[name] is True else f"{flag_of(name)} {values[name]}".lower() for name in names]
    if case.typed.run.global_batch_size is None and case.layout.num_micro_batches > 1:
        words.append(f"--global-batch-size {case.layout.global_batch_size}")
    return " ".join(words)
