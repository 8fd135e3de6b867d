"""Branches (``--branch-from RUN:TAG``): a run that leaves another one at a checkpoint, most often to decay its rate.

It takes over weights, optimizer state, noise and the place in the data, whose order stays that of the run it leaves, and
has a directory and a run id of its own. Imported only where one begins or goes on by that flag.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron.checkpoint.select import Selection, select
from megatron.config import config_from_dict
from megatron.config.schema import Config, OptimizerConfig
from megatron.errors import UserError, require
from megatron.runs.branches import add_branch
from megatron.runs.record import Branch, Link, RunRecord, branch_of, holds_run
from megatron.training.plan import Start
from megatron.training.schedule import learning_rate

ANY = ("latest", "best")  # tags that mean another checkpoint later


def placed(flags: Config, *, is_first: bool) -> tuple[Config, bool]:
    """Decide whether a branch begins or goes on.

    Args:
        flags: with ``--branch-from``.
        is_first: whether this process looks for what is in the run directory besides checkpoints.

    Returns:
        The flags with ``--load`` at the checkpoint that is to be loaded: the branch's own newest, else the one that it
        leaves; and whether it is the latter, so that the branch begins.

    Raises:
        UserError: the flags contradict each other, the directory holds another run, or there is nothing to leave.
    """
    run = flags.run
    folder, _, tag = str(run.branch_from).rpartition(":")
    given, parent, save = f"--branch-from {run.branch_from}", Path(folder), Path(str(run.save))
    require(
        folder and tag,
        f"{given} names no run and checkpoint",
        "a branch leaves a run at a checkpoint",
        "pass such as runs/stable:global_step1000",
    )
    require(
        parent.resolve() != save.resolve(),
        f"{given} with --save {save}",
        "a branch is a run of its own, and a run directory belongs to one run",
        "choose another --save; going back within a run is --load-tag",
    )
    require(
        run.load is None or Path(run.load).resolve() == save.resolve(),
        f"{given} with --load {run.load}",
        "a run begins at one place",
        "drop --load: the same command continues the branch",
    )
    own = Selection() if run.overwrite else select(save, run.load_tag, checksums=False)
    if own.tag is not None or (is_first and not run.overwrite and holds_run(save)):
        # Killed before its first checkpoint it begins again.
        record = RunRecord.read(save) if own.tag is None else None
        found = branch_of(own.manifest) if record is None else record.branch
        is_same = found is not None and Path(found.run) == parent.resolve() and tag in (found.tag, *ANY)
        require(
            is_same,
            f"{given}, and --save {save} holds "
            + (f"the branch of {found.run}:{found.tag}" if found else "a run that is no branch"),
            "a run directory belongs to one run",
            f"choose another --save, or --overwrite it, or pass --load {save} without --branch-from to continue it",
        )
    if own.tag is not None:
        return replace(flags, run=replace(run, load=run.save)), False
    require(parent.is_dir(), f"{given}: there is no folder {parent}", "a branch leaves a run", "correct the path")
    return replace(flags, run=replace(run, load=folder, load_tag=tag)), True


def begun(selection: Selection) -> Branch:
    """Where a branch leaves its run: at the selected checkpoint."""
    manifest, tag = selection.manifest, selection.tag
    assert tag is not None
    before = branch_of(manifest)
    return Branch(
        run=str(tag.resolve().parent),
        run_id=str(manifest.get("run_id") or ""),
        tag=tag.name,
        step=manifest["step"],
        samples=manifest["consumed_samples"],
        order_samples=manifest["config"]["run"]["train_samples"] if before is None else before.order_samples,
    )


def checked(start: Start, settings: Config) -> Start:
    """The start of a branch with what it changes, and its one checkpoint by name: `latest` may move meanwhile.

    Raises:
        UserError: the branch would have had other rates before it.
    """
    assert start.branch is not None
    changed = {name: [before, now] for name, (before, now, _) in start.changed.items()}
    branch = replace(start.branch, changed=changed)
    if not settings.run.change_settings:
        _check_rates(config_from_dict(start.manifest["config"]), settings.optimizer, branch)
    return replace(start, branch=branch, place=(Path(branch.run), branch.tag), changed={})


def _check_rates(before: Config, now: OptimizerConfig, branch: Branch) -> None:
    """The schedule of a branch gives the rates with which the run that it leaves was trained up to there: so the branch is what
    one run with this schedule would have been."""
    batch = before.run.global_batch_size or 1
    for samples in range(0, branch.samples, batch):
        was, would = learning_rate(samples, before.optimizer), learning_rate(samples, now)
        if was != would:
            raise UserError(
                f"--branch-from {branch.run}:{branch.tag}: step {samples // batch + 1} had the rate {was:g}, and would have "
                f"had {would:g} with the schedule of the branch",
                f"a branch changes the rate after the {branch.samples} samples that it takes over, not before",
                "give --lr and warm-up as the run had them, --lr-decay-style WSD and a decay that begins later; or "
                "leave the run at an earlier checkpoint; or pass --change-settings",
            )


def announce(record: RunRecord, run_dir: Path) -> list[str]:
    """Put the branch on the list of the run that it leaves, which may be training. Returns lines to print."""
    branch = record.branch
    assert branch is not None
    changes = [f"{name} {before} → {now}" for name, (before, now) in branch.changed.items()]
    lines = [
        f"a branch of {branch.run} from {branch.tag} on; its data order, planned for {branch.order_samples} samples"
    ]
    lines += [f"changed from there on: {', '.join(changes)}"] if changes else []
    own = Link(str(run_dir.resolve()), record.run_id, branch.tag, branch.step)
    reason = add_branch(Path(branch.run), own, parent_id=branch.run_id)
    return lines + ([f"warning: not on the list of branches of {branch.run}: {reason}"] if reason else [])
