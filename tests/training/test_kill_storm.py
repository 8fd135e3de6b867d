"""Runs that are killed at random moments, again and again, end as the run that was left alone: bit for bit.

Real programs with default loaders, dropout, saves and validations. Each kill takes a trainer, the whole job at once, or the
launcher alone (whose trainers then stop and save); the same command continues. The suite kills one process three times;
``STORM=1`` takes every layout. Counts are printed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from layouts import jobs

from training.started import LAYOUTS, REPO, Job, last_step, launch
from training.test_resume import STEPS, assert_same_run, options

IS_STORM = os.environ.get("STORM") == "1"
STORMS: dict[str, tuple[int, dict[str, Any]]] = {
    **LAYOUTS,
    "beside": (1, {"async_save": True}),
    "muon": (2, {"tp_size": 2, "optimizer": "muon", "ema_decay": 0.9}),
}
KILLS = {name: {"one": 40, "beside": 50}.get(name, 12) for name in STORMS} if IS_STORM else {"one": 3}
LIMIT = 120.0  # seconds until nothing of a killed job is left, on a busy machine


@dataclass
class Storm:
    """One layout under random kills.

    Attributes:
        command: what starts the run and continues it, given its folder.
        folder: for the runs.
        seconds: of the run that was left alone, from its first line to its end.
        counts: kills by victim and moment, and completed runs.
    """

    command: Callable[[Path], list[str]]
    folder: Path
    chance: random.Random
    seconds: float = 1.0
    counts: Counter[str] = field(default_factory=Counter)

    def straight(self) -> Path:
        """The run that is left alone."""
        run_dir = self.folder / "straight"
        job = Job(self.command(run_dir), run_dir=run_dir)
        try:
            job.wait_for_step(1)
            began = time.monotonic()
            ending = job.ending(seconds=LIMIT)
            self.seconds = time.monotonic() - began
            assert ending.status == 0, ending.output
        finally:
            job.close()
        return run_dir

    def attempt(self, run_dir: Path) -> bool:
        """Start the run and kill it, if it does not end before. Returns whether it reached its end."""
        before, job = last_step(run_dir), Job(self.command(run_dir), run_dir=run_dir)
        try:
            if self.chance.random() < 0.85:  # else: while it starts
                job.wait_until(lambda: job.process.poll() is not None or last_step(run_dir) != before)
                moment = self.chance.uniform(0, self.seconds * (STEPS - before) / STEPS)
            else:
                moment = self.chance.uniform(0, 5)
            deadline = time.monotonic() + moment
            while time.monotonic() < deadline and job.process.poll() is None:
                time.sleep(0.001)
            if job.process.poll() is not None:
                assert job.process.returncode == 0, job.output
                return True
            self.counts[f"killed: {self.kill(job)}"] += 1
            job.ending(seconds=LIMIT)
        finally:
            job.close()
        self.counts[f"moment: {moment_of(run_dir)}"] += 1
        return False

    def kill(self, job: Job) -> str:
        """SIGKILL somebody; returns whom."""
        trainers, everybody = job.trainers(), job.processes()
        victims = ("trainer", "job") if job.process.pid in trainers else ("trainer", "job", "launcher")
        # Whoever was taken least often so far; before there are trainers only everybody can be taken.
        fewest = min(self.counts[f"killed: {name}"] for name in victims)
        victim = self.chance.choice([name for name in victims if self.counts[f"killed: {name}"] == fewest])
        if not trainers or victim == "job":
            victim, targets = "job", everybody
        else:
            targets = [self.chance.choice(trainers)] if victim == "trainer" else [job.process.pid]
        for pid in targets:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has just ended
                continue
        return victim


def moment_of(run_dir: Path) -> str:
    """What the run was at when it was killed, as far as its folder shows."""
    if list(run_dir.glob("*.saving")):
        return "in a save"
    if not last_step(run_dir):
        return "before its first line"
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    return "in a line" if not metrics.endswith(b"\n") else "between"


@pytest.fixture
def storm(request: pytest.FixtureRequest, token_files: Path, tmp_path: Path) -> Iterator[Storm]:
    """The storm over the layout that the test names."""
    size, flags = STORMS[request.param]
    launcher = launch("python" if size == 1 else "torchrun", size)

    def command(run_dir: Path) -> list[str]:
        changes: dict[str, Any] = {"load": run_dir, "num_workers": None, **flags}
        return [
            *launcher,
            str(REPO / "pretrain_mdm.py"),
            *jobs.flags(token_files, run_dir, **options(token_files, **changes)),
        ]

    found = Storm(command, tmp_path, random.Random(f"20261125 {request.param}"))
    yield found
    print(f"{request.param}: {dict(sorted(found.counts.items()))}", file=sys.stderr)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("storm", "kills"), list(KILLS.items()), indirect=["storm"])
def test_killed_at_random_a_run_ends_as_if_left_alone(storm: Storm, kills: int) -> None:
    reference, run_dir = storm.straight(), storm.folder / "run"
    while sum(number for name, number in storm.counts.items() if name.startswith("killed")) < kills:
        if storm.attempt(run_dir):
            compare(storm, run_dir, reference)
            shutil.rmtree(run_dir)
    job = Job(storm.command(run_dir), run_dir=run_dir)
    ending = job.ending(seconds=LIMIT)
    job.close()
    assert ending.status == 0, ending.output
    compare(storm, run_dir, reference)


def compare(storm: Storm, run_dir: Path, reference: Path) -> None:
    """The run has ended: equal to the one left alone, and no leftover of a kill is there."""
    assert_same_run(run_dir, reference)
    assert not [*run_dir.glob("*.saving"), *run_dir.glob("*.replaced"), *run_dir.rglob("*.tmp")]
    storm.counts["ended bit-equal"] += 1
