"""One training run, from connected processes to its last line, in one function."""

from __future__ import annotations

from contextlib import ExitStack

from megatron.data.dataset import build_dataset, describe
from megatron.data.loader import build_loader, build_packing
from megatron.model.arithmetic import model_flops_per_token
from megatron.parallel.connection import Connection
from megatron.training.folder import RunFolder
from megatron.training.interval import Interval
from megatron.training.observer import Observer
from megatron.training.plan import Plan
from megatron.training.progress import Progress
from megatron.training.reporting import Screen, Throughput
from megatron.training.setup import build, introduce
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
        context, engine, start = build(plan, connection, observer)
        stop = exits.enter_context(
            StopRequest(
                context, minutes=run.exit_duration_in_mins, switch=run.kill_switch_file, launch=connection.launch
            )
        )
        progress = Progress()
        if start.is_continued:
            progress = Progress.of(start.manifest, unique_tokens=plan.sources.unique_tokens)
        num_steps = (schedule.train_samples - progress.consumed_samples) // batch_size
        screen = Screen(total_steps=progress.step + num_steps, first_step=progress.step, enabled=context.is_first_rank)
        exits.callback(screen.close)
        introduce(plan, start, progress, screen, label=objective.label)

        # 2. Training data from the sample at which the run stands, and what validates it.
        dataset = build_dataset(
            plan.sources.train,
            num_samples=schedule.train_samples,  # as given: the order is planned with it
            seq_length=seq_length,
            seed=plan.seeds.run,
            name="train",
            cache_path=settings.data.data_cache_path,
        )
        screen.print(describe(dataset))
        batches = exits.enter_context(
            build_loader(
                dataset,
                objective,
                context,
                micro_batch_size=layout.micro_batch_size,
                first_sample=progress.consumed_samples,
                last_sample=progress.consumed_samples + num_steps * batch_size,
                num_workers=settings.data.num_workers,
                packing=build_packing(settings.data),
                timeout_seconds=60 * settings.parallel.distributed_timeout_minutes,
            )
        )
        validator = Validator(plan, engine, probe=probe, screen=screen)

        # 3. The record: who the run is, what it did so far.
        folder = RunFolder(plan, start, progress, context, screen=screen)
        exits.callback(folder.close)
        flops = model_flops_per_token(plan.shape, mask=objective.attention_mask, loss_fraction=objective.loss_fraction)
        throughput = Throughput(
            batch_size=batch_size,
            seq_length=seq_length,
            flops_per_token=flops,
            num_devices=context.world_size,
            device=context.device,
        )
        interval = Interval(progress, screen, throughput, max_skipped=settings.optimizer.max_skipped_steps)

        # 4. Steps. First comes a validation that the run still owes, because it was stopped before or in it.
        is_last, reason = num_steps == 0, None
        if validator.is_due(progress.step, is_last) and progress.step not in folder.validated_steps:
            reason = validator.run(folder, stop)
        while not is_last and reason is None:
            result = engine.train_step(batches, consumed_samples=progress.consumed_samples)
            progress.advance(samples=batch_size, tokens=batch_size * seq_length)
            is_last = progress.consumed_samples + batch_size > schedule.train_samples
            interval.add(result)
            screen.step()
            if is_last or progress.step % run.log_interval == 0:
                folder.write(interval.row(folder.position()))
            with interval.paused():
                reason = None if is_last else stop.poll()
                is_saved = folder.save(engine, interval, at_once=is_last or reason is not None)
                if reason is None and validator.is_due(progress.step, is_last):  # after the save: it may take long
                    reason = validator.run(folder, stop)
                    is_saved = is_saved or folder.save(engine, interval, at_once=reason is not None)

        # 5. The end, and why.
        folder.end(reason)
    return reason
