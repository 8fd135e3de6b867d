"""What training and evaluation begin with: processes laid out, the checkpoint agreed on, model and objective built."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from megatron.checkpoint.select import agree_on_checkpoint
from megatron.checkpoint.warm_start import open_checkpoint
from megatron.model.arithmetic import parameters_for_compute, total_parameters
from megatron.parallel.connection import Connection
from megatron.parallel.context import ParallelContext
from megatron.parallel.launch import local_device
from megatron.training.deepspeed.engine import Engine
from megatron.training.observer import Observer
from megatron.training.plan import Plan, Start
from megatron.training.progress import Progress
from megatron.training.reporting import Screen, say


class Built(NamedTuple):
    """A model on its devices, and where it begins."""

    context: ParallelContext
    engine: Engine
    start: Start


def build(plan: Plan, connection: Connection, observer: Observer | None) -> Built:
    """Lay out the processes, build the engine, load the checkpoint.

    Raises:
        UserError: layout or checkpoint do not fit.
    """
    context = ParallelContext.create(
        tp_size=plan.layout.tp_size,
        pp_size=plan.layout.pp_size,
        device=local_device(connection.launch),
        timeout_minutes=plan.settings.parallel.distributed_timeout_minutes,
    )
    start = _verified(plan, context)
    settings = replace(plan.settings, run=replace(plan.settings.run, seed=plan.seeds.noise))  # of dropout
    engine = Engine(settings, plan.objective, context, observer=observer)
    if start.tag is not None:
        reader = open_checkpoint(start.tag, plan.settings, vocab_size=plan.vocabulary.size)
        engine.load(reader, with_optimizer=start.with_optimizer)
        if reader.replaced and context.is_first_rank:
            say("the mask token starts as the mean of the token embeddings (the checkpoint never used one)")
    return Built(context, engine, start)


def _verified(plan: Plan, context: ParallelContext) -> Start:
    """The start of the plan with its files read: all ranks share the reading, and fall back together."""
    start, run = plan.start, plan.settings.run
    if start.tag is None or run.load is None:
        return start
    selection = agree_on_checkpoint(run.load, run.load_tag, context)
    if selection.tag is None:
        return replace(start, tag=None, manifest={}, is_continued=False, with_optimizer=False)
    return replace(start, tag=selection.tag, manifest=selection.manifest, skipped=selection.skipped)


def introduce(plan: Plan, start: Start, progress: Progress, screen: Screen, *, label: str) -> None:
    """Say what is about to happen: notes, model, layout, where it begins."""
    shape, layout, run = plan.shape, plan.layout, plan.settings.run
    if plan.notes:
        screen.print(f"without effect here: {'; '.join(plan.notes)}")
    precision, zero_note = ("bf16" if run.bf16 else "fp32"), (" (runs as 1)" if layout.zero_stage == 0 else "")
    total = total_parameters(shape)["total"]
    screen.print(
        f"{plan.settings.objective.objective} ({label}) | model {plan.settings.model.model or 'custom'}: "
        f"{total:,} parameters ({parameters_for_compute(shape, plan.vocabulary.size):,} in 6ND), {shape.num_layers} layers, "
        f"hidden {shape.hidden_size}, sequence {shape.seq_length}, vocabulary {plan.vocabulary.size} "
        f"(padded {shape.padded_vocab_size})"
    )
    screen.print(
        f"tp {layout.tp_size} x pp {layout.pp_size} x dp {layout.dp_size}, ZeRO {layout.zero_stage}"
        f"{zero_note}, {precision} | global batch {layout.global_batch_size} = micro {layout.micro_batch_size} x dp "
        f"{layout.dp_size} x {layout.num_micro_batches} accumulated | run directory {plan.run_dir}"
    )
    if start.skipped:
        screen.print(f"warning: skipped checkpoints: {'; '.join(start.skipped)}")
    for name, (before, now, _) in start.changed.items():
        screen.print(f"warning: {name} was {before}, is {now} from step {progress.step} on")
    if start.tag is None:
        screen.print("starting fresh" + (f": no checkpoint in {run.load} yet" if run.load else ""))
    else:
        what = "weights and optimizer" if start.with_optimizer else "weights"
        verb = "continuing" if start.is_continued else "starting"
        screen.print(f"loaded {what} of {start.tag}; {verb} at step {progress.step}")
