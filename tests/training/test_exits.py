"""Every way out of a run, under real launchers with the default loader: the status, what is saved, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.checkpoint.select import select
from megatron.runs.record import RunRecord
from training.started import LAYOUTS, REPO, Ending, Job, arguments, last_step, launch

STOPPED = 75
SOON = 60.0  # seconds; alone it takes two, most of them of the launcher, but the tests share the cores; a hang takes for ever
Start = Callable[..., Job]


@pytest.fixture
def start(token_files: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts jobs in ``tmp_path/run``; whatever is left of them is killed after the test."""
    jobs: list[Job] = []

    def begin(layout: str = "one", *, before: tuple[str, ...] = (), **changes: object) -> Job:
        processes, run_dir = LAYOUTS[layout][0], tmp_path / "run"
        launcher = launch("python" if processes == 1 else "torchrun", processes)
        program = [str(REPO / "pretrain_mdm.py"), *arguments(token_files, run_dir, layout, **changes)]
        jobs.append(Job([*before, *launcher, *program], run_dir=run_dir))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


def assert_saved(job: Job, *, reason: str | None) -> None:
    """The newest checkpoint is whole and of the last step, and the record says why the run ended."""
    found = select(job.run_dir)
    assert found.tag is not None and not found.skipped
    assert found.tag.name == f"global_step{last_step(job.run_dir)}"
    assert (job.run_dir / "stopped.json").exists() == (reason is not None)
    if reason is not None:
        assert reason in (job.run_dir / "stopped.json").read_text()
    assert RunRecord.read(job.run_dir) is not None


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_end(layout: str, start: Start) -> None:
    """A run that has done its steps exits with 0 at once, in every kind of layout."""
    job = start(layout, train_iters=6)
    job.wait_until(lambda: "done: 6 steps" in job.output)
    ending = job.ending(seconds=SOON)
    assert ending.status == 0, ending.output
    assert_saved(job, reason=None)


@pytest.mark.parametrize("layout", ["one", "dp2", "pp2"])
def test_a_signal(layout: str, start: Start) -> None:
    """SIGTERM to the process that the user started; a launcher ends with the signal's status, whatever its processes say."""
    job = start(layout)
    job.wait_for_step(3)
    job.process.send_signal(signal.SIGTERM)
    ending = job.ending(seconds=SOON)
    assert ending.status == (STOPPED if layout == "one" else 128 + signal.SIGTERM), ending.output
    assert "Traceback" not in ending.output
    assert_saved(job, reason="SIGTERM")


def test_the_kill_switch_file(start: Start, tmp_path: Path) -> None:
    job = start("pp2", kill_switch_file=tmp_path / "stop", exit_interval=None)
    job.wait_for_step(3)
    (tmp_path / "stop").touch()
    assert job.ending(seconds=SOON).status == STOPPED, job.output
    assert_saved(job, reason="kill-switch")


def test_the_time_limit(start: Start) -> None:
    job = start("dp2", exit_duration_in_mins=0.05)
    ending = job.ending(seconds=60)
    assert ending.status == STOPPED, ending.output
    assert_saved(job, reason="--exit-duration-in-mins")


def test_a_stop_does_not_wait_for_the_validation(start: Start, token_files: Path) -> None:
    """What is due with a long validation is saved before it, and a stop is heard between two of its batches."""
    job = start("dp2", valid_data_path=token_files / "valid", eval_interval=5, eval_iters="full", num_mc=1000)
    job.wait_until(lambda: "global_step5" in job.output)
    time.sleep(0.5)
    job.process.send_signal(signal.SIGTERM)
    assert job.ending(seconds=SOON).status == 128 + signal.SIGTERM, job.output
    assert last_step(job.run_dir) == 5
    assert_saved(job, reason="SIGTERM")


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2", "pp2"])
def test_an_error_within_a_step(layout: str, start: Start, tmp_path: Path) -> None:
    """A fault that nobody has foreseen, on the last rank: its traceback, status 1, and the others go too."""
    processes = LAYOUTS[layout][0]
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(rank=processes - 1))
    job = start(layout, before=("env", f"PYTHONPATH={tmp_path}:{REPO}"))
    ending = job.ending(seconds=60)
    assert ending.status == 1, ending.output
    assert "ZeroDivisionError: odd" in ending.output
    assert len(re.findall(r"Traceback", ending.output)) <= (1 if layout == "one" else 2)  # torchrun adds its own
    assert last_step(job.run_dir) <= 3


# Python imports it at its start.  The engine's step fails in the fourth call.
FAULT = """
import importlib.abc, importlib.machinery, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "megatron.training.deepspeed.engine" or os.environ.get("RANK", "0") != "{rank}":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            step, calls = module.Engine.train_step, []

            def broken(self, *arguments, **options):
                calls.append(0)
                if len(calls) == 4:
                    raise ZeroDivisionError("odd")
                return step(self, *arguments, **options)

            module.Engine.train_step = broken

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def test_a_killed_rank(start: Start) -> None:
    """The others notice, say it, and the launcher reports the failure."""
    job = start("pp2")
    job.wait_for_step(3)
    victim = next(
        pid for pid in job.processes()
        if b"\0RANK=1\0" in (values := Path(f"/proc/{pid}/environ").read_bytes()) or values.startswith(b"RANK=1\0")
    )  # fmt: skip
    os.kill(victim, signal.SIGKILL)
    ending = job.ending(seconds=60)
    assert ending.status not in (0, STOPPED), ending.output


def run_script(script: str, tokens: Path, run_dir: Path, **changes: object) -> Ending:
    """A line of shell in which "$@" is the program with its flags."""
    words = [sys.executable, str(REPO / "pretrain_mdm.py"), *arguments(tokens, run_dir, **changes)]
    job = Job(["bash", "-c", f"set -o pipefail; {script}", "line", *words], run_dir=run_dir)
    try:
        return job.ending(seconds=90)
    finally:
        job.close()


@pytest.mark.parametrize("script", ['"$@" | head -n 3', '"$@" > /dev/full', '"$@" >&-'])
def test_a_progress_line_is_not_worth_a_run(script: str, token_files: Path, tmp_path: Path) -> None:
    """Standard output that is closed, full or absent: the run trains to its end and saves."""
    ending = run_script(script, token_files, tmp_path / "run", train_iters=30)
    assert last_step(tmp_path / "run") == 30, ending.output
    assert (tmp_path / "run/global_step30/manifest.json").exists()
    assert ending.status == 0, ending.output


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
