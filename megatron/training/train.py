"""One training run, from connected processes to its last line, in one function; and the validation of a checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace

from megatron.checkpoint.select import agree_on_checkpoint
from megatron.checkpoint.warm_start import MaskedReader, open_checkpoint
from megatron.config.schema import AVERAGE
from megatron.data.dataset import build_dataset, describe
from megatron.data.loader import Share, build_loader, build_packing
from megatron.errors import require
from megatron.model.arithmetic import total_parameters
from megatron.objectives.base import flops_per_token
from megatron.parallel.connection import Connection
from megatron.parallel.context import ParallelContext
from megatron.parallel.launch import local_device
from megatron.runs.provenance import this_attempt
from megatron.runs.record import ValidRow, write_evaluation
from megatron.screen import say
from megatron.training.engine import Engine, build_engine
from megatron.training.folder import RunFolder
from megatron.training.plan import Plan, Start
from megatron.training.progress import Interval, Progress, Throughput
from megatron.training.reporting import Screen, given_settings, precision_warning
from megatron.training.step import Observer
from megatron.training.stop import StopRequest
from megatron.training.validation import Probe, Validator


def train(
    plan: Plan, connection: Connection, *, observer: Observer | None = None, probe: Probe | None = None
) -> str | None:
    """Train to the end, or until asked to stop.

    Args:
        plan: the run.
        connection: the processes, connected.
        observer: watches the run.
        probe: measures more with every validation.

    Returns:
        Why the run was stopped before its end, or None.

    Raises:
        UserError: data or checkpoint do not fit.
        Failure: a full disk, or too many steps in a row with a NaN or infinite gradient.
    """
    settings, layout, schedule, run = plan.settings, plan.layout, plan.schedule, plan.settings.run
    objective, batch_size, seq_length = plan.objective, layout.global_batch_size, plan.shape.seq_length

    with ExitStack() as exits:  # whatever happens, what is entered here is left: signals, loader processes, files
        # 1. Model and optimizer, from the checkpoint that --load means.
        context, engine, start = _build(plan, connection, observer)
        stop = exits.enter_context(StopRequest(context, connection, run))
        before = start.manifest if start.is_continued else {}
        progress = Progress.of(before, unique_tokens=plan.sources.unique_tokens)
        num_steps = (schedule.train_samples - progress.consumed_samples) // batch_size
        screen = Screen(total_steps=progress.step + num_steps, first_step=progress.step, enabled=context.is_first_rank)
        exits.callback(screen.close)
        _introduce(plan, start, progress, screen, label=objective.label)

        # 2. Training data from the sample at which the run stands, and what validates it.
        dataset = build_dataset(
            plan.sources.train,
            num_samples=schedule.order_samples,  # as given: the order is planned with it
            seq_length=seq_length,
            seed=plan.seeds.run,
            name="train",
            cache_path=settings.data.data_cache_path,
        )
        screen.print(describe(dataset))
        begin, end = progress.consumed_samples, progress.consumed_samples + num_steps * batch_size
        batches = exits.enter_context(
            build_loader(
                dataset,
                objective,
                Share(context.dp, layout.micro_batch_size, end, begin),
                device=context.device,
                num_workers=settings.data.num_workers,
                packing=build_packing(settings.data),
                timeout_seconds=60 * settings.parallel.distributed_timeout_minutes,
            )
        )
        validator = Validator(plan, engine, probe=probe, screen=screen)

        # 3. The record: who the run is, what it did so far.
        folder = RunFolder(plan, start, progress, context, screen=screen)
        exits.push(folder.leave)
        flops = flops_per_token(plan.shape, objective)
        throughput = Throughput(batch_size, seq_length, flops, num_devices=context.world_size, device=context.device)
        interval = Interval(progress, screen, throughput, max_skipped=settings.optimizer.max_skipped_steps)

        # 4. Steps. First comes a validation that the run still owes, because it was stopped before or in it, or that the curve
        # of a branch begins with.
        is_last, reason = num_steps == 0, None
        is_owed = validator.is_due(progress.step, is_last or start.is_branching)
        if is_owed and progress.step not in folder.validated_steps:
            reason = validator.run(folder, stop)
        while not is_last and reason is None:
            result = engine.train_step(batches, consumed_samples=progress.consumed_samples, wishes=stop.wishes)
            progress.advance(samples=batch_size, tokens=batch_size * seq_length)
            is_last = progress.consumed_samples + batch_size > schedule.train_samples
            interval.add(result)
            screen.step()
            if is_last or progress.step % run.log_interval == 0:
                folder.write(interval.row(folder.position()))
            with interval.paused():
                reason = (
                    None
                    if is_last
                    else stop.hear(interval.numbers.wishes) or _exit_at(progress.step, run.exit_interval)
                )
                is_saved = folder.save(engine, interval, at_once=is_last or reason is not None)
                if reason is None and validator.is_due(progress.step, is_last):  # after the save: it may take long
                    reason = validator.run(folder, stop)
                    is_best = run.save_best and reason is None and folder.is_best
                    is_saved = is_saved or folder.save(engine, interval, at_once=is_best or reason is not None)

        # 5. The end, and why.
        folder.end(reason)
        engine.close()
    return reason


def _exit_at(step: int, interval: int | None) -> str | None:
    return "--exit-interval" if interval is not None and step % interval == 0 else None


def evaluate_checkpoint(
    plan: Plan, connection: Connection, *, observer: Observer | None = None, probe: Probe | None = None
) -> str | None:
    """Validate a checkpoint (``--skip-train``): a record of its own beside the run, which stays as it is.

    Returns:
        Why it was broken off, or None.
    """
    context, engine, start = _build(plan, connection, observer)
    screen = Screen(total_steps=1, first_step=0, enabled=context.is_first_rank)
    unique_tokens = start.manifest.get("unique_tokens", plan.sources.unique_tokens)
    progress = Progress.of(start.manifest, unique_tokens=unique_tokens)
    _introduce(plan, start, progress, screen, label=plan.objective.for_eval().label)
    validator = Validator(plan, engine, probe=probe, screen=screen)
    with StopRequest(context, connection, plan.settings.run) as stop:
        measured = validator.measure(stop)
        engine.close()
        if measured is None:
            screen.print(f"stopped by {stop.reason}; nothing was recorded")
            return stop.reason
    ((fields, sums),) = measured
    position = progress.position(unique_tokens=unique_tokens, compute=plan.compute)
    row = ValidRow(**position, **fields, best=False)
    screen.valid_line(row)
    if not context.is_first_rank:
        return None
    run = plan.settings.run
    record = {
        "format": 1,
        "run_id": plan.start.manifest.get("run_id"),
        "checkpoint": None if start.tag is None else start.tag.name,
        "objective": plan.settings.objective.objective,
        "parameters": plan.parameters,
        "protocol": {"eval_iters": run.eval_iters, "estimator": row.estimator, "num_mc": row.num_mc,
                     "num_samples": row.num_samples, "seq_length": plan.shape.seq_length,
                     "valid": plan.sources.fingerprints["valid"]},
        "result": asdict(row),
        "attempt": asdict(this_attempt(layout=plan.layout.sizes(), device=context.device)),
    }  # fmt: skip
    name = f"step{row.step}{row.suffix}_{row.label.split()[0].lower()}_{row.num_mc}x{row.num_samples}"
    path = write_evaluation(plan.run_dir, record, name=name)
    sums.with_halves(validator.halves).save(path.with_suffix(".npz"))
    screen.print(f"recorded in {path}")
    return None


def _build(plan: Plan, connection: Connection, observer: Observer | None) -> tuple[ParallelContext, Engine, Start]:
    """Lay out the processes, build the engine, load the checkpoint; what training and evaluation begin with.

    Raises:
        UserError: layout or checkpoint do not fit.
    """
    context = ParallelContext.create(
        tp_size=plan.layout.tp_size,
        pp_size=plan.layout.pp_size,
        device=local_device(connection.launch),
        timeout_minutes=plan.settings.parallel.distributed_timeout_minutes,
    )
    if context.is_first_rank and (warning := precision_warning(context.device.type, bf16=plan.settings.run.bf16)):
        say(warning)
    start = _verified(plan, context)
    settings = replace(plan.settings, run=replace(plan.settings.run, seed=plan.seeds.noise))  # of dropout
    engine = build_engine(settings, plan.objective, context, observer=observer)
    if start.tag is not None:
        size = plan.vocabulary.size
        reader = open_checkpoint(start.tag, plan.settings, context, vocab_size=size, weights=start.weights)
        engine.load(reader, with_optimizer=start.with_optimizer)
        if isinstance(reader, MaskedReader) and context.is_first_rank:
            say("the mask token starts as the mean of the token embeddings (the checkpoint never used one)")
    return context, engine, start


def _verified(plan: Plan, context: ParallelContext) -> Start:
    """The start of the plan with its files read: all ranks share the reading, and fall back together.

    Raises:
        UserError: nothing that can be used is there any more.
    """
    start = plan.start
    if start.tag is None or start.place is None:
        return start
    selection = agree_on_checkpoint(*start.place, context)
    require(selection.tag, f"{start.tag} is gone", "it was there when this run was planned", "start again")
    return replace(start, tag=selection.tag, manifest=selection.manifest, warning=selection.warning)


def _introduce(plan: Plan, start: Start, progress: Progress, screen: Screen, *, label: str) -> None:
    """Say what is about to happen: notes, model, layout, where it begins."""
    shape, layout, run = plan.shape, plan.layout, plan.settings.run
    if plan.notes:
        screen.print(f"without effect here: {'; '.join(plan.notes)}")
    precision = "bf16" if run.bf16 else "fp32"
    total = total_parameters(shape)["total"]
    screen.print(
        f"{plan.settings.objective.objective} ({label}) | model {plan.settings.model.model or 'custom'}: "
        f"{total:,} parameters ({plan.parameters:,} in 6ND), {shape.num_layers} layers, "
        f"hidden {shape.hidden_size}, sequence {shape.seq_length}, vocabulary {plan.vocabulary.size} "
        f"(padded {shape.padded_vocab_size})"
    )
    screen.print(
        f"tp {layout.tp_size}{_sequence_note(plan)} x pp {layout.pp_size} x dp {layout.dp_size}, "
        f"{layout.sharding}, {precision} | global batch {layout.global_batch_size} = micro {layout.micro_batch_size} x dp "
        f"{layout.dp_size} x {layout.num_micro_batches} accumulated | run directory {plan.run_dir}"
    )
    for line in given_settings(plan):
        screen.print(line)
    if start.warning is not None:
        screen.print(start.warning)
    for name, (before, now, _) in start.changed.items():
        screen.print(f"warning: {name} was {before}, is {now} from step {progress.step} on")
    if start.tag is None:
        screen.print("starting fresh" + (f": no checkpoint in {run.load} yet" if run.load else ""))
    else:
        weights = "averaged weights" if start.weights == AVERAGE else "weights"
        what = f"{weights} and optimizer" if start.with_optimizer else weights
        verb = "branching" if start.is_branching else "continuing" if start.is_continued else "starting"
        screen.print(f"loaded {what} of {start.tag}; {verb} at step {progress.step}")


def _sequence_note(plan: Plan) -> str:
    """What tensor-parallel ranks do with a sequence, where it was not the flag that decided otherwise."""
    parallel, tp, length = plan.settings.parallel, plan.layout.tp_size, plan.shape.seq_length
    if parallel.splits_sequence(length):
        return " (sequence parallel)"
    is_open = tp > 1 and parallel.sequence_parallel is None
    return f" (sequence whole on each: {tp} does not divide {length})" if is_open else ""
