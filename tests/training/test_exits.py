"""The table "How a run ends" of docs/training.md, row by row: status, what is saved, how long it takes, and nobody left.

Real programs under real launchers with default settings. The suite rotates launchers and layouts over the rows; ``STORM=1`` runs
every row under every launcher and layout that it concerns. Both print the seconds measured.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron.runs.record import STOPPED as STOPPED_RECORD
from megatron.runs.record import RunRecord
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


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal was sent to a process, which has not taken it yet."""
    masks = re.findall(r"(?:SigPnd|ShdPnd):\s+([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def twice(job: Job) -> None:
    """Ctrl-C twice."""
    pid = job.trainers()[0]
    os.kill(pid, signal.SIGINT)
    while is_pending(pid, signal.SIGINT):  # two that are pending at once are one
        time.sleep(0.001)
    time.sleep(0.005)  # Python looks between two of its instructions
    os.kill(pid, signal.SIGINT)


def hung_up(job: Job) -> None:
    """SIGHUP to every process of the job, as a closed terminal sends it."""
    for pid in job.processes():
        os.kill(pid, signal.SIGHUP)


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
        seconds: limit from the event until nothing is left; as long as the start took, where that was longer.
        after: step that is in the metrics before the event.
        fast: launchers and layouts in the suite.
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
    fast: tuple[tuple[str, str], ...] = ALONE
    places: tuple[tuple[str, str], ...] = EVERYWHERE
    changes: dict[str, Any] = field(default_factory=dict)
    program: str = "pretrain_mdm.py"
    environment: dict[str, str] = field(default_factory=dict)
    whose: str = "trainer"


ROWS = {
    "end": Row(
        0, "all", "done: 9 steps", changes={"train_iters": 9}, environment={"PYTHONPROFILEIMPORTTIME": "1"},
        fast=(*ALONE, ("deepspeed", "pp2"), ("torchrun", "zero3")),
    ),
    "time limit": Row(
        STOPPED, "all", "stopped by --exit-duration-in-mins", changes={"exit_duration_in_mins": 0.02},
        fast=(("torchrun", "dp2"),),
    ),
    "signal to a trainer": Row(
        STOPPED, "all", "stopped by", signalled(-1, signal.SIGUSR1), fast=(*ALONE, ("torchrun", "pp2")),
    ),
    "terminal closed": Row(STOPPED, "all", "stopped by SIGHUP", hung_up, places=ALONE),
    "Ctrl-C twice": Row(130, "interval", act=twice, places=ALONE),
    "kill-switch file": Row(
        STOPPED, "all", "stopped by the kill-switch", switched, changes={"kill_switch_file": "stop"},
        fast=(("torchrun", "pp2"),),
    ),
    "error of a trainer": Row(
        1, "interval", "KeyError: 'token 7'", program="tests/training/programs/troubled_program.py",
        environment={"TROUBLE_STEP": "9"}, fast=(*ALONE, ("torchrun", "pp2"), ("deepspeed", "dp2")),
    ),
    # In the suite: layouts/test_failures.py.
    "trainer killed": Row(-signal.SIGKILL, "interval", "", signalled(-1, signal.SIGKILL), fast=()),
    "SIGTERM to the launcher": Row(
        -signal.SIGTERM, "all", "stopped by", signalled(None, signal.SIGTERM), whose="launcher", places=SHARED,
        fast=(("torchrun", "dp2"),),
    ),
    "SIGUSR1 to the launcher": Row(
        -signal.SIGUSR1, "all", "stopped by the end of its launcher", signalled(None, signal.SIGUSR1), whose="launcher",
        places=tuple(place for place in SHARED if place[0] != "torchrun"), fast=(("plain torchrun", "tp2"),),
    ),
    "SIGUSR1 to our launcher": Row(  # which passes it on
        STOPPED, "all", "stopped by SIGUSR1", signalled(None, signal.SIGUSR1),
        places=tuple(place for place in SHARED if place[0] == "torchrun"), fast=(("torchrun", "zero3"),),
    ),
    "launcher killed": Row(
        -signal.SIGKILL, "all", "stopped by the end of its launcher", signalled(None, signal.SIGKILL), whose="launcher",
        places=SHARED, fast=(("deepspeed", "dp2"),),
    ),
    "disk full at the metrics": Row(
        1, "interval", "metrics.jsonl could not be written",
        limited(resource.RLIMIT_FSIZE, lambda job: (job.run_dir / "metrics.jsonl").stat().st_size),
        places=(*ALONE, ("plain torchrun", "dp2")), changes={"save_interval": 30}, after=32,
    ),
    "disk full at a checkpoint": Row(
        1, "interval", "could not be written", limited(resource.RLIMIT_FSIZE, 200_000),
        places=(*ALONE, ("plain torchrun", "dp2")), fast=(("plain torchrun", "dp2"),),
    ),
    "gradients that are not finite": Row(
        1, "interval", "had a NaN or infinite gradient", places=(*ALONE, ("plain torchrun", "pp2"), ("deepspeed", "zero3")),
        changes={"lr": 1000, "clip_grad": 0, "max_skipped_steps": 3, "no_disable_bias_linear": True},
    ),
    "too few open files": Row(
        1, "", "raise ulimit -n", limited(resource.RLIMIT_NOFILE, 24), places=ALONE,
    ),
}  # fmt: skip
CASES = [
    pytest.param(name, *place, id=f"{name}, {place[0]}, {place[1]}")
    for name, row in ROWS.items()
    for place in (row.places if IS_STORM else row.fast)
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "launcher", "layout"), CASES)
def test_row(name: str, launcher: str, layout: str, begin: Callable[[Row, str, str], Job]) -> None:
    row = ROWS[name]
    job = begin(row, launcher, layout)
    ending = end_of(job, row)
    print(f"{name}, {launcher}, {layout}: status {ending.status}, {ending.seconds:.1f} s", file=sys.stderr)
    assert row.says in ending.output
    if name == "error of a trainer" and launcher == "torchrun":  # the first error is the last line
        assert ending.output.rstrip().splitlines()[-1].startswith(f"error: rank 1 failed: {row.says}"), ending.output
    if "PYTHONPROFILEIMPORTTIME" in row.environment:  # a second of every start, for a compiler that nothing asks for
        assert "torch._dynamo" not in ending.output or layout in ("tp2", "zero3", "fsdp2")  # which guard against it
        assert "torch._inductor.compile_fx" not in ending.output
        # Each engine needs its own package alone.
        assert ("deepspeed.runtime.engine" in ending.output) == (layout != "fsdp2" or launcher == "deepspeed")
    own = ending.output.split("Original Traceback")[0]  # a loader process prints its own
    assert (
        own.count("Traceback") <= (1 if name in ("error of a trainer", "too few open files") else 0)
        or launcher == "plain torchrun"
    )
    assert_status(ending, row, launcher)
    assert_saved(job, row)
    if row.act is not twice:  # the second may come before or after
        assert_recorded(job, row.says.startswith("stopped by"))


def end_of(job: Job, row: Row) -> Ending:
    """Let the event happen, and wait until nothing is left. Without one the time counts from the last line of the metrics."""
    job.wait_for_step(row.after if row.act else 1)
    since = time.monotonic()
    limit = max(
        row.seconds, since - job.started
    )  # what slows the end down has slowed the start down, which is more work
    if row.act is not None:
        row.act(job)
        return job.ending(seconds=limit, since=since)
    step = -1
    while job.process.poll() is None and time.monotonic() - since < 3 * limit:
        if step != (step := last_step(job.run_dir)):
            since = time.monotonic()
        time.sleep(0.05)
    return job.ending(seconds=4 * limit, since=since)


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


def assert_recorded(job: Job, is_stopped: bool) -> None:
    """run.json is whole, and stopped.json is there exactly for a run that was stopped, with the reason that was printed."""
    assert RunRecord.read(job.run_dir) is not None
    path = job.run_dir / STOPPED_RECORD
    assert path.exists() == is_stopped
    if is_stopped:
        assert f"stopped by {json.loads(path.read_text())['reason']}" in job.output


def test_a_stop_does_not_wait_for_the_validation(token_files: Path, begin: Callable[[Row, str, str], Job]) -> None:
    """What is due with a long validation is saved before it, and a stop is heard between two of its batches."""
    validation = {"valid_data_path": token_files / "valid", "eval_interval": 5, "eval_iters": "full", "num_mc": 1000}
    job = begin(Row(STOPPED, "all", changes=validation), "torchrun", "dp2")
    job.wait_until(lambda: "global_step5" in job.output)
    time.sleep(0.5)
    job.process.send_signal(signal.SIGTERM)
    assert job.ending(seconds=30).status == 128 + signal.SIGTERM, job.output
    assert last_step(job.run_dir) == saved_step(job.run_dir) == 5
    assert_recorded(job, is_stopped=True)


def run_script(script: str, tokens: Path, run_dir: Path, **changes: object) -> Ending:
    """A line of shell in which "$@" is the program with its flags."""
    words = [sys.executable, str(REPO / "pretrain_mdm.py"), *arguments(tokens, run_dir, **changes)]
    job = Job(["bash", "-c", f"set -o pipefail; {script}", "line", *words], run_dir=run_dir)
    try:
        return job.ending(seconds=90)
    finally:
        job.close()


def test_under_nohup_a_closed_terminal_is_no_end(token_files: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(REPO / "pretrain_mdm.py"), *arguments(token_files, tmp_path / "run")]
    job = Job(["nohup", *words], run_dir=tmp_path / "run")
    try:
        job.wait_for_step(3)
        step = last_step(job.run_dir)
        hung_up(job)
        job.wait_for_step(step + 3)
        job.process.send_signal(signal.SIGTERM)
        ending = job.ending(seconds=30)
        assert ending.status == STOPPED and "stopped by SIGTERM" in ending.output, ending.output
    finally:
        job.close()


@pytest.mark.parametrize("script", ['"$@" | head -n 3', '"$@" > /dev/full 2>&1', '"$@" >&-'])
def test_a_progress_line_is_not_worth_a_run(script: str, token_files: Path, tmp_path: Path) -> None:
    """Standard output that is closed, full or absent: the run trains to its end and saves."""
    ending = run_script(script, token_files, tmp_path / "run", train_iters=30, megatron_defaults=True)  # said at start
    assert last_step(tmp_path / "run") == 30, ending.output
    assert (tmp_path / "run/global_step30/manifest.json").exists()
    assert ending.status == 0, ending.output
    if "full" in script:  # a start that has something to say before the run itself
        shutil.copytree(tmp_path / "run/global_step30", tmp_path / "run/global_step35.saving")
        again = {"train_iters": 31, "load": tmp_path / "run", "megatron_defaults": True}
        ending = run_script(script, token_files, tmp_path / "run", **again)
        assert (ending.status, last_step(tmp_path / "run")) == (0, 31), ending.output
        assert not (tmp_path / "run/global_step35.saving").exists()


@pytest.mark.parametrize("size", ["64k", "512k"])  # no room for a lock; no room for a batch
def test_a_small_shared_memory(size: str, token_files: Path, tmp_path: Path) -> None:
    """Loader processes that cannot hand over their batches: the error names /dev/shm and the flag."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    line = f"""unshare -m bash -c 'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"' shm "$@" """
    ending = run_script(line, token_files, tmp_path / "run", micro_batch_size=64, global_batch_size=64, num_workers=3,
                        seq_length=256)  # fmt: skip
    assert ending.status == 1, ending.output
    assert "error: the data loader lost a process" in ending.output
    assert "/dev/shm" in ending.output and "--num-workers" in ending.output
