"""Entry point: command line → plan → run. Every user mistake ends here as one message."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.cli import LAYERED, flags_in
from megatron.config.validate import check_packages
from megatron.errors import UserError, require
from megatron.files import lock_run
from megatron.objectives import parse
from megatron.parallel.launch import Launch, complain
from megatron.runs.record import clear_run, holds_run
from megatron.screen import say

if TYPE_CHECKING:
    from megatron.config.schema import Config
    from megatron.training.plan import Plan
    from megatron.training.step import Observer
    from megatron.training.validation import Probe


def main(
    objective: str,
    argv: Sequence[str] | None = None,
    *,
    observer: Observer | None = None,
    probe: Probe | None = None,
    raise_errors: bool = False,
) -> int:
    """Run a training program.

    Args:
        objective: objective when ``--objective`` is absent ("ar" or "mdm").
        argv: arguments; default: those of the process.
        observer: watches the run.
        probe: what ``--gap-task`` measures with every validation.
        raise_errors: raise what a single process would print, for callers from Python.

    Returns:
        Exit status: 0 at the end of the run, 75 stopped before it, 1 the run failed, 2 wrong input, 130 interrupted.
        A failed process of several ends here, at once.
    """
    launch = Launch()
    try:
        launch = Launch.from_environment()
        words = sys.argv[1:] if argv is None else list(argv)
        if "--dump-config" in flags_in(words):
            return import_module("megatron.training.configuration").dump(objective, words, launch)
        origins: dict[str, str] = {}
        flags = _flags(objective, words, launch, origins)
        require(
            flags.run.gap_task is None or probe is not None,
            "--gap-task in a program that measures none",
            "it needs the evaluation package",
            "start pretrain_gpt.py or pretrain_mdm.py",
        )
        with ExitStack() as exits:
            is_writer = launch.is_first_rank and not flags.run.skip_train
            # A folder that is there is taken before anybody looks for checkpoints: a kill may have left a half-done rename.
            # And before torch is imported: who comes second hears it at once.
            is_early = is_writer and flags.run.save is not None and Path(flags.run.save).is_dir()
            if is_early:
                _take(Path(str(flags.run.save)), exits)
            plan = _plan(flags, launch, words, origins)
            exits.enter_context(_kernels(plan))
            if is_writer and not is_early:
                _take(plan.run_dir, exits)
                # Another process may have begun, and ended, while this one read its data.
                is_free = flags.run.overwrite or not holds_run(plan.run_dir)
                given = f"another process began a run in {plan.run_dir} meanwhile"
                require(is_free, given, "a run directory belongs to one run", "start again")
            if is_writer and flags.run.overwrite:
                clear_run(plan.run_dir)
            return _run(plan, launch, observer, probe)
    except UserError as error:
        if raise_errors:
            raise
        complain(f"error: {error}")
        return error.exit_status


def _flags(objective: str, words: Sequence[str], launch: Launch, origins: dict[str, str]) -> Config:
    """The flags; says what they mean where that is not plain, and fills ``origins``."""
    notes: list[str] = []
    flags = parse(
        words,
        objective=objective,
        world_size=launch.world_size,
        notes=notes,
        origins=origins,
        recorded=lambda *place: import_module("megatron.training.configuration").recorded(*place),
    )
    check_packages(flags)
    for note in notes if launch.is_first_rank else []:
        say(note)
    return flags


def _plan(flags: Config, launch: Launch, words: Sequence[str], origins: dict[str, str]) -> Plan:
    from megatron.training.resolve import resolve

    run_name = f"{flags.objective.objective}_{datetime.now():%Y%m%d_%H%M%S}"
    plan = resolve(flags, launch, run_name=run_name, origins=origins)
    if LAYERED & flags_in(words):
        import_module("megatron.training.configuration").check_contents(plan)
    return plan


def _kernels(plan: Plan) -> AbstractContextManager[None]:
    """The kernels of attention that were asked for, where they can be had and would have an effect."""
    from megatron.model.kernels import attention_kernels, check_flash
    from megatron.model.mask import within_segments

    mask, backend = plan.objective.attention_mask, plan.settings.model.attention_backend
    mask = within_segments(mask) if plan.settings.data.reset_attention_mask else mask
    check_flash(backend, mask, head_size=plan.shape.kv_channels)
    return attention_kernels(backend)


def _take(run_dir: Path, exits: ExitStack) -> None:
    """Take the run directory, for this process alone, and clear away what killed ones left."""
    lock, is_held = lock_run(run_dir)
    exits.enter_context(lock)
    from megatron.checkpoint.upkeep import sweep_leftovers

    if not is_held:
        say(f"warning: {run_dir} is on a file system without locks: see to it that no other run trains into it")
    for line in sweep_leftovers(run_dir):
        say(line)


def _run(plan: Plan, launch: Launch, observer: Observer | None, probe: Probe | None) -> int:
    # DeepSpeed takes seconds to import; wrong flags and a folder in use are reported before.
    from megatron.data.batches import loss_of
    from megatron.parallel.connection import Connection, connect, end_process, show
    from megatron.training.stop import STOPPED_STATUS
    from megatron.training.train import evaluate_checkpoint, train

    connection, status = Connection(launch), 1
    failed: BaseException | None = None
    try:
        connection = connect(launch, timeout_minutes=plan.settings.parallel.distributed_timeout_minutes)
        connection.beat()
        if plan.settings.run.skip_train:
            reason = evaluate_checkpoint(plan, connection, observer=observer, probe=probe)
        else:
            reason = train(plan, connection, observer=observer, probe=probe)
        status = 0 if reason is None else STOPPED_STATUS
    except KeyboardInterrupt as error:
        status, failed = 130, error  # before the first step, or Ctrl-C twice: nothing is saved
    except BaseException as error:
        failed = connection.peer_failure(error) or loss_of(error) or error
        if isinstance(failed, UserError) and launch.world_size > 1:
            complain(f"error: {failed}", is_speaker=True)
            status = failed.exit_status
        elif not connection.is_shared:
            if failed is error:
                raise
            raise failed from error
        else:
            show(failed, rank=launch.rank)
    connection.leave(failed)
    if failed is not None and connection.is_shared:
        end_process(status)
    return status
