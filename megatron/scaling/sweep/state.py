"""Where the runs of a sweep stand: whose directory it is, whether somebody trains there, and what came of it.

Each run owns one directory. ``sweep.json`` in it holds the flags it was started with, so that a changed YAML file can
never continue another run's results; a lock on ``sweep.lock`` is held by the runner *and inherited by the training
process*, so that it is free exactly when nothing trains there, also after a kill -9 of the runner.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megatron.checkpoint.files import LATEST, name_in
from megatron.errors import UserError
from megatron.files import make_folder, replace_file
from megatron.runs.reading import load_run
from megatron.runs.record import read_records
from megatron.runs.run import Run
from megatron.scaling.sweep.sweep_run import SweepRun

OWNER = "sweep.json"
STOPPED = 75  # exit status of a trainer that was stopped and saved


def state(run: SweepRun) -> str:
    """ "finished", "running", "failed" (its last attempt ended with an error), "interrupted" or "waiting"."""
    if is_locked(run):
        return "running"
    check_owner(run)
    attempts = read_attempts(run)
    if not attempts:
        return "waiting"
    if is_finished(run):
        return "finished"
    return "interrupted" if attempts[-1]["returncode"] in (None, 0, STOPPED) else "failed"


def is_finished(run: SweepRun) -> bool:
    """Whether the results are complete: the last step is logged and validated, and the program ended well or left the
    checkpoint of that step."""
    result = read_result(run)
    if result is None or not result.is_finished:
        return False
    last = max((int(row["step"]) for row in result.train), default=0)
    if any(flag.startswith("valid-data-path") for flag in run.flags) and (
        not result.valid or result.valid[-1].step < last
    ):
        return False
    attempts = read_attempts(run)
    ended_well = bool(attempts) and attempts[-1]["returncode"] == 0
    return ended_well or name_in(run.folder / LATEST) == f"global_step{last}"


def read_result(run: SweepRun) -> Run | None:
    """The run directory, or None before training wrote it."""
    return load_run(run.folder) if (run.folder / "run.json").exists() else None


def check_owner(run: SweepRun) -> None:
    """Refuse a directory that was started with other flags.

    Raises:
        UserError: what differs.
    """
    file = run.folder / OWNER
    if not file.exists():
        return
    try:
        stored = dict(json.loads(file.read_bytes())["flags"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({error})",
            "it says with which flags the run began",
            "delete that directory, or restore the file",
        ) from None
    wanted = _plain(run)
    if stored != wanted:
        names = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
        changes = ", ".join(f"{key}: {stored.get(key)!r} before, {wanted.get(key)!r} now" for key in names)
        raise UserError(
            f"{run.folder} was started with other flags ({changes})",
            "one directory holds one configuration",
            "restore the flags, change output, or delete that directory",
        )


def same_run(run: SweepRun) -> SweepRun:
    """The run of the same configuration that its sweep's folder holds already, under whatever name; else the run itself."""
    if (run.folder / OWNER).exists():
        return run
    for file in sorted(run.folder.parent.glob(f"*/{OWNER}")):
        try:
            if json.loads(file.read_bytes())["flags"] == _plain(run):
                return replace(run, name=file.parent.name, folder=file.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no file of ours
    return run


def claim(run: SweepRun) -> None:
    """Write down whose directory this is; a directory that holds a run of unknown origin is refused."""
    check_owner(run)
    make_folder(run.folder)
    file = run.folder / OWNER
    if file.exists():
        return
    if (run.folder / "run.json").exists():
        raise UserError(
            f"{run.folder} holds a run that no sweep started",
            "one directory holds one configuration",
            "change output, or delete that directory",
        )
    replace_file(file, json.dumps({"format": 1, "flags": _plain(run)}, indent=1))


@contextmanager
def lock(run: SweepRun) -> Iterator[int | None]:
    """The file descriptor of the run's lock, or None where somebody else holds it."""
    make_folder(run.folder)
    descriptor = os.open(run.folder / "sweep.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)  # a child that inherited it keeps the lock


def is_locked(run: SweepRun) -> bool:
    """Whether somebody else runs it now."""
    if not (run.folder / "sweep.lock").exists():
        return False
    with lock(run) as descriptor:
        return descriptor is None


def read_attempts(run: SweepRun) -> list[dict[str, Any]]:
    """Starts (``returncode`` None) and ends of training programs, oldest first; a line torn by a kill is left out."""
    return read_records(run.folder / "attempts.jsonl")


def _plain(run: SweepRun) -> dict[str, Any]:
    return json.loads(json.dumps({**run.flags, "objective": run.objective}))
