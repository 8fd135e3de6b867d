"""Runs as users start them: real programs under real launchers, with default settings, watched until nothing of them is left."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layouts import jobs
from layouts.pool import ENVIRONMENT

from megatron.checkpoint.select import select

REPO = Path(__file__).resolve().parents[2]
MARK = "MEGATRON_TEST_JOB"
PROGRAMS = ("pretrain_mdm.py", "troubled_program.py")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp_size": 2}),
    "pp2": (2, {"pp_size": 2}),
    "zero3": (2, {"zero_stage": 3}),
    "fsdp2": (2, {"engine": "fsdp2"}),
}
ENDLESS = 20_000  # steps of 20 ms: a run that does not end by itself within a test


def launch(launcher: str, processes: int) -> list[str]:
    """What stands before the program on the command line."""
    if launcher == "plain torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if launcher == "torchrun":  # that of the scripts
        return [sys.executable, str(REPO / "tools/_torchrun.py"), "--standalone", "--nproc-per-node", str(processes)]
    if launcher == "deepspeed":
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        return [
            str(Path(sys.executable).parent / "deepspeed"),
            "--master_port",
            str(port),
            "--num_gpus",
            str(processes),
        ]
    assert launcher == "python" and processes == 1
    return [sys.executable]


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
        status: of the process that the user started; negative: the signal that ended it.
        seconds: from the event until it had ended and no process of the job was left.
        output: standard output and error, in the order of their coming.
    """

    status: int
    seconds: float
    output: str


class Job:
    """A command of a user, and every process that comes of it."""

    def __init__(self, command: Sequence[str], *, run_dir: Path, environment: dict[str, str] | None = None) -> None:
        """Start it in a session of its own."""
        self.run_dir, self._mark = run_dir, secrets.token_hex(8)
        values = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO), MARK: self._mark, **(environment or {})}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=values, start_new_session=True
        )
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while part := self.process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            self._parts.append(part)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return b"".join(self._parts).decode(errors="replace")

    def processes(self) -> list[int]:
        """Every living process of the job, wherever it has moved to."""
        mark, found = f"{MARK}={self._mark}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                values = (path / "environ").read_bytes().split(b"\0")
                if mark in values and _state(path) != "Z":
                    found.append(int(path.name))
            except OSError:  # gone, or not ours
                continue
        return found

    def trainers(self) -> list[int]:
        """The processes that train, by rank."""
        ranks = {}
        for pid in self.processes():
            try:
                words, parents = _command(pid), _command(_parent(pid))
                rank = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
            except OSError:
                continue
            program = [word for word in words[1:3] if word != "-u"][:1]
            if words != parents and program and Path(program[0]).name in PROGRAMS:  # equal to its parent: of the loader
                ranks[int(rank.group(1)) if rank else 0] = pid
        return [ranks[rank] for rank in sorted(ranks)]

    def wait_until(self, condition: Callable[[], Any], *, seconds: float = 240) -> None:
        """Return when the condition holds; fail when the job ends before."""
        deadline, has_ended = time.monotonic() + seconds, False
        while not condition():  # once more after the end, which may have brought it about
            assert not has_ended and time.monotonic() < deadline, self.output[-4000:]
            has_ended = self.process.poll() is not None
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Return when the metrics show this step."""
        self.wait_until(lambda: last_step(self.run_dir) >= step)

    def ending(self, *, seconds: float, since: float | None = None) -> Ending:
        """Wait until nothing of the job is left.

        Args:
            seconds: limit; a job that takes longer fails the test.
            since: monotonic time of the event; default: now.
        """
        since = time.monotonic() if since is None else since
        while (left := self.processes()) or self.process.poll() is None:
            taken = time.monotonic() - since
            assert taken < seconds, f"{len(left)} processes left after {taken:.1f} s\n{self.output[-4000:]}"
            time.sleep(0.05)  # each look reads every process of the machine
        taken = time.monotonic() - since
        self._reader.join(5)
        return Ending(self.process.returncode, taken, self.output)

    def close(self) -> None:
        """Kill whatever is left of it."""
        for _ in range(3):
            for pid in self.processes():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        self.process.wait(10)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _state(path: Path) -> str:
    return (path / "stat").read_text().rpartition(") ")[2][0]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def arguments(tokens: Path, run_dir: Path, layout: str = "one", **changes: Any) -> list[str]:
    """Flags of an endless tiny run with the default loader, a line a step and a checkpoint every five."""
    defaults = {"train_iters": ENDLESS, "save_interval": 5, "keep_last": 2, "num_workers": None}
    return jobs.flags(tokens, run_dir, **{**defaults, **LAYOUTS[layout][1], **changes})


def last_step(run_dir: Path) -> int:
    """Step of the last complete line in the metrics."""
    path = run_dir / "metrics.jsonl"
    found = re.findall(r'"step": (\d+)[^\n]*\n', path.read_text()) if path.exists() else []
    return int(found[-1]) if found else 0


def saved_step(run_dir: Path) -> int | None:
    """Step of the newest checkpoint, which is whole; None where there is none."""
    found = select(run_dir)
    assert not found.skipped
    return None if found.tag is None else int(found.tag.name.removeprefix("global_step"))
