"""The table "How a run ends" of docs/training.md, row by row: status, what is saved, how long it takes, and nobody left.

Real programs under real launchers with default settings. The suite runs each row once, launchers and layouts rotated over the
rows; ``STORM=1`` runs every row under every launcher and layout that it concerns, and prints the seconds measured. Ways to
end that ``test_exits.py`` shows are here in the storm only.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from training.started import LAYOUTS, REPO, Ending, Job, arguments, last_step, launch, saved_step

IS_STORM = os.environ.get("STORM") == "1"
STOPPED, INTERVAL = 75, 5
LAUNCHERS = ("python", "plain torchrun", "torchrun", "deepspeed")
EVERYWHERE = tuple(
    (launcher, layout)
    for launcher in LAUNCHERS
    for layout, (size, _) in LAYOUTS.items()
    if (launcher == "python") == (size == 1)
)
SHARED = tuple(place for place in EVERYWHERE if place[0] != "python")
ALONE = (("python", "one"),)


def signalled(rank: int | None, number: int) -> Callable[[Job], None]:
    """A signal to the trainer of a rank, or to the process that the user started (None)."""

    def act(job: Job) -> None:
        os.kill(job.process.pid if rank is None else job.trainers()[rank], number)

    return act


def limited(what: int, value: int | Callable[[Job], int]) -> Callable[[Job], None]:
    """A limit of the system on the first trainer, from now on."""

    def act(job: Job) -> None:
        number = value(job) if callable(value) else value
        resource.prlimit(job.trainers()[0], what, (number, number))

    return act


def twice(job: Job) -> None:
    """Ctrl-C twice."""
    pid = job.trainers()[0]
    for _ in range(2):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.002)  # two that are pending at once are one


def switched(job: Job) -> None:
    """The kill-switch file."""
    (job.run_dir.parent / "stop").touch()


@dataclass(frozen=True)
class Row:
    """A way to end.

    Attributes:
        act: the event; None: the run comes to it by itself.
        status: of a trainer alone, and of ``tools/_torchrun.py``. torchrun and deepspeed turn what is not 0 into other numbers.
        saves: "all" (to the last step made), "interval" (the last checkpoint that was due), or "".
        says: what the output must hold.
        seconds: limit from the event until nothing is left, on a busy machine.
        after: step that is in the metrics before the event.
        fast: launcher and layout in the suite; None: test_exits.py shows it.
        places: launchers and layouts in the storm.
        changes: of the flags.
        program: which one is started.
        environment: of the program.
        whose: "trainer" when its status reaches the user; "launcher" when a signal ended the launcher itself.
    """

    status: int
    saves: str
    says: str = ""
    act: Callable[[Job], None] | None = None
    seconds: float = 30.0
    after: int = 7
    fast: tuple[str, str] | None = None
    places: tuple[tuple[str, str], ...] = EVERYWHERE
    changes: dict[str, Any] = field(default_factory=dict)
    program: str = "pretrain_mdm.py"
    environment: dict[str, str] = field(default_factory=dict)
    whose: str = "trainer"


ROWS = {
    "end": Row(0, "all", "done: 9 steps", changes={"train_iters": 9}, fast=("deepspeed", "pp2")),
    "time limit": Row(STOPPED, "all", "stopped by --exit-duration-in-mins", changes={"exit_duration_in_mins": 0.02}),
    "signal to a trainer": Row(STOPPED, "all", "stopped by", signalled(-1, signal.SIGUSR1)),
    "Ctrl-C twice": Row(130, "interval", act=twice, places=ALONE, fast=("python", "one")),
    "kill-switch file": Row(STOPPED, "all", "stopped by the kill-switch", switched, changes={"kill_switch_file": "stop"}),
    "error of a trainer": Row(
        1, "interval", "KeyError: 'token 7'", program="tests/training/programs/troubled_program.py",
        environment={"TROUBLE_STEP": "9"},
        fast=("python", "one"),
    ),
    "trainer killed": Row(-signal.SIGKILL, "interval", "", signalled(-1, signal.SIGKILL)),
    "SIGTERM to the launcher": Row(
        -signal.SIGTERM, "all", "stopped by", signalled(None, signal.SIGTERM), whose="launcher", places=SHARED,
    ),
    "SIGUSR1 to the launcher": Row(
        -signal.SIGUSR1, "all", "stopped by the end of its launcher", signalled(None, signal.SIGUSR1), whose="launcher",
        places=SHARED, fast=("plain torchrun", "tp2"),
    ),
    "launcher killed": Row(
        -signal.SIGKILL, "all", "stopped by the end of its launcher", signalled(None, signal.SIGKILL), whose="launcher",
        places=SHARED, fast=("deepspeed", "dp2"),
    ),
    "disk full at the metrics": Row(
        1, "interval", "metrics.jsonl could not be written",
        limited(resource.RLIMIT_FSIZE, lambda job: (job.run_dir / "metrics.jsonl").stat().st_size),
        places=(*ALONE, ("plain torchrun", "dp2")), changes={"save_interval": 30}, after=32, fast=("python", "one"),
    ),
    "disk full at a checkpoint": Row(
        1, "interval", "could not be written", limited(resource.RLIMIT_FSIZE, 200_000),
        places=(*ALONE, ("plain torchrun", "dp2")), fast=("plain torchrun", "dp2"),
    ),
    "gradients that are not finite": Row(
        1, "interval", "had a NaN or infinite gradient", places=(*ALONE, ("plain torchrun", "pp2"), ("deepspeed", "zero3")),
        changes={"lr": 1000, "clip_grad": 0, "max_skipped_steps": 3, "no_disable_bias_linear": True}, fast=("python", "one"),
    ),
    "too few open files": Row(
        1, "", "raise ulimit -n", limited(resource.RLIMIT_NOFILE, 24), places=ALONE, fast=("python", "one")
    ),
}  # fmt: skip
CASES = [
    pytest.param(name, *place, id=f"{name}, {place[0]}, {place[1]}")
    for name, row in ROWS.items()
    for place in (row.places if IS_STORM else [row.fast] if row.fast else [])
]


@pytest.fixture
def begin(token_files: Path, tmp_path: Path) -> Iterator[Callable[[Row, str, str], Job]]:
    """Start the job of a row; what is left of it after the test is killed."""
    started: list[Job] = []

    def start(row: Row, launcher: str, layout: str) -> Job:
        changes = {name: tmp_path / "stop" if value == "stop" else value for name, value in row.changes.items()}
        command = launch(launcher, LAYOUTS[layout][0])
        argv = arguments(token_files, tmp_path / "run", layout, **{"save_interval": INTERVAL, **changes})
        started.append(
            Job([*command, str(REPO / row.program), *argv], run_dir=tmp_path / "run", environment=row.environment)
        )
        return started[-1]

    yield start
    for job in started:
        job.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "launcher", "layout"), CASES)
def test_row(name: str, launcher: str, layout: str, begin: Callable[[Row, str, str], Job]) -> None:
    row = ROWS[name]
    job = begin(row, launcher, layout)
    ending = end_of(job, row)
    print(f"{name}, {launcher}, {layout}: status {ending.status}, {ending.seconds:.1f} s", file=sys.stderr)
    assert row.says in ending.output
    own = ending.output.split("Original Traceback")[0]  # a loader process prints its own
    assert (
        own.count("Traceback") <= (1 if name in ("error of a trainer", "too few open files") else 0)
        or launcher == "plain torchrun"
    )
    assert_status(ending, row, launcher)
    assert_saved(job, row)


def end_of(job: Job, row: Row) -> Ending:
    """Let the event happen, and wait until nothing is left. Without one the time counts from the last line of the metrics."""
    if row.act is not None:
        job.wait_for_step(row.after)
        since = time.monotonic()
        row.act(job)
        return job.ending(seconds=row.seconds, since=since)
    step, since = -1, time.monotonic()
    while job.process.poll() is None and time.monotonic() - since < 90:
        if step != (step := last_step(job.run_dir)):
            since = time.monotonic()
        time.sleep(0.01)
    return job.ending(seconds=row.seconds + 90, since=since)


def assert_status(ending: Ending, row: Row, launcher: str) -> None:
    """What the user's shell sees."""
    if row.status == 0 or launcher == "python":
        assert ending.status == row.status, ending.output[-3000:]
    elif row.whose == "launcher":
        assert ending.status in (row.status, 128 - row.status, 1), ending.output[-3000:]
    elif launcher == "deepspeed" and row.status > 0:
        assert ending.status == row.status, ending.output[-3000:]
    elif launcher == "torchrun":
        expected = row.status if row.status > 0 else 128 - row.status
        assert ending.status in (expected, 1 if row.status < 0 else expected), ending.output[-3000:]
    else:
        assert ending.status != 0, ending.output[-3000:]


def assert_saved(job: Job, row: Row) -> None:
    """The newest checkpoint is whole, and of the step that the row promises."""
    saved, last = saved_step(job.run_dir), last_step(job.run_dir)
    if row.saves == "all":
        assert saved == last
    elif row.saves == "interval":
        interval = row.changes.get("save_interval", INTERVAL)
        due = math.floor(last / interval) * interval
        heard = [last] if row.status == 130 else []  # the second Ctrl-C may find the checkpoint of the first made
        assert saved in (due, due - interval, *heard, *([None] if last < 2 * interval else [])), (saved, last)
